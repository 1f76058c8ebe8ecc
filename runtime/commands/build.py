"""``asymtrack-build``: build the engines of an existing export, on the device that will run them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.backends.base import device_index
from asymtrack_edge.runtime.backends.tensorrt.build import WORKSPACE_MB, build_in_place
from asymtrack_edge.variants import VARIANTS

EXAMPLES = """
asymtrack-build asymtrack-t-fp16-xavier
asymtrack-build asymtrack-t-fp16-orin --rebuild --workspace 1024
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    text = "Build the TensorRT engines of a model for this machine's GPU. Needs TensorRT, but neither torch nor onnx."
    parser = cli.parser("asymtrack-build", text, EXAMPLES)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory written by asymtrack-export --target")
    cli.add_device(parser)
    add("--rebuild", action="store_true", help="rebuild engines even if they still fit")
    text = f"maximum scratch memory per layer, in MiB (default: {WORKSPACE_MB})"
    add("--workspace", type=cli.positive, default=WORKSPACE_MB, metavar="MB", help=text)
    cli.add_json(parser)
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> None:
    name = arguments.model.upper()
    if name in VARIANTS and not Path(arguments.model).exists():
        raise UsageError(
            f"{name} is not a directory: export a model for TensorRT with "
            f"asymtrack-export --variant {name} --target orin (or xavier, rtx) and give its directory"
        )

    def report(line: str) -> None:
        if arguments.json is None:
            print(f"  {arguments.model}/{line}", flush=True)

    device, workspace, rebuild = device_index(arguments.device), arguments.workspace, arguments.rebuild
    manifest = build_in_place(Path(arguments.model), report, device=device, workspace_mb=workspace, rebuild=rebuild)
    cli.write_json(arguments.json, {"engines": manifest.engines})
