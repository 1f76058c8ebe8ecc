"""Interleaved timing of search networks: which of several forms is faster, and by how much.

A machine is rarely quiet for long, so the contenders take turns of a tenth of a second, in the
opposite order every other round (``speed.timing.interleave``). What is compared are the ratios
within a round, which see the same disturbance, and the fastest runs, which see the least. A large
matrix product takes its turn as well: it shows what multiply-add rate the machine gave at the time.
On a machine that others keep busy, ``--clock cpu`` counts only the time that the one thread was
running.

    python -m asymtrack_edge.benchmarks.ab exports/plain exports/merged --reference T --threads 1

A model can also race itself, opened with different session options of ONNX Runtime (``ab_options``):

    python -m asymtrack_edge.benchmarks.ab exports/plain --option enable_cpu_mem_arena=false
    python -m asymtrack_edge.benchmarks.ab exports/plain --compare-options --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.ab_options import compared, in_one_thread, parse_options, session
from asymtrack_edge.benchmarks.speed.timing import CallStep, interleave, speedup
from asymtrack_edge.errors import MissingDependencyError, UsageError

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
_PEAK = "matrix product"
_SIDE = 768  #: of the square matrices whose product measures the peak: 7 MB in all


@dataclass
class Contender:
    """Something to be timed.

    Attributes:
        name: for people.
        step: runs it once and waits for the answer.
        multiply_adds: of one step, where known.
        rounds: seconds of each run, round by round.
    """

    name: str
    step: Callable[[], Any]
    multiply_adds: Optional[int] = None
    rounds: List[List[float]] = field(default_factory=list)

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


def race(contenders: Sequence[Contender], seconds: float, clock: Callable[[], float] = perf_counter) -> None:
    """Times all contenders in turns, for about ``seconds`` in all; fills their ``rounds``.

    Args:
        contenders: at least one.
        seconds: no round begins after this long (there is always one); where fewer than
            ``speed.timing.LEAST_ROUNDS`` were made by then, half as long again.
        clock: ``time.thread_time`` leaves out the time in which the thread did not run; right only for
            contenders that work in the calling thread alone.
    """
    # Numbered, because the same model may run against itself.
    steps = {str(i): CallStep(contender.step, clock) for i, contender in enumerate(contenders)}
    measured = interleave(steps, seconds, calls=sys.maxsize)
    for i, contender in enumerate(contenders):
        contender.rounds = measured.samples[str(i)]


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
    """The published form in eager PyTorch (``reference_form``), with made-up weights."""
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("torch", "export", "timing the reference form") from None
    from asymtrack_edge.benchmarks.reference_form import ReferenceForm
    from asymtrack_edge.network import AsymTrack
    from asymtrack_edge.variants import get_variant

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = get_variant(variant)
    reference = ReferenceForm(AsymTrack(chosen).eval())
    search = torch.randn(1, 3, chosen.search_size, chosen.search_size)
    with torch.no_grad():
        template = reference.template(torch.randn(1, 3, chosen.template_size, chosen.template_size))

    def step() -> None:
        with torch.no_grad():
            reference(search, template)

    return Contender(f"reference form of {chosen.name}, eager PyTorch {torch.__version__}", step)


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
        contender = onnx_contender(path, threads, _PEAK)
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


def report(contenders: Sequence[Contender], peak: Optional[Contender]) -> List[Dict[str, Any]]:
    """The figures of a race, the ratios over the first contender."""
    rows = []
    for contender in contenders:
        ratio, low, high = speedup(contenders[0].rounds, contender.rounds)
        row: Dict[str, Any] = {
            "name": contender.name,
            "best_ms": contender.best * 1e3,
            "median_ms": contender.median * 1e3,
            "speedup": ratio,
            "speedup_p10": low,
            "speedup_p90": high,
            "speedup_of_best": contenders[0].best / contender.best,
        }
        if peak is not None and contender.multiply_adds is not None:
            row["gmac_s"] = contender.rate / 1e9
            row["share_of_peak"] = contender.rate / peak.rate
        rows.append(row)
    return rows


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m asymtrack_edge.benchmarks.ab", description="Time search networks against each other."
    )
    parser.add_argument("models", nargs="*", type=Path, help="export directories or ONNX files")
    parser.add_argument("--reference", metavar="{T,S,B}", help="first the published form, eager PyTorch")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="how long (default: 20)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="of a free batch axis (default: 1)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: running time only, with one thread"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="time each model once more with this session option of ONNX Runtime, such as "
        "graph_optimization_level=basic or session.disable_prepacking=1; several with commas between hold "
        "together; may be given more than once",
    )
    parser.add_argument(
        "--compare-options",
        action="store_true",
        help="as --option for each that can matter: " + "; ".join(compared(2)) + " (the last two with several threads)",
    )
    parser.add_argument("--nodes", action="store_true", help="print the time of each kind of node")
    parser.add_argument("--json", action="store_true", help="print the figures for a machine")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise UsageError("--clock cpu adds up all threads: use it with --threads 1")
    texts = [*arguments.option, *(compared(arguments.threads) if arguments.compare_options else ())]
    options = {text: parse_options(text) for text in texts}
    if arguments.clock == "cpu" and not all(map(in_one_thread, options.values())):
        raise UsageError("--clock cpu counts one thread: leave out options that start more")
    if not arguments.models and (options or arguments.reference is None):
        raise UsageError("nothing to time: name export directories, ONNX files or --reference T")
    contenders = []
    if arguments.reference is not None:
        contenders.append(reference_contender(arguments.reference, arguments.threads))
    for path in arguments.models:
        contenders.append(onnx_contender(path, arguments.threads, batch=arguments.batch))
        for text, chosen in options.items():
            name = f"{path}, {text}"
            contenders.append(onnx_contender(path, arguments.threads, name, arguments.batch, **chosen))
    peak = peak_contender(arguments.threads)
    clock = perf_counter if arguments.clock == "wall" else thread_time
    race([*contenders, peak], arguments.seconds, clock=clock)
    rows = report(contenders, peak)
    if arguments.json:
        figures = {"threads": arguments.threads, "clock": arguments.clock, "peak_gmac_s": peak.rate / 1e9}
        print(json.dumps({**figures, "rows": rows}, indent=2))
        return 0
    setting = f"{arguments.threads} thread(s), {arguments.clock} clock"
    print(f"{setting}; {_PEAK}: {peak.rate / 1e9:.1f} G multiply-adds/s")
    print("best ms  median ms  times faster (10..90 % of rounds), by best   G/s  share of peak  model")
    for row in rows:
        share = f"{row['gmac_s']:6.1f} {row['share_of_peak']:13.0%}" if "gmac_s" in row else " " * 20
        spread = f"({row['speedup_p10']:.2f}..{row['speedup_p90']:.2f})"
        print(
            f"{row['best_ms']:7.2f} {row['median_ms']:10.2f} {row['speedup']:13.2f} {spread} "
            f"{row['speedup_of_best']:15.2f} {share}  {row['name']}"
        )
    if arguments.nodes:
        for path in arguments.models:
            _print_nodes(path / "search.onnx" if path.is_dir() else path, arguments.threads)
    return 0


def _print_nodes(model: Path, threads: int) -> None:
    kinds: Dict[str, List[float]] = defaultdict(list)
    for operator, _, microseconds in node_times(model, threads):
        kinds[operator].append(microseconds)
    print(f"{model}: {sum(map(sum, kinds.values())):.0f} us in {sum(map(len, kinds.values()))} nodes")
    for operator, times in sorted(kinds.items(), key=lambda kind: -sum(kind[1])):
        print(f"{sum(times):9.0f} us {len(times):4}  {operator}")


if __name__ == "__main__":
    sys.exit(main())
