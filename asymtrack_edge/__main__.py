"""``asymtrack``, also ``python -m asymtrack_edge``: the seven commands behind one name."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import SimpleNamespace
from typing import Dict, Optional, Sequence, Tuple

import asymtrack_edge

#: Module and purpose of each command.
COMMANDS: Dict[str, Tuple[str, str]] = {
    "export": ("asymtrack_edge.export.command", "export a checkpoint to verified ONNX models and engines"),
    "build": ("asymtrack_edge.runtime.commands.build", "build TensorRT engines on the device that runs them"),
    "check": ("asymtrack_edge.runtime.commands.check", "compare a backend on this device with the verified model"),
    "track": ("asymtrack_edge.runtime.commands.track", "follow objects in videos, cameras and streams"),
    "bench": ("asymtrack_edge.benchmarks.speed.command", "measure speed, energy and memory"),
    "eval": ("asymtrack_edge.benchmarks.accuracy.command", "measure accuracy on data sets"),
    "train": ("asymtrack_edge.training.command", "train, fine-tune and label videos"),
}


def run(name: str, arguments: Optional[Sequence[str]] = None) -> int:
    """Runs a command, by default with the process's arguments; returns its exit code."""
    try:
        # Each command imports only what it needs: torch alone takes seconds.
        module = importlib.import_module(COMMANDS[name][0])
    except ImportError as error:
        if "cannot open shared object file" not in str(error):
            raise
        advice = "install this library (for OpenCV on Debian and Ubuntu: apt install libgl1 libglib2.0-0)"
        print(f"error: {error}: {advice}", file=sys.stderr)
        return 2
    return int(module.main(arguments))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; without arguments it lists the commands."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return run(name, arguments)
    if name == "--version":
        print(f"asymtrack-edge {asymtrack_edge.__version__}")
    elif name in ("-h", "--help"):
        lines = [f"  {command:8}{purpose}" for command, (_, purpose) in COMMANDS.items()]
        last = "asymtrack COMMAND --help explains a command; asymtrack-COMMAND is the same command."
        print("usage: asymtrack COMMAND ...\n", *lines, f"\n{last}", sep="\n")
    else:
        print(f"error: there is no command {name!r}: choose among {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return 0


#: What ``asymtrack-COMMAND`` calls.
scripts = SimpleNamespace(**{name: partial(run, name) for name in COMMANDS})


if __name__ == "__main__":
    sys.exit(main())
