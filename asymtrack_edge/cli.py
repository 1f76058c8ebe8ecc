"""What all commands share: one clear line for the user's mistakes, exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import Any, Callable, NoReturn, Optional, Sequence

import asymtrack_edge
from asymtrack_edge.errors import AsymTrackError, UsageError


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser with the common look: examples under the options, and ``--version``."""
    made = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"asymtrack-edge {asymtrack_edge.__version__}")
    return made


def run(main: Callable[[argparse.Namespace], Optional[int]], arguments: argparse.Namespace) -> int:
    """Runs a command's body; returns the exit code: 2 for a user's mistake, 130 after Ctrl-C.

    SIGTERM ends the body like Ctrl-C, so that files are closed properly.
    """

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    with suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, interrupt)
    try:
        return main(arguments) or 0
    except AsymTrackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def box_argument(text: str) -> Sequence[float]:
    """Parses ``x,y,w,h``.

    Raises:
        UsageError: not four numbers.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 4:
        raise UsageError(f"--box takes x,y,w,h in pixels, for example 120,80,40,60, not {text!r}")
    return numbers
