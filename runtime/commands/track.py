"""``asymtrack-track``: follow objects in a video, a folder of images, a camera or a stream."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

import cv2

from asymtrack_edge import cli
from asymtrack_edge.errors import SourceError, UsageError, require, without_secrets
from asymtrack_edge.files import IMAGE_SUFFIXES, descriptor_of, printable
from asymtrack_edge.geometry import check_box
from asymtrack_edge.runtime.outputs import Sink
from asymtrack_edge.runtime.outputs.pictures import StripWriter, VideoWriter, Window, check_display, video_rate
from asymtrack_edge.runtime.outputs.rows import Progress, RowWriter, csv_header, csv_rows, open_sender
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.sources import open_source
from asymtrack_edge.runtime.sources.reader import Reader
from asymtrack_edge.runtime.tracker import MultiTracker

EXAMPLES = """
asymtrack-track video.mp4 --box 120,80,40,60 --output tracked.mp4 --boxes boxes.csv
asymtrack-track frames/ --box 120,80,40,60 --box 300,90,35,50 --model exports/asymtrack-t-fp16
asymtrack-track 0 --select --show
asymtrack-track rtsp://192.168.1.20/stream --web 8080
asymtrack-track 'csi://0?width=1280&height=720&fps=60' --web 8080 --host 0.0.0.0
asymtrack-track 0 --box 120,80,40,60 --send udp://127.0.0.1:5005
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    parser = cli.parser("asymtrack-track", "Follow objects from frame to frame.", EXAMPLES)
    sources = "a video file, a folder of images, a camera (0, /dev/video0, csi://0), a URL (rtsp://, http://), or a "
    parser.add_argument("source", help=sources + "GStreamer pipeline")
    add = parser.add_argument_group("targets").add_argument
    target = "a target in the first frame; repeatable"
    add("--box", type=cli.box_argument, action="append", default=[], metavar="x,y,w,h", help=target)
    add("--select", action="store_true", help="draw the target with the mouse")
    published = "track exactly as published: do not search for lost targets"
    add("--no-recover", dest="recover", action="store_false", help=published)
    group = parser.add_argument_group("model")
    cli.add_model(group)
    cli.add_backend(group)
    group = parser.add_argument_group("outputs")
    add = group.add_argument
    add("--output", type=Path, metavar="FILE", help="annotated video (.mp4, .mkv or .avi)")
    columns = "boxes as CSV: frame,x,y,w,h,score,state; with several --box or --web also target; - for stdout"
    add("--boxes", type=Path, metavar="FILE", help=columns)
    add("--pts", action="store_true", help="add a last column to --boxes: the frame's time in the source, in seconds")
    add("--strip", type=Path, metavar="FILE", help="picture of six annotated frames side by side")
    places = "send a JSON object per frame to - (stdout), udp://host:port or a .jsonl file; repeatable"
    add("--send", action="append", default=[], metavar="WHERE", help=places)
    add("--show", action="store_true", help="show the tracked video in a window; q or closing it ends the run")
    cli.add_json(group)
    add = parser.add_argument_group("web view").add_argument
    add("--web", type=int, metavar="PORT", help="serve a web page to watch the run and draw targets")
    add("--host", help="address to serve the page on (default: this machine only)")
    add = parser.add_argument_group("run").add_argument
    add("--max-frames", type=int, metavar="N", help="stop after this many frames")
    silence = "give up a camera or stream after this many seconds without a frame; 0: never (default: 30)"
    add("--patience", type=float, default=30.0, metavar="S", help=silence)
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    _check(arguments)
    boxes: List[Sequence[float]] = arguments.box
    with ExitStack() as stack:
        names = ("model", "backend", "device", "threads", "precision", "recover")
        chosen = {name: getattr(arguments, name) for name in names}
        tracker = stack.enter_context(MultiTracker.load(**chosen, capacity=max(1, len(boxes))))
        reader = Reader(open_source(arguments.source), arguments.patience or None, cli.say)
        run = Run(tracker, reader, arguments.max_frames, cli.say)
        signals = stack.enter_context(_completed(run))
        first = run.first_frame()
        if arguments.select:
            boxes = [cv2.selectROI("Draw the target, then press Enter", first, showCrosshair=False)]
            cv2.destroyAllWindows()
        for box in boxes:
            check_box(box, first.shape)  # before any file is created
        for sink in _sinks(arguments, run, len(boxes), first.shape):
            run.sinks.append(sink)  # one by one: those already open are closed if one cannot be opened
        run.start(boxes)
        run.paused = not boxes and not reader.source.live  # a file waits for the first box
        with suppress(KeyboardInterrupt):
            try:
                run.follow()
            except SourceError as error:  # the outputs and the summary are still completed
                run.fail(f"error: {error}")
                run.end()
            if arguments.web is not None and not run.ended:
                cli.say("no more frames; the page stays until Ctrl-C or its End run button")
                run.linger()
        if signals:
            cli.say("interrupted: completing the files")
    _print_summary(arguments, run)
    if run.failures:
        return 2
    return 128 + signals[0] if signals else 0 if run.whole else 1


def _check(arguments: argparse.Namespace) -> None:
    """Checks the arguments as far as possible without opening anything."""
    marked, limit, web = arguments.box or arguments.select, arguments.max_frames, arguments.web
    if str(arguments.boxes) == "-":
        arguments.boxes = Path("/dev/stdout")
    wrong = {
        "--max-frames must be at least 2: the target is marked in the first frame": limit is not None and limit < 2,
        "--patience takes a number of seconds; 0 waits forever": not arguments.patience >= 0,
        "--box and --select exclude each other": arguments.box and arguments.select,
        "mark a target with --box x,y,w,h or --select, or use --web to draw one": not marked and web is None,
        f"--web takes a port in 0..65535, not {web}": web is not None and not 0 <= web <= 65535,
        "--boxes and --send are both stdout": "-" in arguments.send and descriptor_of(arguments.boxes) == 1,
        "--pts needs --boxes FILE": arguments.pts and not arguments.boxes,
        "--boxes writes CSV: for JSON use --send FILE.jsonl": str(arguments.boxes).endswith((".json", ".jsonl")),
        "--host needs --web PORT": arguments.host is not None and web is None,
    }
    for problem, holds in wrong.items():
        if holds:
            raise UsageError(problem)
    outputs = [arguments.output, arguments.boxes, arguments.strip, arguments.json, *arguments.send]
    files = [output for output in outputs if output not in (None, "-") and "://" not in str(output)]
    places = [os.path.realpath(output) for output in files]
    # A picture written into the source's folder would be part of the source in the next run.
    folders = [os.path.dirname(place) for place in places if place.lower().endswith(IMAGE_SUFFIXES)]
    for place in (*places, *folders):
        with suppress(OSError):
            if os.path.samefile(arguments.source, place):
                raise UsageError(f"{printable(place)} is the source itself: write somewhere else")
    for place in places:
        if places.count(place) > 1 and (os.path.isfile(place) or not os.path.exists(place)):
            raise UsageError(f"two outputs would write {without_secrets(printable(place))}: give each its own file")
    if arguments.select:
        check_display("--select", "give the target with --box x,y,w,h, or draw it with --web 8080")
    if arguments.show:
        check_display("--show", "use --web 8080 or --output FILE instead")


@contextmanager
def _completed(run: Run) -> Iterator[List[int]]:
    """Completes the outputs whatever happens; yields a list that gets the number of the signal that ends the run."""
    signals: List[int] = []
    ignored = ExitStack()

    def once(number: int, _: Any) -> NoReturn:
        # First of all: the next signal may arrive before any other line runs.
        ignored.enter_context(cli.handled_signals(signal.SIG_IGN))
        signals.append(number)
        run.end()  # an exception alone can be lost, for example in a destructor
        raise KeyboardInterrupt(number)

    with cli.handled_signals(once), ignored:
        try:
            yield signals
        finally:
            ignored.enter_context(cli.handled_signals(signal.SIG_IGN))
            run.close()


def _sinks(arguments: argparse.Namespace, run: Run, count: int, shape: Tuple[int, ...]) -> Iterator[Sink]:
    length = run.reader.source.length
    if arguments.max_frames is not None:
        length = min(arguments.max_frames, length or arguments.max_frames)
    if arguments.boxes:
        columns = {"several": count > 1 or arguments.web is not None, "pts": arguments.pts}
        yield RowWriter(arguments.boxes, partial(csv_rows, **columns), csv_header(**columns))
    if arguments.strip:
        yield StripWriter(arguments.strip, length)
    for where in arguments.send:
        yield open_sender(where)
    if arguments.show:
        yield Window()
    if arguments.web is not None:
        module = require("asymtrack_edge.runtime.web.view", "web", "the web view")
        view = module.WebView(run, arguments.web, arguments.host or "127.0.0.1")
        cli.say(f"watch and draw at {view.url}")
        yield view
    if arguments.output:  # last: an output that is not a plain file is written from here on
        if arguments.source.startswith("jetson://"):
            from asymtrack_edge.runtime.jetson import JetsonWriter

            yield JetsonWriter(arguments.output)
        else:
            yield VideoWriter(arguments.output, run.reader.source.fps, shape)
    if sys.stderr.isatty():
        yield Progress(length)


def _print_summary(arguments: argparse.Namespace, run: Run) -> None:
    summary = run.summary()
    text = json.dumps(summary) if arguments.json == "-" else _summary_text(summary)
    source, rate = run.reader.source, video_rate(run.reader.source.fps)
    differs = summary["variable_rate"] or (source.live and abs(summary["fps"] / rate - 1) > 0.1)
    if arguments.output and differs and not arguments.source.startswith("jetson://"):
        cli.say(f"{printable(arguments.output)} plays at a constant {rate:g} fps, but the frames came at another rate")
    if summary["variable_rate"] and arguments.boxes and not arguments.pts:
        cli.say(f"the frame rate varies: --pts adds the frames' times to {printable(arguments.boxes)}")
    # If results go to stdout, the summary must not.
    taken = "-" in arguments.send or descriptor_of(arguments.boxes) == 1
    try:
        print(text, file=sys.stderr if taken else sys.stdout, flush=True)
    finally:  # even if printing fails
        if arguments.json != "-":
            cli.write_json(arguments.json, summary)


def _summary_text(summary: Dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {value:.2f}" for name, value in summary["milliseconds"].items())
    text = f"{summary['frames']} frames at {summary['fps']} fps, target lost in {summary['lost']} of them"
    if summary["unreadable"]:
        text += f", {summary['unreadable']} unreadable"
    if "missing" in summary:
        cut = " (the file is truncated or damaged)" if summary["damaged"] else ""
        text += (f", {summary['missing']} fewer than announced" if summary["missing"] else "") + cut
    if "dropped" in summary:
        text += f"\n{summary['dropped']} dropped, none older than {summary['worst_age_ms']:.0f} ms when taken"
    alone = f"update alone {summary['update_fps']} fps on " if summary["update_fps"] is not None else ""
    return f"{text}\n{alone}{summary['backend']}\nms per frame: {stages}"
