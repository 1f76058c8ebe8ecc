"""``asymtrack-track``: follow an object in a video, a folder of images or a camera."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.errors import FrameError, SourceError, UsageError
from asymtrack_edge.geometry import Box, check_box, check_frame
from asymtrack_edge.runtime.drawing import draw_track
from asymtrack_edge.runtime.loading import BACKENDS
from asymtrack_edge.runtime.outputs import BoxWriter, VideoWriter
from asymtrack_edge.runtime.progress import Progress
from asymtrack_edge.runtime.sources import Source, open_source
from asymtrack_edge.runtime.tracker import State, Track, Tracker

EXAMPLES = """
asymtrack-track video.mp4 --box 120,80,40,60 --output tracked.mp4 --boxes boxes.csv
asymtrack-track frames/ --box 120,80,40,60 --model exports/asymtrack-t-fp16
asymtrack-track 0 --select --show
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser("asymtrack-track", "Follow an object from frame to frame.", EXAMPLES)
    parser.add_argument("source", help="a video file, a folder of images, or a camera's index")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--box", metavar="x,y,w,h", help="the target in the first frame, in pixels")
    target.add_argument("--select", action="store_true", help="draw the target with the mouse")
    parser.add_argument("--model", default="T", metavar="T|S|B|DIR", help="bundled weights or an export directory")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="inference backend (default: auto)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="GPU index (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="annotated video (.mp4)")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="boxes as csv: frame,x,y,w,h,score,state")
    parser.add_argument("--strip", type=Path, metavar="FILE", help="picture of six annotated frames side by side")
    parser.add_argument("--show", action="store_true", help="show the tracked video in a window; q ends")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after this many frames")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.max_frames is not None and arguments.max_frames < 2:
        raise UsageError("--max-frames must be at least 2: the target is marked in the first frame")
    box = None if arguments.box is None else cli.box_argument(arguments.box)
    tracker = Tracker.load(arguments.model, arguments.backend, arguments.device, arguments.threads)
    with ExitStack() as stack:
        source = stack.enter_context(open_source(arguments.source))
        frames = iter(source)
        first = _first_frame(frames, source)
        start = check_box(box, first.shape) if box is not None else _select(first)
        run = _Run(arguments, source, stack)
        tracker.init(first, start)
        run.take(first, Track(start, 1.0, State.TRACKING))
        try:
            _follow(tracker, frames, run, arguments.max_frames)
        except KeyboardInterrupt:
            print("interrupted: completing the files", file=sys.stderr)
    summary = run.summary(tracker)
    print(json.dumps(summary) if arguments.json else _sentence(summary))
    return 0


def _first_frame(frames: Any, source: Source) -> np.ndarray:
    for frame in frames:
        if frame is None:
            raise FrameError(f"the first frame of {source.name} cannot be read: the target is marked in it")
        return check_frame(frame)
    raise SourceError(f"{source.name} has no frames")


def _select(frame: np.ndarray) -> Box:
    try:
        box = cv2.selectROI("Draw the target, then press Enter", frame, showCrosshair=False)
        cv2.destroyAllWindows()
    except cv2.error:
        raise UsageError("--select needs a display: give the target with --box x,y,w,h instead") from None
    return check_box(box, frame.shape)


def _follow(tracker: Tracker, frames: Any, run: _Run, limit: Optional[int]) -> None:
    while limit is None or run.count < limit:
        began = perf_counter()
        try:
            frame = next(frames)
        except StopIteration:
            return
        run.read_seconds += perf_counter() - began
        try:
            track = tracker.update(frame)
        except FrameError:
            run.skip()
            continue
        if run.take(frame, track):
            return


class _Run:
    """Writes the outputs of a run and counts for its summary."""

    def __init__(self, arguments: argparse.Namespace, source: Source, stack: ExitStack) -> None:
        self.count = self.unreadable = self.lost = 0
        self.read_seconds = 0.0
        self.show = arguments.show
        self.strip_path: Optional[Path] = arguments.strip
        length = source.length
        if arguments.max_frames is not None:
            length = min(arguments.max_frames, length or arguments.max_frames)
        self.strip_every = max(1, (length or 120) // 6)
        self.strip: List[np.ndarray] = []
        self.boxes = self.video = None
        if arguments.boxes:
            self.boxes = BoxWriter(arguments.boxes)
            stack.callback(self.boxes.close)
        if arguments.output:
            self.video = VideoWriter(arguments.output, source.fps)
            stack.callback(self.video.close)
        stack.callback(self._save_strip)
        self.progress = Progress(length)
        stack.callback(self.progress.close)
        self.began = perf_counter()

    def take(self, frame: np.ndarray, track: Track) -> bool:
        """Records a tracked frame; returns whether the user asked to end."""
        if self.boxes:
            self.boxes.write(self.count, track)
        self.lost += track.state is State.LOST
        wanted = self.strip_path is not None and self.count % self.strip_every == 0 and len(self.strip) < 6
        ended = False
        if self.video or self.show or wanted:
            picture = frame.copy()
            draw_track(picture, track)
            if self.video:
                self.video.write(picture)
            if wanted:
                self.strip.append(picture)
            if self.show:
                ended = self._display(picture)
        self.count += 1
        self.progress.step(f"score {track.score:.2f} {track.state.value}")
        return ended

    def skip(self) -> None:
        """Counts a frame that could not be used; it has no row in the csv."""
        self.count += 1
        self.unreadable += 1
        self.progress.step("unreadable frame")

    def _display(self, picture: np.ndarray) -> bool:
        try:
            cv2.imshow("asymtrack-track", picture)
            return cv2.waitKey(1) & 0xFF == ord("q")
        except cv2.error:
            raise UsageError("--show needs a display: use --output FILE instead") from None

    def _save_strip(self) -> None:
        if self.strip_path is not None and self.strip:
            height = min(p.shape[0] for p in self.strip)
            tiles = [cv2.resize(p, (round(p.shape[1] * height / p.shape[0]), height)) for p in self.strip]
            if not cv2.imwrite(str(self.strip_path), np.concatenate(tiles, 1)):
                raise SourceError(f"cannot write {self.strip_path}: is it a .png or .jpg in an existing folder?")

    def summary(self, tracker: Tracker) -> Dict[str, Any]:
        """Counts and speeds: frames per second of the whole run, and milliseconds per frame by stage."""
        updates = max(1, self.count - 1 - self.unreadable)
        stages = {"read": self.read_seconds, **tracker.seconds}
        per_frame: List[Tuple[str, float]] = [(name, 1000 * s / updates) for name, s in stages.items()]
        inside = sum(tracker.seconds.values())
        return {
            "frames": self.count,
            "unreadable": self.unreadable,
            "lost": self.lost,
            "fps": round(self.count / max(1e-9, perf_counter() - self.began), 1),
            "update_fps": round(updates / max(1e-9, inside), 1),
            "milliseconds": {name: round(value, 3) for name, value in per_frame},
            "backend": tracker.engine.name,
        }


def _sentence(summary: Dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {value:.2f}" for name, value in summary["milliseconds"].items())
    unreadable = f", {summary['unreadable']} unreadable" if summary["unreadable"] else ""
    return (
        f"{summary['frames']} frames at {summary['fps']} fps{unreadable} (update alone {summary['update_fps']} fps on "
        f"{summary['backend']}; ms per frame: {stages}); lost in {summary['lost']} frames"
    )


if __name__ == "__main__":
    sys.exit(main())
