"""What all commands share: common options, progress bars and one-line errors.

A user's mistake ends a command with one clear line on stderr and exit code 2, never with a traceback.
Exit code 1 means that the command ran, but that its answer is no or incomplete.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Callable, Iterator, NoReturn, Optional, Sequence

import cv2

import asymtrack_edge
from asymtrack_edge.errors import AsymTrackError, UsageError, without_secrets
from asymtrack_edge.files import check_output, write_text
from asymtrack_edge.names import BACKENDS, PRECISIONS, TRITON


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors that accepts ``--box -5,10,40,60``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Otherwise argparse takes -5,10,40,60 for an option: it begins with a minus and is not a number.
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and one line, shortened because a shell may expand ``*.jpg`` to thousands of names."""
        self.exit(2, f"error: {without_secrets(' '.join(message.split()))[:300]} (see {self.prog} --help)\n")


def parser(prog: str, description: str, examples: str) -> argparse.ArgumentParser:
    """An argument parser with the common layout: examples below the options, and ``--version``."""
    made = Parser(
        prog=prog,
        allow_abbrev=False,
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"asymtrack-edge {asymtrack_edge.__version__}")
    return made


def add_model(parser: Any, positional: bool = False, several: bool = False) -> None:
    """Adds ``args.model``, a bundled variant or a directory; with ``several``, a list, or None if not given."""
    text = "T, S or B for the bundled weights, or a directory written by asymtrack-export"
    text += "" if positional else " (default: T)"
    options: Any = {} if positional else {"default": None if several else "T"}
    if several:
        options.update(nargs="+", action="extend")
    parser.add_argument("model" if positional else "--model", metavar="MODEL", help=text, **options)


def add_backend(parser: Any, several: bool = False) -> None:
    """Adds the options for inference: ``args.backend``, ``.precision``, ``.device`` and ``.threads``.

    With ``several``, ``--backend``, ``--precision`` and ``--threads`` take comma-separated lists, and
    ``args`` holds tuples.
    """

    def add(option: str, one: Callable[[str], Any], metavar: str, text: str, default: Any = None) -> None:
        def convert(value: str) -> Any:
            return tuple(map(one, value.split(","))) if several else one(value)

        more = ",..." if several else ""
        parser.add_argument(option, type=convert, default=default, metavar=metavar + more, help=text)

    names = f"{', '.join(BACKENDS)}, or a Triton server as {TRITON}HOST:8001"
    backend = partial(_word, "|".join((*BACKENDS, f"{TRITON}.*")), f"backend: choose among {names}")
    add("--backend", backend, "NAME", f"{names} (default: auto)", ("auto",) if several else "auto")
    precision = partial(_word, "|".join(PRECISIONS), f"precision: choose among {', '.join(PRECISIONS)}")
    text = "bf16: compute in bf16 (OpenVINO only); fp32, fp16, int8: must match the model (default: the model's own)"
    add("--precision", precision, "NAME", text)
    add_device(parser)
    add("--threads", threads, "N", "CPU threads (default: all available to this process)")


def add_device(parser: Any) -> None:
    """Adds ``args.device``: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``."""
    device = partial(_word, r"auto|cpu|cuda(:\d+)?", "device: choose auto, cpu, cuda or cuda:N")
    text = "auto, cpu, cuda or cuda:N (default: auto)"
    parser.add_argument("--device", type=device, default="auto", metavar="DEVICE", help=text)


def add_clip(parser: Any) -> None:
    """Adds ``args.clip`` and ``args.box``: the user's own video for measuring or verifying."""
    text = "a video or a folder of images; comparisons use the first 48 frames"
    parser.add_argument("--clip", metavar="SOURCE", help=f"{text} (default: a synthetic clip)")
    text = "the target in the clip's first frame, in pixels"
    parser.add_argument("--box", type=box_argument, metavar="x,y,w,h", help=text)


def add_json(parser: Any) -> None:
    """Adds ``args.json``: None, ``"-"`` for stdout, or a file; see ``write_json``."""
    text = "print the result as JSON, or write it to FILE"
    parser.add_argument("--json", nargs="?", const="-", type=_writable, metavar="FILE", help=text)


def write_json(where: Optional[str], document: Any) -> None:
    """Writes a result to the place given with ``--json``, NaN and infinity as null; does nothing for None."""
    known = json.loads(json.dumps(document), parse_constant=lambda name: None)  # NaN, Infinity, -Infinity
    text = json.dumps(known, indent=2) + "\n"
    if where == "-":
        sys.stdout.write(text)
    elif where is not None:
        write_text(where, text)


def _writable(text: str) -> str:
    """Argument type of ``--json``: reports a file that cannot be written before the work begins."""
    if text != "-":
        try:
            check_output(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _word(pattern: str, what: str, text: str) -> str:
    """Argument type, used with ``partial``: text that matches a regular expression."""
    if not re.fullmatch(pattern, text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")
    return text.strip()


def number(kind: Any, low: float, high: float, what: str, text: str) -> Any:
    """Argument type, used with ``partial``: a number of type ``kind`` from ``low`` to ``high``."""
    with suppress(ValueError):
        value = kind(text)
        if low <= value <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a {what}")


positive = partial(number, int, 1, 1 << 20, "whole number from 1 to 1,048,576")
threads = partial(number, int, 1, 1024, "number of threads from 1 to 1024")
seed = partial(number, int, 0, (1 << 63) - 1, "whole number of 0 or more")


def box_argument(text: str) -> Sequence[float]:
    """Argument type of ``--box``: ``x,y,w,h``. Read by the parser, which refuses the rest of a box with spaces."""
    with suppress(ValueError):
        x, y, w, h = map(float, text.split(","))
        return [x, y, w, h]
    raise argparse.ArgumentTypeError(f"a box is x,y,w,h with commas, no spaces, such as 120,80,40,60, not {text!r}")


def say(line: str) -> None:
    """Prints a line for the user on stderr, above a progress bar; drops it if nobody reads stderr any more."""
    from tqdm import tqdm

    # A terminal would obey control characters, which a stranger's file may have in its name.
    line = re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda found: ascii(found[0])[1:-1], line)
    with suppress(OSError):
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def progress(items: Any = None, title: str = "", total: Optional[float] = None, **options: Any) -> Any:
    """A ``tqdm`` bar over ``items``, or one that the caller advances; ``options`` are tqdm's.

    It appears on stderr if that is a terminal, and is removed at the end. Of torchrun's processes only the first
    shows it. Closing the terminal ends only the bar.
    """
    from tqdm import tqdm

    hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: hidden if stderr is not a terminal
    # By itself, tqdm shows nothing on a terminal that does not report its size, such as a serial console.
    width, height = shutil.get_terminal_size()
    defaults = {"leave": False, "file": sys.stderr, "disable": hidden, "ncols": width - 1, "nrows": height}
    return tqdm(items, title, total, **{**defaults, **options})


def _quiet_opencv() -> None:
    """Silences OpenCV and FFmpeg, which print several lines about what they cannot open; commands report it instead.

    Set the variables ``OPENCV_LOG_LEVEL`` and ``OPENCV_FFMPEG_LOGLEVEL`` to see those lines.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" not in os.environ:
        with suppress(AttributeError):  # older versions of OpenCV lack it
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # type: ignore[attr-defined]


class _Lasting(io.FileIO):
    """A standard stream that discards output once its reader is gone, so that the command can finish its files.

    After any other write error it also discards output: otherwise the buffered text would fail again at exit.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def _open_standard_streams() -> None:
    """Opens closed standard streams on /dev/null, so that no file of ours gets their descriptor and their text.

    Output no longer fails once its reader is gone; see ``_Lasting``.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and type(stream) is io.TextIOWrapper:  # not a program's replacement
            stream.flush()
            lasting = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
            buffering = name == "stderr" or stream.line_buffering
            setattr(sys, name, io.TextIOWrapper(lasting, stream.encoding, stream.errors, line_buffering=buffering))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text


@contextmanager
def handled_signals(handler: Any) -> Iterator[None]:
    """Gives SIGINT, SIGTERM and SIGHUP to ``handler`` within the block; ignored signals (nohup) stay ignored."""
    with ExitStack() as afterwards:
        if threading.current_thread() is threading.main_thread():  # else the caller handles signals
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    afterwards.callback(signal.signal, number, signal.signal(number, handler))
        yield


def run(main: Callable[[argparse.Namespace], Optional[int]], arguments: argparse.Namespace) -> int:
    """Runs a command's body; returns the exit code: 2 for a user's mistake, 130 after Ctrl-C.

    SIGTERM and SIGHUP (from a closed terminal) end the body like Ctrl-C, so that files are closed properly; the exit
    code is then 143 or 129. Under nohup, SIGHUP stays ignored.
    """

    def interrupt(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt(number)

    _open_standard_streams()
    _quiet_opencv()
    code = 1
    try:
        with handled_signals(interrupt):
            code = main(arguments) or 0
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        say("interrupted")
        return 128 + int(interruption.args[0] if interruption.args else signal.SIGINT)
    except (AsymTrackError, MemoryError, OSError) as error:
        text = without_secrets(str(error)).replace("\n", " ")
        say(f"error: {text or 'not enough memory'}")
        return 2
    return code
