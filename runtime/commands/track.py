"""``asymtrack-track``: follow objects in a video, a folder of images, a camera or a stream."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Sequence

import cv2
import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import Box, check_box
from asymtrack_edge.runtime.backends.loading import BACKENDS
from asymtrack_edge.runtime.outputs.files import BoxWriter, Sink, StripWriter, VideoWriter, Window
from asymtrack_edge.runtime.outputs.messages import Result, open_sender
from asymtrack_edge.runtime.outputs.progress import Progress
from asymtrack_edge.runtime.run import Session
from asymtrack_edge.runtime.sources.capture import LivePolicy, Reader, open_reader
from asymtrack_edge.runtime.sources.sources import Source, open_source
from asymtrack_edge.runtime.tracker import MultiTracker

EXAMPLES = """
asymtrack-track video.mp4 --box 120,80,40,60 --output tracked.mp4 --boxes boxes.csv
asymtrack-track frames/ --box 120,80,40,60 --box 300,90,35,50 --model exports/asymtrack-t-fp16
asymtrack-track 0 --select --show
asymtrack-track rtsp://192.168.1.20/stream --web 8080
asymtrack-track 'csi://0?width=1280&height=720&fps=60' --web 8080 --host 0.0.0.0
asymtrack-track 0 --box 120,80,40,60 --send udp://127.0.0.1:5005
"""

_SOURCE_HELP = (
    "a video file, a folder of images, a camera (0, /dev/video0, csi://0), a URL (rtsp://, http://), or a "
    "GStreamer pipeline"
)


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser("asymtrack-track", "Follow objects from frame to frame.", EXAMPLES)
    parser.add_argument("source", help=_SOURCE_HELP)
    add = parser.add_argument_group("targets").add_argument
    add("--box", action="append", metavar="x,y,w,h", help="a target in the first frame; repeatable")
    add("--select", action="store_true", help="draw the target with the mouse")
    add("--no-recover", dest="recover", action="store_false", help="track as published: do not look for a lost target")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="T", metavar="T|S|B|DIR", help="bundled weights or an export (default: T)")
    add("--backend", default="auto", choices=BACKENDS, help="inference backend (default: auto)")
    add("--device", type=cli.device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--precision", choices=cli.PRECISIONS, help="of the arithmetic: bf16 with openvino (default: the model's)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    add = parser.add_argument_group("outputs").add_argument
    add("--output", type=Path, metavar="FILE", help="annotated video (.mp4)")
    add(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="boxes as csv: frame,x,y,w,h,score,state; with several --box or --web a last column target",
    )
    add("--strip", type=Path, metavar="FILE", help="picture of six annotated frames side by side")
    add(
        "--send",
        action="append",
        default=[],
        metavar="WHERE",
        help="a JSON object per frame to - (stdout), udp://host:port or a file .jsonl; repeatable",
    )
    add("--show", action="store_true", help="show the tracked video in a window; q ends")
    add("--json", action="store_true", help="print the summary as JSON")
    add = parser.add_argument_group("web view").add_argument
    add("--web", type=int, metavar="PORT", help="serve a page to watch, and to draw targets on")
    add("--host", default="127.0.0.1", help="address to serve it on (default: this machine only)")
    add = parser.add_argument_group("run").add_argument
    add("--max-frames", type=int, metavar="N", help="stop after this many frames")
    add(
        "--patience",
        type=float,
        default=30.0,
        metavar="S",
        help="give up a camera or stream that is silent for this many seconds; 0: never (default: 30)",
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    boxes = _check(arguments)
    with ExitStack() as stack:
        tracker = MultiTracker.load(
            arguments.model,
            arguments.backend,
            arguments.device,
            arguments.threads,
            arguments.precision,
            arguments.recover,
            capacity=max(1, len(boxes)),
        )
        stack.callback(tracker.close)
        policy = LivePolicy(patience=arguments.patience or None)
        reader = stack.enter_context(open_reader(open_source(arguments.source), policy, _say))
        session = Session(tracker, reader, (), arguments.max_frames, _say)
        stack.enter_context(_completed(session))
        first = session.first_frame()
        if arguments.select:
            boxes = [_select(first)]
        for box in boxes:
            check_box(box, first.shape)  # before any file is made
        for sink in _sinks(arguments, reader, session, len(boxes)):
            session.add_sink(sink)
        session.start(boxes)
        session.paused = not boxes and not reader.source.live  # a file waits for the first box
        try:
            session.run()
            if arguments.web is not None and not session.ended:
                _say("the source has ended; the page stays until Ctrl-C or its End button")
                session.linger()
        except KeyboardInterrupt:
            session.interrupted = True
        if session.interrupted:
            _say("interrupted: completing the files")
    _print_summary(arguments, session)
    return 2 if session.failures else 0


def _check(arguments: argparse.Namespace) -> List[Sequence[float]]:
    """The boxes, after everything that can be wrong without opening anything."""
    if arguments.max_frames is not None and arguments.max_frames < 2:
        raise UsageError("--max-frames must be at least 2: the target is marked in the first frame")
    if arguments.patience < 0:
        raise UsageError("--patience is a number of seconds, 0 for ever")
    if arguments.box and arguments.select:
        raise UsageError("--box and --select exclude each other")
    if not arguments.box and not arguments.select and arguments.web is None:
        raise UsageError("mark a target with --box x,y,w,h or --select, or use --web to draw one")
    if arguments.web is not None and not 0 <= arguments.web <= 65535:
        raise UsageError(f"--web takes a port in 0..65535, not {arguments.web}")
    return [cli.box_argument(text) for text in arguments.box or ()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _completed(session: Session) -> Iterator[None]:
    """Completes the outputs whatever happens; Ctrl-C or SIGTERM meanwhile does not cut that short."""

    def once(*_: Any) -> NoReturn:
        # Here and not later: the next signal may come before any other line of ours runs.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        session.interrupted = True
        session.end()  # an exception alone can be lost, for example in a destructor
        raise KeyboardInterrupt

    before: Dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread: the caller handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, once)
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        try:
            session.close()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _sinks(arguments: argparse.Namespace, reader: Reader, session: Session, count: int) -> Iterator[Sink]:
    """Opens the outputs one by one, so that those already open are completed if one cannot be."""
    source = reader.source
    length = _length(arguments, source)
    if arguments.boxes:
        yield BoxWriter(arguments.boxes, several=count > 1 or arguments.web is not None)
    if arguments.output:
        yield VideoWriter(arguments.output, source.fps)
    if arguments.strip:
        yield StripWriter(arguments.strip, length)
    for where in arguments.send:
        yield open_sender(where)
    if arguments.show:
        yield Window()
    if arguments.web is not None:
        from asymtrack_edge.runtime.web.view import WebView

        view = WebView(session, arguments.web, arguments.host)
        _say(f"watch and draw at {view.url}")
        yield view
    yield _ProgressSink(Progress(length))


def _length(arguments: argparse.Namespace, source: Source) -> Optional[int]:
    if arguments.max_frames is None:
        return source.length
    return min(arguments.max_frames, source.length or arguments.max_frames)


class _ProgressSink(Sink):
    """The progress line."""

    essential = False

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, result: Result) -> None:
        shown = [f"{track.score:.2f} {track.state.value}" for track in list(result.tracks.values())[:3]]
        self._progress.step("score " + ", ".join(shown) if shown else "no target")

    def skip(self, frame: Any) -> None:
        self._progress.step("unreadable frame")

    def close(self) -> None:
        self._progress.close()


def _select(frame: np.ndarray) -> Box:
    try:
        box = cv2.selectROI("Draw the target, then press Enter", frame, showCrosshair=False)
        cv2.destroyAllWindows()
    except cv2.error:
        raise UsageError(
            "--select needs a display: give the target with --box x,y,w,h, or draw it with --web 8080"
        ) from None
    return check_box(box, frame.shape)


def _print_summary(arguments: argparse.Namespace, session: Session) -> None:
    summary = session.summary()
    # Where frames go to stdout, the summary must not follow them there.
    out = sys.stderr if "-" in arguments.send else sys.stdout
    print(json.dumps(summary) if arguments.json else _sentence(summary), file=out)


def _sentence(summary: Dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {value:.2f}" for name, value in summary["milliseconds"].items())
    text = f"{summary['frames']} frames at {summary['fps']} fps"
    if summary["unreadable"]:
        text += f", {summary['unreadable']} unreadable"
    if "dropped" in summary:
        text += f", {summary['dropped']} dropped, none older than {summary['worst_age_ms']:.0f} ms when taken"
    return (
        f"{text} (update alone {summary['update_fps']} fps on {summary['backend']}; ms per frame: {stages}); "
        f"lost in {summary['lost']} frames"
    )


if __name__ == "__main__":
    sys.exit(main())
