"""What can be raced: search networks on any backend, ONNX files, whole trackers, and a matrix product."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, List, Optional, Sequence

import cv2
import numpy as np

from asymtrack_edge.benchmarks.speed.race import UNTRAINED, Case, Step
from asymtrack_edge.errors import (
    BackendError,
    ManifestError,
    MissingDependencyError,
    SourceError,
    UsageError,
    without_secrets,
)
from asymtrack_edge.geometry import Box, CropWindow
from asymtrack_edge.runtime.backends.base import Backend, device_index
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.backends.threads import processors
from asymtrack_edge.runtime.sources import Source, open_source
from asymtrack_edge.runtime.sources.clip import clip_argument, synthetic_clip
from asymtrack_edge.runtime.tracker import Tracker

#: OpenCV Zoo's and most cameras' frames.
HD = (1280, 720)
PEAK = "matrix product"
_SIDE = 768  #: of the square matrices whose product measures the peak: 7 MB in all


@dataclass(frozen=True)
class Setting:
    """How a model is run: arguments of ``Tracker.load`` and ``open_backend``."""

    model: str
    backend: str = "auto"
    precision: Optional[str] = None
    device: str = "auto"
    threads: Optional[int] = None


def settings(
    models: Sequence[str],
    backends: Sequence[str] = ("auto",),
    precisions: Optional[Sequence[str]] = None,
    threads: Optional[Sequence[int]] = None,
    device: str = "auto",
) -> Dict[str, Setting]:
    """Every combination, by a name of the parts that differ."""
    named: Dict[str, Setting] = {}
    parts = (models, backends, precisions or (None,), threads or (None,))
    for model, backend, precision, count in product(*parts):
        texts = (str(model), backend, precision, f"{count} thread{'s' * (count != 1)}")
        several = [text for text, values in zip(texts, parts) if len(values) > 1 and text]
        name = ", ".join(several) or (f"{model}, {backend}" if backend != "auto" else str(model))
        while name in named:  # a model against itself
            name += " again"
        named[name] = Setting(str(model), backend, precision, device, count)
    return named


def describe(name: str, step: Step, backend: Backend, setting: Setting) -> Case:
    """A case of an open backend."""
    manifest = backend.manifest
    weights = str(manifest.provenance.get("weights", "not stated"))
    notes = [UNTRAINED] if weights.startswith("random") else []
    if backend.name == "tensorrt":
        notes.append("with the crop, which the GPU cuts in the same launch")
    return Case(
        name,
        step,
        f"AsymTrack-{manifest.variant}",
        backend.name,
        device="cpu" if backend.on_cpu else f"cuda:{gpu_index(setting.device)}",
        precision=backend.precision,
        threads=setting.threads if backend.on_cpu else None,
        model_sha256=manifest.files["search.onnx"].sha256,
        multiply_adds=manifest.provenance.get("search_multiply_adds"),
        notes=tuple(notes),
    )


class BackendStep(Step):
    """The search network of a backend on random crops, the template cached: no cropping, no decoding.

    The time is what the backend itself books as ``infer``. With ONNX Runtime on a GPU it includes
    copying the crop there and the prediction back; with TensorRT cutting the crop on the GPU, in the
    same launch.

    Args:
        backend: open; closed with the step.
        targets: crops in one sample.
        together: whether one call takes all of them, or one call each.
    """

    def __init__(self, backend: Backend, targets: int = 1, together: bool = True) -> None:
        self.backend = backend
        backend.reserve(targets)
        side, z = backend.manifest.search_size, backend.manifest.template_size
        # One pixel more than the crop, whose convention loses the frame's last column and row.
        self._frame = np.random.RandomState(0).randint(0, 256, (side + 1, side + 1, 3), np.uint8)
        centre = (side / 2, side / 2)
        for slot in range(targets):
            backend.template(self._frame, CropWindow(0, 0, z, centre), slot)
        window = CropWindow(0, 0, side, centre)
        self._calls = [[window] * targets] if together else [[window]] * targets

    def sample(self) -> float:
        """Seconds of the network for all targets."""
        before = self.backend.seconds["infer"]
        for windows in self._calls:
            self.backend.search(self._frame, windows)
        return self.backend.seconds["infer"] - before

    def close(self) -> None:
        """Closes the backend."""
        self.backend.close()


def network_case(name: str, setting: Setting, targets: int = 1, together: bool = True) -> Case:
    """The search network of a model; see ``BackendStep``. An ``.onnx`` file is run as it is.

    Raises:
        AsymTrackError: the model or the backend is not there.
    """
    if setting.model.endswith(".onnx"):
        if setting.backend not in ("auto", "onnxruntime") or setting.precision is not None:
            raise UsageError(f"{setting.model} is run as it is, by ONNX Runtime on the CPU")
        return onnx_case(name, Path(setting.model), setting.threads)
    backend = open_backend(**asdict(setting))
    case = describe(name, BackendStep(backend, targets, together), backend, setting)
    return replace(case, batch=targets)


def onnx_case(name: str, path: Path, threads: Optional[int]) -> Case:
    """Any ONNX file on random host arrays by ONNX Runtime's ``run``, copies inside (protocol P3).

    Raises:
        ManifestError: there is no such file.
        BackendError: ONNX Runtime cannot load it, or its inputs cannot be made up.
    """
    from asymtrack_edge.manifest import file_entry
    from asymtrack_edge.runtime.backends.onnxruntime import open_session

    if not path.is_file():
        raise ManifestError(f"there is no ONNX file {path}")
    session = open_session(path, threads)
    feeds = {node.name: random_for(node) for node in session.get_inputs()}
    return Case(
        name,
        Step(lambda: session.run(None, feeds)),
        path.stem,
        "onnxruntime",
        precision="",
        threads=threads,
        template="",
        model_sha256=file_entry(path).sha256,
        notes=("P3: ONNX Runtime run() on host arrays, copies inside",),
    )


def random_for(node: Any) -> np.ndarray:
    """Made-up values for an input of an ONNX Runtime session; a free axis becomes 1."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if node.type not in dtypes:
        raise BackendError(f"the input {node.name} is a {node.type}: only float and uint8 inputs can be made up")
    shape = [d if isinstance(d, int) and d > 0 else 1 for d in node.shape]
    random = np.random.RandomState(0)
    values = random.randint(0, 256, shape) if node.type == "tensor(uint8)" else random.normal(0, 1, shape)
    return np.asarray(values).astype(dtypes[node.type])


def peak_case(threads: Optional[int]) -> Case:
    """A large fp32 matrix product by ONNX Runtime: what the machine can do with multiply-adds.

    Args:
        threads: None for one per processor.

    Raises:
        MissingDependencyError: there is no onnx to write it with.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingDependencyError("onnx", "export", "measuring the machine's peak rate") from None
    shape = [_SIDE, _SIDE]
    values = np.random.RandomState(0).normal(0, 1, shape).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "peak", ends[:1], ends[1:], [numpy_helper.from_array(values, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.onnx"
        path.write_bytes(model.SerializeToString())
        case = onnx_case(PEAK, path, threads or processors())
    return replace(case, multiply_adds=_SIDE**3, precision="fp32")


@dataclass(frozen=True)
class Clip:
    """Decoded frames, and the same as an encoded video.

    Attributes:
        name: for people.
        frames: BGR uint8.
        box: target in the first frame.
        open: opens the encoded video from its beginning.
    """

    name: str
    frames: List[np.ndarray]
    box: Box
    open: Callable[[], Source]


def make_clip(source: Optional[str], box: Optional[str], folder: Path) -> Clip:
    """The clip that ``--clip`` and ``--box`` name, or a synthetic 1280x720 one encoded into ``folder``.

    Raises:
        AsymTrackError: it cannot be read, the box is none, or this OpenCV can encode no video.
    """
    given = clip_argument(source, box)
    if given is not None and source is not None:
        frames, target = given
        height, width = frames[0].shape[:2]
        return Clip(
            f"{Path(without_secrets(source)).name}, {width}x{height}", frames, target, partial(open_source, source)
        )
    pairs = list(synthetic_clip(36, HD))
    path = folder / "clip.mp4"
    writer = cv2.VideoWriter(str(path), sum(ord(c) << 8 * i for i, c in enumerate("mp4v")), 30.0, HD)
    if not writer.isOpened():
        raise SourceError("this OpenCV cannot encode mp4v: give --clip FILE and --box")
    for i in [*range(36), *range(34, -1, -1)]:  # there and back, without a cut
        writer.write(pairs[i][0])
    writer.release()
    name = f"synthetic, {HD[0]}x{HD[1]}, mp4v"
    return Clip(name, [frame for frame, _ in pairs], pairs[0][1], partial(open_source, str(path)))


class UpdateStep(Step):
    """Protocol P5: the whole ``update(frame)`` on frames that are in memory already.

    Args:
        tracker: has ``init(frame, box)`` and ``update(frame)``; closed with the step.
        clip: what it tracks on.

    Attributes:
        calls: of ``update`` so far.
    """

    def __init__(self, tracker: Any, clip: Clip) -> None:
        self.tracker = tracker
        self.calls = 0
        self._frames = clip.frames
        # There and back for ever, without a cut.
        self._order = cycle([*range(len(clip.frames)), *range(len(clip.frames) - 2, 0, -1)])
        tracker.init(clip.frames[next(self._order)], tuple(clip.box))

    def sample(self) -> float:
        """Seconds of ``update`` on the next frame."""
        frame = self._frames[next(self._order)]
        self.calls += 1
        began = perf_counter()
        self.tracker.update(frame)
        return perf_counter() - began

    def stages(self) -> Dict[str, float]:
        """Seconds so far by stage, for this package's trackers; empty for others."""
        return dict(self.tracker.seconds) if isinstance(self.tracker, Tracker) else {}

    def close(self) -> None:
        """Closes this package's trackers."""
        if isinstance(self.tracker, Tracker):
            self.tracker.close()


def tracker_case(name: str, setting: Setting, clip: Clip) -> Case:
    """One of this package's trackers on a clip."""
    tracker = Tracker.load(**asdict(setting))
    case = describe(name, UpdateStep(tracker, clip), tracker.backend, setting)
    return replace(case, notes=(*case.notes, f"frames: {clip.name}"))


def peer_case(name: str, threads: Optional[int], clip: Clip) -> Case:
    """Another tracker on a clip: any that ``asymtrack-eval --tracker`` takes, such as ``opencv:CSRT``.

    Raises:
        AsymTrackError: there is no such tracker, or what it needs is missing.
    """
    from asymtrack_edge.benchmarks.accuracy.trackers import TrackerSpec

    step = UpdateStep(TrackerSpec(name, threads=threads).build(), clip)
    kind = name.partition(":")[0]
    notes = (f"frames: {clip.name}",)
    return Case(name, step, name, kind, precision="", threads=threads, template="its own", notes=notes)


def gpu_index(device: str) -> int:
    """Index of the CUDA device that ``--device`` names; 0 where it names none."""
    return 0 if device == "cpu" else device_index(device)
