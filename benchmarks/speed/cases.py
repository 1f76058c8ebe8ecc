"""What can be raced: search networks on any backend, ONNX files, whole trackers, and a matrix product."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import cv2
import numpy as np

from asymtrack_edge.benchmarks.speed.race import Case, timed
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
from asymtrack_edge.runtime.sources.clip import clip_argument, synthetic_clip
from asymtrack_edge.runtime.tracker import Tracker

#: OpenCV Zoo's and most cameras' frames.
HD = (1280, 720)
#: A note on a case.
UNTRAINED = "untrained weights (speed does not depend on them)"
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
        texts = (model, backend, precision, f"{count} thread{'s' * (count != 1)}")
        several = [text for text, values in zip(texts, parts) if len(values) > 1 and text]
        name = ", ".join(several) or (f"{model}, {backend}" if backend != "auto" else model)
        while name in named:  # a model against itself
            name += " again"
        named[name] = Setting(model, backend, precision, device, count)
    return named


def gpu_index(device: str) -> int:
    """Index of the CUDA device that ``--device`` names; 0 where it names none."""
    return 0 if device == "cpu" else device_index(device)


def _ours(name: str, sample: Callable[[], float], backend: Backend, setting: Setting, **more: Any) -> Case:
    """A case of an open backend."""
    manifest = backend.manifest
    notes = (UNTRAINED,) if str(manifest.provenance.get("weights", "")).startswith("random") else ()
    return Case(
        name,
        sample,
        tracker=f"AsymTrack-{manifest.variant}",
        backend=backend.name,
        device="cpu" if backend.on_cpu else f"cuda:{gpu_index(setting.device)}",
        precision=backend.precision,
        threads=setting.threads if backend.on_cpu else None,
        model_sha256=manifest.files["search.onnx"].sha256,
        multiply_adds=manifest.provenance.get("search_multiply_adds"),
        notes=(*notes, *more.pop("notes", ())),
        **more,
    )


def network_case(name: str, setting: Setting, targets: int = 1, together: bool = True) -> Case:
    """The search network of a model on random crops, the template cached: no cropping, no decoding.

    The time is what the backend itself books as ``infer``. With ONNX Runtime on a GPU it includes copying the crop
    there and the prediction back; with TensorRT cutting the crop on the GPU, in the same launch. One call takes all
    ``targets`` ``together``, or one call each. An ``.onnx`` file is run as it is.
    """
    if setting.model.endswith(".onnx"):
        if setting.backend not in ("auto", "onnxruntime") or setting.precision is not None:
            raise UsageError(f"{setting.model} is run as it is, by ONNX Runtime on the CPU")
        return onnx_case(name, Path(setting.model), setting.threads)
    backend = open_backend(**asdict(setting))
    backend.reserve(targets)
    side, z = backend.manifest.search_size, backend.manifest.template_size
    # One pixel more than the crop, whose convention loses the frame's last column and row.
    frame = np.random.RandomState(0).randint(0, 256, (side + 1, side + 1, 3), np.uint8)
    centre = (side / 2, side / 2)
    for slot in range(targets):
        backend.template(frame, CropWindow(0, 0, z, centre), slot)
    window = CropWindow(0, 0, side, centre)
    calls = [[window] * targets] if together else [[window]] * targets

    def sample() -> float:
        before = backend.seconds["infer"]
        for windows in calls:
            backend.search(frame, windows)
        return backend.seconds["infer"] - before

    notes = ("with the crop, which the GPU cuts in the same launch",) if backend.name == "tensorrt" else ()
    return _ours(name, sample, backend, setting, batch=targets, close=backend.close, notes=notes)


def onnx_case(name: str, path: Path, threads: Optional[int]) -> Case:
    """Any ONNX file by ONNX Runtime's ``run`` on random host arrays, copies inside (protocol P3).

    Raises AsymTrackError where there is none, it cannot be loaded, or its inputs cannot be made up.
    """
    from asymtrack_edge.manifest import file_entry
    from asymtrack_edge.runtime.backends.onnxruntime import open_session

    if not path.is_file():
        raise ManifestError(f"there is no ONNX file {path}")
    session = open_session(path, threads)
    feeds = random_feeds(session)
    return Case(
        name,
        timed(lambda: session.run(None, feeds)),
        tracker=path.stem,
        backend="onnxruntime",
        precision="",
        threads=threads,
        template="",
        model_sha256=file_entry(path).sha256,
        notes=("P3: ONNX Runtime run() on host arrays, copies inside",),
    )


def random_feeds(session: Any) -> Dict[str, np.ndarray]:
    """Made-up values for the inputs of an ONNX Runtime session; a free axis becomes 1."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    feeds = {}
    for node in session.get_inputs():
        if node.type not in dtypes:
            raise BackendError(f"the input {node.name} is a {node.type}: only float and uint8 inputs can be made up")
        shape = [d if isinstance(d, int) and d > 0 else 1 for d in node.shape]
        random = np.random.RandomState(0)
        values = random.randint(0, 256, shape) if node.type == "tensor(uint8)" else random.normal(0, 1, shape)
        feeds[node.name] = np.asarray(values).astype(dtypes[node.type])
    return feeds


def peak_case(threads: Optional[int]) -> Case:
    """A large fp32 matrix product by ONNX Runtime, by default on all processors: the machine's rate of multiply-adds.

    Raises MissingDependencyError without onnx to write it with.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingDependencyError("onnx", "export", "measuring the machine's peak rate") from None
    values = np.random.RandomState(0).normal(0, 1, (_SIDE, _SIDE)).astype(np.float32)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "peak", ends[:1], ends[1:], [numpy_helper.from_array(values, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.onnx"
        path.write_bytes(model.SerializeToString())
        return replace(onnx_case("matrix product", path, threads or processors()), multiply_adds=_SIDE**3)


class Clip(NamedTuple):
    """Decoded BGR uint8 frames, the target in the first, and the encoded video that they are from."""

    frames: List[np.ndarray]
    box: Box
    source: str

    @property
    def note(self) -> str:
        """For people."""
        height, width = self.frames[0].shape[:2]
        return f"frames: {Path(without_secrets(self.source)).name}, {width}x{height}"


def make_clip(source: Optional[str], box: Optional[str], folder: Path) -> Clip:
    """The clip that ``--clip`` and ``--box`` name, or a synthetic 1280x720 one encoded into ``folder``.

    Raises AsymTrackError: it cannot be read, the box is none, or this OpenCV can encode no video.
    """
    given = clip_argument(source, box)
    if given is None or source is None:
        source = str(folder / "synthetic.mp4")
        pairs = list(synthetic_clip(36, HD))
        writer = cv2.VideoWriter(source, sum(ord(c) << 8 * i for i, c in enumerate("mp4v")), 30.0, HD)
        if not writer.isOpened():
            raise SourceError("this OpenCV cannot encode mp4v: give --clip FILE and --box")
        for i in [*range(36), *range(34, -1, -1)]:  # there and back, without a cut
            writer.write(pairs[i][0])
        writer.release()
        given = [frame for frame, _ in pairs], pairs[0][1]
    return Clip(*given, source)


def _updates(tracker: Any, clip: Clip) -> Callable[[], float]:
    """Protocol P5: the whole ``update(frame)`` on frames that are in memory already."""
    frames = cycle([*clip.frames, *clip.frames[-2:0:-1]])  # there and back for ever, without a cut
    tracker.init(next(frames), tuple(clip.box))
    return timed(lambda: tracker.update(next(frames)))


def tracker_case(name: str, setting: Setting, clip: Clip, mapped: bool = False) -> Case:
    """One of this package's trackers on a clip; ``mapped``: an integrated GPU reads frames where the CPU has them."""
    tracker: Any = Tracker.load(**asdict(setting))
    if mapped:
        tracker.backend.map_frames()
    more: Dict[str, Any] = {"subject": tracker, "close": tracker.close, "notes": (clip.note,)}
    return _ours(name, _updates(tracker, clip), tracker.backend, setting, **more)


def peer_case(name: str, threads: Optional[int], clip: Clip) -> Case:
    """Another tracker on a clip: any that ``asymtrack-eval --tracker`` takes, such as ``opencv:CSRT``."""
    from asymtrack_edge.benchmarks.accuracy.trackers import TrackerSpec

    tracker = TrackerSpec(name, threads=threads).build()
    case = Case(name, _updates(tracker, clip), subject=tracker, tracker=name, backend=name.partition(":")[0])
    return replace(case, precision="", threads=threads, template="its own", notes=(clip.note,))
