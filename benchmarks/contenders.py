"""What ``benchmarks.ab`` races: exported networks, the published form, and a matrix product."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from asymtrack_edge.benchmarks.ab_options import session
from asymtrack_edge.benchmarks.speed.own_process import ProcessStep, torch_step
from asymtrack_edge.benchmarks.speed.timing import CallStep, Clock, Step
from asymtrack_edge.errors import MissingDependencyError, UsageError

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
PEAK = "matrix product"
_SIDE = 768  #: of the square matrices whose product measures the peak: 7 MB in all


@dataclass
class Contender:
    """Something to be timed.

    Attributes:
        name: for people.
        step: runs it once and waits for the answer; or times itself.
        multiply_adds: of one step, where known.
        rounds: seconds of each run, round by round.
    """

    name: str
    step: Union[Callable[[], Any], Step]
    multiply_adds: Optional[int] = None
    rounds: List[List[float]] = field(default_factory=list)

    def timed(self, clock: Clock = perf_counter) -> Step:
        """The step on a clock: ``perf_counter``, or ``thread_time`` for processor seconds."""
        if isinstance(self.step, ProcessStep):
            self.step.clock = "wall" if clock is perf_counter else "cpu"
        return self.step if isinstance(self.step, Step) else CallStep(self.step, clock)

    @property
    def best(self) -> float:
        """Seconds of the 5th percentile of all runs: a minimum that one lucky clock reading cannot make."""
        return float(np.percentile(np.concatenate(self.rounds), 5))

    @property
    def median(self) -> float:
        """Seconds of the median run."""
        return float(np.median(np.concatenate(self.rounds)))

    @property
    def rate(self) -> float:
        """Multiply-adds a second at ``best``; NaN where their number is not known."""
        return float("nan") if self.multiply_adds is None else self.multiply_adds / self.best


def random_feed(opened: Any, batch: int = 1, seed: int = 0) -> Dict[str, np.ndarray]:
    """Made-up inputs for a session, a free batch axis set to ``batch``."""
    generator = np.random.RandomState(seed)
    feed = {}
    for value in opened.get_inputs():
        shape = [n if isinstance(n, int) else batch for n in value.shape]
        dtype = _TYPES[value.type]
        made = generator.randint(0, 256, shape) if dtype is np.uint8 else generator.normal(0, 1, shape)
        feed[value.name] = made.astype(dtype)
    return feed


def onnx_contender(path: Path, threads: int, name: Optional[str] = None, batch: int = 1, **options: Any) -> Contender:
    """The search network of an export directory, or any ONNX model, on made-up inputs bound once.

    Args:
        path: export directory (its manifest tells the multiply-adds) or ONNX file.
        threads: for one operator.
        name: None for the path.
        batch: size of a free batch axis.
        options: see ``ab_options.session``.

    Raises:
        UsageError: there is no model, or ONNX Runtime cannot open it.
    """
    multiply_adds = None
    model = path
    if path.is_dir():
        model = path / "search.onnx"
        manifest = path / "manifest.json"
        if manifest.is_file():
            provenance = json.loads(manifest.read_text(encoding="utf-8")).get("provenance", {})
            multiply_adds = provenance.get("search_multiply_adds")
    if not model.is_file():
        raise UsageError(f"there is no model {model}: name an export directory or an ONNX file")
    opened = session(str(model), threads, batch, **options)
    binding = opened.io_binding()
    for key, values in random_feed(opened, batch).items():
        binding.bind_cpu_input(key, values)
    for value in opened.get_outputs():
        binding.bind_output(value.name, "cpu")
    return Contender(
        name or str(path), lambda: opened.run_with_iobinding(binding), multiply_adds and multiply_adds * batch
    )


def reference_contender(variant: str, threads: int) -> Contender:
    """The published form in eager PyTorch (``reference_form``), as ``asymtrack-bench speed`` times it."""
    from asymtrack_edge.variants import get_variant

    chosen = get_variant(variant)
    _, step = torch_step(chosen, "reference", "cpu", threads)
    return Contender(f"reference form of {chosen.name}, eager PyTorch {version('torch')}", step)


def peak_contender(threads: int) -> Contender:
    """A large matrix product by ONNX Runtime: what the machine can do with fp32 multiply-adds."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingDependencyError("onnx", "export", "measuring the peak rate") from None
    shape = [_SIDE, _SIDE]
    values = np.random.RandomState(0).normal(0, 1, shape).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.onnx"
        path.write_bytes(model.SerializeToString())
        contender = onnx_contender(path, threads, PEAK)
    contender.multiply_adds = _SIDE**3
    return contender


def node_times(model: Path, threads: int, runs: int = 60) -> List[Tuple[str, str, float]]:
    """Microseconds of every node of the graph that ONNX Runtime makes of ``model``.

    Returns:
        Operator, node name and the 20th percentile of its time over the runs, in order of execution.
    """
    with tempfile.TemporaryDirectory() as folder:
        opened = session(str(model), threads, enable_profiling=True, profile_file_prefix=f"{folder}/profile")
        feed = random_feed(opened)
        for _ in range(runs):
            opened.run(None, feed)
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    times: Dict[Tuple[str, str], List[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"][: -len("_kernel_time")]].append(event["dur"])
    return [(operator, name, float(np.percentile(values, 20))) for (operator, name), values in times.items()]
