"""``asymtrack-build``: engines for an existing export, on the device that will run them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.backends.tensorrt.build import build_in_place
from asymtrack_edge.runtime.backends.tensorrt.builder import EngineOptions

EXAMPLES = """
asymtrack-build asymtrack-t-fp16-xavier
asymtrack-build asymtrack-t-fp16-orin --rebuild --workspace 1024
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser(
        "asymtrack-build",
        "Build the TensorRT engines of an export directory for this machine's GPU. Needs TensorRT and numpy; "
        "neither torch nor onnx.",
        EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="written by asymtrack-export, copied here")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="which GPU (default: 0)")
    parser.add_argument("--rebuild", action="store_true", help="build even what is there and still fits")
    parser.add_argument(
        "--workspace", type=int, default=512, metavar="MB", help="scratch memory for one layer (default: 512)"
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        metavar="0..5",
        help="0 builds fast, 5 runs fast (TensorRT 8.6 and newer)",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.workspace < 1:
        raise UsageError(f"--workspace takes MiB, at least 1, not {arguments.workspace}")
    if arguments.optimization_level is not None and not 0 <= arguments.optimization_level <= 5:
        raise UsageError(f"--optimization-level lies in 0..5, not {arguments.optimization_level}")
    options = EngineOptions(arguments.workspace, arguments.optimization_level, arguments.rebuild)

    def report(line: str) -> None:
        print(f"  {arguments.folder}/{line}", flush=True)

    build_in_place(arguments.folder, options, arguments.device, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
