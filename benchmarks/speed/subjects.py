"""What is measured: descriptions, and steps over the backends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.timing import CallStep, Step
from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.tracker import Tracker


@dataclass(frozen=True)
class Subject:
    """What a row is about; every field goes into the report.

    Attributes:
        name: short and unique in a run.
        tracker: ``"AsymTrack-T"`` or a peer's name.
        backend: of ``loading.BACKENDS``, or ``"torch"``, ``"opencv"``, ...
        form: ``"reference"`` (as published), ``"folded"`` (eager PyTorch after folding), ``"graph"``
            (exported) or ``"library"`` (somebody else's).
        device: ``"cpu"`` or ``"cuda:0"``: where the network ran.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``; empty where nobody says.
        threads: CPU threads; None for the runtime's own choice.
        batch: crops in one call of the network.
        template: ``"cached"`` (run once at init) or ``"every call"``.
        weights: where they come from; speed does not depend on it.
        model_sha256: of the search network's file, or of the weights in memory.
        multiply_adds: of one call of the network at batch 1; None if unknown.
        notes: what a reader must know of this row.
    """

    name: str
    tracker: str
    backend: str
    form: str
    device: str = "cpu"
    precision: str = "fp32"
    threads: Optional[int] = None
    batch: int = 1
    template: str = "cached"
    weights: str = ""
    model_sha256: str = ""
    multiply_adds: Optional[int] = None
    notes: Tuple[str, ...] = field(default=())

    @property
    def on_gpu(self) -> bool:
        """Whether the network ran on a GPU."""
        return self.device.startswith("cuda")

    def with_(self, **changes: Any) -> Subject:
        """A copy with some fields changed."""
        return replace(self, **changes)


def engine_subject(engine: Backend, device: int, threads: Optional[int], name: str = "") -> Subject:
    """Describes an open engine."""
    manifest = engine.manifest
    weights = str(manifest.provenance.get("weights", "not stated"))
    notes = ["untrained weights (speed does not depend on them)"] if weights.startswith("random") else []
    if engine.name == "tensorrt":
        notes.append("with the crop, which the GPU cuts in the same launch")
    return Subject(
        name=name or engine.name,
        tracker=f"AsymTrack-{manifest.variant}",
        backend=engine.name,
        form="graph",
        device="cpu" if engine.on_cpu else f"cuda:{device}",
        precision=engine.precision,
        threads=threads if engine.on_cpu else None,
        weights=weights,
        model_sha256=manifest.files["search.onnx"].sha256,
        multiply_adds=manifest.provenance.get("search_multiply_adds"),
        notes=tuple(notes),
    )


class EngineStep(Step):
    """The search network of an engine on random crops, the template cached: no cropping, no decoding.

    The time is what the engine itself books as ``infer``, because the engine's interface is one call:
    with ONNX Runtime on a device it includes copying the crop there and the answer back; TensorRT's
    engine cuts the crop and decodes on the device, in the same launch, and these are included.

    Args:
        engine: open.
        targets: crops in one sample.
        together: whether one call takes all of them, or one call each.
    """

    def __init__(self, engine: Backend, targets: int = 1, together: bool = True) -> None:
        self.engine = engine
        engine.reserve(targets)
        side = engine.manifest.search_size
        random = np.random.RandomState(0)
        # One pixel more than the crop, whose convention loses the frame's last column and row.
        self._frame = random.randint(0, 256, (side + 1, side + 1, 3), np.uint8)
        centre = (side / 2, side / 2)
        z = engine.manifest.template_size
        for slot in range(targets):
            engine.template(self._frame, CropWindow(0, 0, z, centre), slot)
        window = CropWindow(0, 0, side, centre)
        self._calls = [[window] * targets] if together else [[window]] * targets

    def sample(self) -> float:
        """See ``Step.sample``."""
        before = self.engine.seconds["infer"]
        for windows in self._calls:
            self.engine.search(self._frame, windows)
        return self.engine.seconds["infer"] - before

    def close(self) -> None:
        """See ``Step.close``."""
        self.engine.close()


def random_array(shape: Sequence[int], dtype: str, seed: int = 0) -> np.ndarray:
    """Bytes of all values, or normally distributed numbers (of mean 0, deviation 1)."""
    random = np.random.RandomState(seed)
    if dtype == "uint8":
        return random.randint(0, 256, tuple(shape)).astype(np.uint8)
    return random.normal(0, 1, tuple(shape)).astype(dtype)


def random_inputs(manifest: Manifest, batch: int = 1) -> Dict[str, np.ndarray]:
    """Host arrays for the search network by the names of its inputs."""
    specs = (manifest.search, *manifest.state)
    return {s.name: random_array((batch, *s.shape), s.dtype, seed) for seed, s in enumerate(specs)}


def onnx_step(
    path: str, feeds: Optional[Dict[str, np.ndarray]], threads: Optional[int], providers: Sequence[Any]
) -> CallStep:
    """Protocol P3: ONNX Runtime's ``run`` on host arrays, allocation and copies of the outputs inside.

    Args:
        path: any ONNX model.
        feeds: its inputs; None for random ones (free axes become 1).
        threads: None for ONNX Runtime's choice.
        providers: as ``onnxruntime.InferenceSession`` takes them.

    Raises:
        BackendError: ONNX Runtime cannot load it, or a provider is absent.
    """
    from asymtrack_edge.runtime.backends.onnxruntime import open_session

    batch = 1 if feeds is None else len(next(iter(feeds.values())))
    session = open_session(Path(path), threads, providers, batch)
    if feeds is None:
        feeds = {i.name: _random_for(i, seed) for seed, i in enumerate(session.get_inputs())}
    inputs = feeds
    return CallStep(lambda: session.run(None, inputs))


def _random_for(node: Any, seed: int) -> np.ndarray:
    from asymtrack_edge.errors import BackendError

    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
    if node.type not in dtypes:
        raise BackendError(f"the input {node.name} is a {node.type}: only float and uint8 inputs can be made up")
    shape = [d if isinstance(d, int) and d > 0 else 1 for d in node.shape]
    return random_array(shape, dtypes[node.type], seed)


def ping_pong(count: int) -> Iterator[int]:
    """0, 1, ... count - 1, count - 2, ... 1, 0, 1, ...: a clip without a cut, for ever."""
    while True:
        yield from range(count)
        yield from range(count - 2, 0, -1)


class UpdateStep(Step):
    """Protocol P5: the whole ``update(frame)`` on frames that are in memory already.

    Args:
        tracker: anything with ``init(frame, box)`` and ``update(frame)``.
        frames: BGR uint8.
        box: of the target in the first frame.
    """

    def __init__(self, tracker: Any, frames: Sequence[np.ndarray], box: Sequence[float]) -> None:
        self.tracker = tracker
        self._frames = frames
        self._order = ping_pong(len(frames))
        first = next(self._order)
        tracker.init(frames[first], tuple(box))

    def sample(self) -> float:
        """See ``Step.sample``."""
        frame = self._frames[next(self._order)]
        began = perf_counter()
        self.tracker.update(frame)
        return perf_counter() - began

    def stages(self) -> Dict[str, float]:
        """Seconds so far by stage, for this package's trackers; empty for others."""
        return dict(self.tracker.seconds) if isinstance(self.tracker, Tracker) else {}

    def close(self) -> None:
        """See ``Step.close``."""
        if isinstance(self.tracker, Tracker):
            self.tracker.close()


def stage_milliseconds(before: Dict[str, float], after: Dict[str, float], calls: int) -> Dict[str, float]:
    """Milliseconds per call by stage between two readings of ``Tracker.seconds``."""
    names: List[str] = list(after)
    return {_STAGES.get(n, n): 1000 * (after[n] - before.get(n, 0.0)) / max(1, calls) for n in names}


#: Stages as the report names them: ``decode`` of a tracker decodes the box, not the frame.
_STAGES = {"decode": "decode box"}
