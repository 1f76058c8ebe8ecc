"""Arguments of ``asymtrack-bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.speed.plan import ALL_BACKENDS
from asymtrack_edge.runtime.backends.loading import BACKENDS

EXAMPLES = """
asymtrack-bench speed --variant T                             everything measurable, under two minutes
asymtrack-bench speed --variant T,S,B --threads 1,2 --protocol P1,P2 --output report
asymtrack-bench speed --backend tensorrt --precision fp16 --full
asymtrack-bench speed --peer opencv:MIL --peer nano=models/nanotrack --protocol P5
asymtrack-bench ab exports/plain exports/merged               which of two exports is faster
asymtrack-bench ab T --backend onnxruntime,openvino           which of two backends
asymtrack-bench targets --counts 1,2,4,8                      several targets in one frame
asymtrack-bench profile --variant T                           where the time goes, layer by layer
asymtrack-bench startup --variant T                           start-up time and memory of a fresh process
asymtrack-bench paper                                         measured beside the paper's Tables 1, 2 and 4
asymtrack-bench energy --variant T                            joules per frame (Jetson, or readable counters)
asymtrack-bench report a.json b.json --output report          one report of several machines
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser(
        "asymtrack-bench", "Measure speed by named protocols (docs/benchmarks.md explains them).", EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    speed = _add(commands, "speed", "protocols P1 to P7 on any backends, side by side")
    _model_options(speed, several=True)
    speed.add_argument("--backend", metavar="A,B", help=f"of {', '.join(ALL_BACKENDS)} (default: all here)")
    speed.add_argument("--precision", default="fp32", metavar="A,B", help="of exported models: fp32, fp16")
    speed.add_argument("--threads", metavar="N,M", help="CPU threads to try (default: the runtime's own choice)")
    speed.add_argument("--batch", default="1", metavar="N,M", help="crops in one call to try (default: 1)")
    speed.add_argument("--protocol", default="P1,P2,P3,P4,P5,P6,P7", metavar="A,B", help="default: P1 to P7")
    speed.add_argument("--peer", action="append", default=[], metavar="NAME", help="opencv:MIL, name=DIR or name=FILE")
    speed.add_argument("--video", metavar="SOURCE", help="for P5 and P6 (default: a synthetic 1280x720 clip)")
    speed.add_argument("--box", metavar="x,y,w,h", help="the target in the video's first frame")
    speed.add_argument("--dataset", metavar="NAME=DIR", help="for P7, for example otb=/data/OTB100")
    speed.add_argument("--full", action="store_true", help="all calls of the protocols, however long it takes")
    _time_options(speed, 15.0, "per group of candidates")

    ab = _add(commands, "ab", "which of several exports or backends is faster, taking turns")
    ab.add_argument("models", nargs="+", metavar="MODEL", help="T, S, B or export directories; the first is the base")
    ab.add_argument("--backend", default="onnxruntime", metavar="A,B", help=f"of {', '.join(BACKENDS)}")
    ab.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    ab.add_argument("--device", type=int, default=0, metavar="N", help="GPU index")
    ab.add_argument("--reference", action="store_true", help="put the published form in PyTorch first")
    _time_options(ab, 30.0, "in all")

    targets = _add(commands, "targets", "several targets: one call for all against one each")
    _model_options(targets)
    targets.add_argument("--counts", default="1,2,4,8", metavar="N,M", help="default: 1,2,4,8")
    _one_backend(targets)
    targets.add_argument("--precision", default="fp32", choices=("fp32", "fp16"))
    _time_options(targets, 40.0, "in all")

    profile = _add(commands, "profile", "time of each layer of the search network")
    _model_options(profile)
    profile.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    profile.add_argument("--trtexec", type=Path, metavar="FILE", help="read what trtexec --exportProfile wrote instead")
    _outputs(profile)

    startup = _add(commands, "startup", "start-up time and memory of a fresh tracking process")
    _model_options(startup)
    _one_backend(startup)
    startup.add_argument("--runs", type=int, default=5, metavar="N", help="processes to start (default: 5)")
    _outputs(startup)

    paper = _add(commands, "paper", "measured speeds beside the paper's tables")
    paper.add_argument("--variant", default="T,S,B", metavar="A,B", help="default: T,S,B")
    paper.add_argument("--table", default="1,4", metavar="A,B", help="to measure: 1 (with 2) and 4 (default: both)")
    paper.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    paper.add_argument("--published", action="store_true", help="only print the paper's Tables 1 to 5")
    paper.add_argument("--from", dest="source", type=Path, metavar="FILE", help="rows measured before, for Table 1")
    _time_options(paper, 40.0, "per table and form")

    energy = _add(commands, "energy", "joules per frame by rail (P8)")
    _model_options(energy)
    _one_backend(energy)
    energy.add_argument("--fps", type=float, default=30.0, metavar="N", help="camera to imitate (default: 30)")
    _time_options(energy, 20.0, "for each way of running")

    report = _add(commands, "report", "one report of files written with --json")
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    _outputs(report)
    return parser


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return made


def _model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    what = "which models" if several else "which model"
    parser.add_argument("--variant", default="T", metavar="A,B" if several else "{T,S,B}", help=f"{what} (default: T)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an export directory instead")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="GPU index (default: 0)")


def _one_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="onnxruntime", choices=BACKENDS, help="default: onnxruntime")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")


def _time_options(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    parser.add_argument("--seconds", type=float, default=default, metavar="S", help=f"{what} (default: {default:g})")
    _outputs(parser)


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the document to FILE, or print it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write a report: JSON, CSV, Markdown, plots, HTML")
