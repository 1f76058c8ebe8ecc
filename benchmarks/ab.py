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
from collections import defaultdict
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, Callable, Dict, List, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.ab_options import compared, in_one_thread, parse_options
from asymtrack_edge.benchmarks.contenders import (
    PEAK,
    Contender,
    node_times,
    onnx_contender,
    peak_contender,
    reference_contender,
)
from asymtrack_edge.benchmarks.speed.ratios import speedup
from asymtrack_edge.benchmarks.speed.timing import interleave
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.outputs.progress import TimeBar


def race(contenders: Sequence[Contender], seconds: float, clock: Callable[[], float] = perf_counter) -> None:
    """Times all contenders in turns, for about ``seconds`` in all; fills their ``rounds``.

    Args:
        contenders: at least one.
        seconds: no round begins after this long (there is always one); where fewer than
            ``speed.ratios.LEAST_ROUNDS`` were made by then, half as long again.
        clock: ``time.thread_time`` leaves out the time in which the thread did not run; right only for
            contenders that work in the calling thread alone.
    """
    # Numbered, because the same model may run against itself.
    steps = {str(i): contender.timed(clock) for i, contender in enumerate(contenders)}
    with TimeBar(seconds) as tick:
        measured = interleave(steps, seconds, calls=sys.maxsize, tick=tick)
    for i, contender in enumerate(contenders):
        contender.rounds = measured.samples[str(i)]


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
    if arguments.threads < 1:
        raise UsageError(f"--threads must be at least 1, not {arguments.threads}")
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
    print(f"{setting}; {PEAK}: {peak.rate / 1e9:.1f} G multiply-adds/s")
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
