"""``asymtrack-bench``: the arguments. ``measure`` implements the subcommands.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import without_secrets

_positive = partial(cli.number, float, 1e-9, 1e9, "number above 0, at most 1e9")
SPEED_PROTOCOLS = ("P1", "P2", "P5", "P6")
EXAMPLES = """
asymtrack-bench speed T                                       everything measurable here, in about a minute
asymtrack-bench speed T --threads 1,2 --protocol P1,P2 --output report
asymtrack-bench speed exports/t-fp16-xavier --backend tensorrt --full
asymtrack-bench speed T --protocol P5 --tracker opencv:CSRT --clip video.mp4 --box 120,80,40,60
asymtrack-bench ab T --reference                              the search step against the reference form in PyTorch
asymtrack-bench ab exports/plain exports/int8                 which of two models is faster
asymtrack-bench ab T --backend onnxruntime,openvino --precision fp32,bf16
asymtrack-bench targets T --counts 1,2,4,8                    several targets in one frame
asymtrack-bench startup T                                     start-up time and memory of a fresh process
asymtrack-bench paper                                         measured speeds beside the paper's Tables 1, 2 and 4
asymtrack-bench energy T                                      joules per frame
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser("asymtrack-bench", "Measure speed by the protocols of docs/benchmarks.md.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, seconds: float = 0.0, what: str = "") -> Any:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if seconds:
            text = f"seconds to measure, {what} (default: {seconds:g})"
            made.add_argument("--seconds", type=_positive, default=seconds, metavar="S", help=text)
        cli.add_json(made)
        made.add_argument("--output", type=Path, metavar="DIR", help="write report.md and report.json")
        return made

    speed = add("speed", "run protocols P1, P2, P5 and P6 on models and backends", 15.0, "per group of cases")
    cli.add_model(speed, positional=True, several=True)
    cli.add_backend(speed, several=True)
    cli.add_clip(speed)
    speed.add_argument("--reference", action="store_true", help="also run P1 and P2 on the reference form in PyTorch")
    text = f"protocols to run, among {', '.join(SPEED_PROTOCOLS)} (default: all)"
    speed.add_argument("--protocol", type=_protocols, default=SPEED_PROTOCOLS, metavar="P1,...", help=text)
    text = "also time other trackers in P5, named as for asymtrack-eval: opencv:... and python:..."
    speed.add_argument("--tracker", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    speed.add_argument("--full", action="store_true", help="make all calls of the protocols; ignores --seconds")

    ab = add("ab", "which of several models or backends is faster; they take turns", 30.0, "in all")
    cli.add_model(ab, positional=True, several=True)
    cli.add_backend(ab, several=True)
    ab.add_argument("--reference", action="store_true", help="compare with the reference form, eager PyTorch in fp32")

    targets = add("targets", "several targets: one call for all against one call each", 40.0, "in all")
    cli.add_model(targets, positional=True)
    cli.add_backend(targets)
    counts: Any = {"type": lambda text: sorted({*map(cli.positive, text.split(","))}), "default": (1, 2, 4, 8)}
    targets.add_argument("--counts", metavar="N,...", help="numbers of targets (default: 1,2,4,8)", **counts)

    startup = add("startup", "start-up time and memory of a new tracking process")
    cli.add_model(startup, positional=True)
    cli.add_backend(startup)
    startup.add_argument("--runs", type=cli.positive, default=5, metavar="N", help="processes to start (default: 5)")

    paper = add("paper", "measured speeds beside the paper's tables", 40.0, "per table")
    cli.add_backend(paper)
    paper.add_argument("--published", action="store_true", help="only print the paper's Tables 1 to 5")

    energy = add("energy", "joules per frame by power rail (P8)", 20.0, "for each of the two runs")
    cli.add_model(energy, positional=True)
    cli.add_backend(energy)
    energy.add_argument("--fps", type=_positive, default=30.0, metavar="N", help="camera's frame rate (default: 30)")
    return parser


def _protocols(text: str) -> Sequence[str]:
    names = tuple(text.upper().split(","))
    if unknown := [name for name in names if name not in SPEED_PROTOCOLS]:
        raise argparse.ArgumentTypeError(f"unknown protocol {unknown[0]!r}: choose among {', '.join(SPEED_PROTOCOLS)}")
    return names


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    arguments = make_parser().parse_args(argv)
    arguments.line = without_secrets(shlex.join(["asymtrack-bench", *(sys.argv[1:] if argv is None else argv)]))
    return cli.run(lambda a: import_module("asymtrack_edge.benchmarks.speed.measure").main(a), arguments)
