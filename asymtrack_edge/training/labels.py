"""Pseudo-labels: boxes on unlabelled video, kept where tracking forward and backward agree."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import cv2
import numpy as np

from asymtrack_edge.cluster import needs_gpu, spread
from asymtrack_edge.errors import AsymTrackError, BoxError, DatasetError
from asymtrack_edge.files import open_video, printable, write_bytes
from asymtrack_edge.geometry import iou
from asymtrack_edge.training.imagery import VIDEO_SUFFIXES, files_under
from asymtrack_edge.training.log import Progress, silent
from asymtrack_edge.training.state import save_json

DONE = "videos.json"


class BoxTracker(Protocol):
    """What ``asymtrack_edge.runtime.Tracker`` offers, as far as it is needed here."""

    def init(self, frame: np.ndarray, box: Sequence[float]) -> Any:
        """Starts on a BGR frame and a box x, y, w, h in pixels."""

    def update(self, frame: np.ndarray) -> Any:
        """Finds the target in the next frame; the answer has a ``box``."""


@dataclass(frozen=True)
class LabelOptions:
    """How clips are cut and which tracks are kept.

    Attributes:
        frames: per clip.
        stride: every how many-th frame of a video is taken.
        clips: most clips per video, spread evenly.
        tracks: most objects per clip.
        side: frames are shrunk to this many pixels on their long side.
        mean_agreement, least_agreement: IoU of the forward and the backward box that a track must
            reach over all frames and in each.
        seed: decides which regions are tried.
    """

    frames: int = 16
    stride: int = 3
    clips: int = 20
    tracks: int = 3
    side: int = 320
    mean_agreement: float = 0.75
    least_agreement: float = 0.5
    seed: int = 0


def forward_backward(
    tracker: BoxTracker, frames: Sequence[np.ndarray], box: Sequence[float]
) -> Tuple[List[List[float]], List[float]]:
    """Tracks ``box`` through ``frames`` and back to the first.

    Args:
        tracker: started anew in either direction.
        frames: BGR uint8, two or more.
        box: x, y, w, h in the first frame, in pixels.

    Returns:
        The forward boxes, one per frame, and for each frame the IoU with the box found on the way
        back; all zeros where the tracker refused a box.
    """
    try:
        forward = [list(map(float, box))]
        tracker.init(frames[0], forward[0])
        forward += [list(map(float, tracker.update(frame).box)) for frame in frames[1:]]
        backward = [forward[-1]]
        tracker.init(frames[-1], forward[-1])
        backward += [list(map(float, tracker.update(frame).box)) for frame in frames[-2::-1]]
    except BoxError:
        return [list(map(float, box))] * len(frames), [0.0] * len(frames)
    return forward, [iou(a, b) for a, b in zip(forward, reversed(backward))]


def propose_regions(frames: Sequence[np.ndarray], count: int, random: np.random.Generator) -> List[List[float]]:
    """Regions of the first frame that stand out by texture and movement from what surrounds them.

    Args:
        frames: BGR uint8, at least one.
        count: most regions; they hardly overlap.
        random: decides which are tried.

    Returns:
        Boxes x, y, w, h in pixels, the most salient first.
    """
    grey = cv2.cvtColor(frames[0], cv2.COLOR_BGR2GRAY)
    later = cv2.cvtColor(frames[min(2, len(frames) - 1)], cv2.COLOR_BGR2GRAY)
    edges = cv2.convertScaleAbs(cv2.Laplacian(cv2.GaussianBlur(grey, (5, 5), 0), cv2.CV_16S))
    sums = cv2.integral(edges.astype(np.float32) + 2.0 * cv2.absdiff(grey, later))
    height, width = grey.shape

    def mean(x: int, y: int, w: int, h: int) -> float:
        x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + w), min(height, y + h)
        return float(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / max(1, (x1 - x0) * (y1 - y0))

    scored = []
    for _ in range(40 * count):
        extent = min(width, height) * random.uniform(0.1, 0.4)
        aspect = float(np.exp(random.normal(0, 0.35)))
        w, h = max(10, round(extent * aspect)), max(10, round(extent / aspect))
        if w >= width or h >= height:
            continue
        x, y = int(random.integers(width - w)), int(random.integers(height - h))
        inside, around = mean(x, y, w, h), mean(x - w // 3, y - h // 3, w + 2 * (w // 3), h + 2 * (h // 3))
        scored.append((inside - around, [float(x), float(y), float(w), float(h)]))
    chosen: List[List[float]] = []
    for score, box in sorted(scored, key=lambda s: -s[0]):
        if score > 0 and len(chosen) < count and all(iou(box, other) < 0.1 for other in chosen):
            chosen.append(box)
    return chosen


def label_clip(
    tracker: BoxTracker, frames: Sequence[np.ndarray], options: LabelOptions, random: np.random.Generator
) -> List[Dict[str, Any]]:
    """The tracks of a clip on which both directions agree, as the collection format has them."""
    tracks = []
    for region in propose_regions(frames, options.tracks, random):
        boxes, agreement = forward_backward(tracker, frames, region)
        if np.mean(agreement) >= options.mean_agreement and min(agreement) >= options.least_agreement:
            tracks.append({"boxes": boxes, "kind": "pseudo", "fb": round(float(np.mean(agreement)), 3)})
    return tracks


def read_clips(path: Path, options: LabelOptions) -> Iterator[List[np.ndarray]]:
    """Clips of a video, BGR uint8, shrunk to ``options.side``.

    Raises:
        DatasetError: OpenCV cannot read the video.
    """
    video = open_video(path)
    try:
        if not video.isOpened():
            raise DatasetError(f"cannot open the video {printable(path)}: convert it to H.264 MP4, or remove it")
        length = options.frames * options.stride
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        every = max(1, total // length // options.clips) if total > 0 else 1
        clip: List[np.ndarray] = []
        number = 0
        while video.grab():
            # Of the clips one after the other every `every`-th is kept.
            if number // length % every == 0 and number % options.stride == 0:
                clip.append(_shrink(video.retrieve()[1], options.side))
                if len(clip) == options.frames:
                    yield clip
                    clip = []
            number += 1
        if number == 0:
            raise DatasetError(f"the video {printable(path)} has no frame that OpenCV can decode: convert or remove it")
        if len(clip) >= 2:
            yield clip
    finally:
        video.release()


def _shrink(frame: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(frame.shape[:2])
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else frame


class Job(NamedTuple):
    """A video to label: its number in the collection, its file, and its name there."""

    number: int
    path: Path
    name: str


class Labelled(NamedTuple):
    """What became of a video: the bytes of a tar of its clips, and their records."""

    archive: bytes
    records: List[Dict[str, Any]]


#: Labels videos; yields what became of each, in their order.
Labeller = Callable[[Sequence[Job]], Iterator[Union[Labelled, AsymTrackError]]]


def label_video(tracker: BoxTracker, options: LabelOptions, job: Job) -> Union[Labelled, AsymTrackError]:
    """Labels one video; an error where it cannot be read."""
    random = np.random.default_rng([options.seed, job.number])
    clips = []
    try:
        for clip in read_clips(job.path, options):
            tracks = label_clip(tracker, clip, options, random)
            if tracks:
                clips.append((clip, tracks))
    except AsymTrackError as error:
        return error
    return _pack(f"clips_{job.number}", job.name, clips)


def label_here(tracker: BoxTracker, options: LabelOptions, jobs: Sequence[Job]) -> Iterator[Any]:
    """A ``Labeller`` that works in this process."""
    return (label_video(tracker, options, job) for job in jobs)


def label_on(ray: Any, load: Mapping[str, Any], options: LabelOptions, jobs: Sequence[Job]) -> Iterator[Any]:
    """A ``Labeller`` that gives each video to a task of a Ray cluster; ``load`` is what ``Tracker.load`` takes."""
    work = partial(_label_there, tuple(load.items()), options)
    gpu = needs_gpu(load["backend"], load["device"])
    ready: Dict[int, Any] = {}
    following = 0
    for i, result in spread(ray, work, str(load["model"]), jobs, load["threads"] or 1, gpu):
        ready[i] = result
        while following in ready:
            yield ready.pop(following)
            following += 1


def _label_there(load: Tuple[Tuple[str, Any], ...], options: LabelOptions, model: Optional[str], job: Job) -> Any:
    return label_video(_tracker(load, model), options, job)


@lru_cache(maxsize=2)
def _tracker(load: Tuple[Tuple[str, Any], ...], model: Optional[str]) -> BoxTracker:
    from asymtrack_edge import Tracker

    return Tracker.load(**{**dict(load), **({"model": model} if model else {})})


def label_videos(folder: Path, label: Labeller, output: Path, progress: Progress = silent) -> int:
    """Turns any folder of videos into a collection; returns how many tracks it has.

    Each finished video is on disk at once, and is skipped when called again. One that cannot be read is named on
    stderr at the end, and tried when called again.

    Args:
        folder: searched with all folders below it.
        label: labels the videos.
        output: where the collection goes.
        progress: wraps the videos to show how far labelling is.

    Raises:
        DatasetError: there is no video, or none can be read.
    """
    videos = files_under(folder, VIDEO_SUFFIXES)
    if not videos:
        raise DatasetError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    output.mkdir(parents=True, exist_ok=True)
    records: List[Dict[str, Any]] = _stored(output / "clips.json", [])
    done: Dict[str, int] = _stored(output / DONE, {})
    first = max(done.values(), default=-1) + 1
    waiting = [(path, path.relative_to(folder).as_posix()) for path in videos]
    waiting = [(path, name) for path, name in waiting if name not in done]
    jobs = [Job(first + i, path, name) for i, (path, name) in enumerate(waiting)]
    failed = []
    for job, result in zip(progress(jobs, "videos"), label(jobs)):
        if isinstance(result, AsymTrackError):
            failed.append(str(result))
            continue
        write_bytes(output / f"clips_{job.number}.tar", result.archive)
        records += result.records
        save_json(output / "clips.json", records)
        done[job.name] = job.number
        save_json(output / DONE, done)
    if failed and not done:
        raise DatasetError(failed[0])
    for reason in failed:
        print(f"left out: {reason}", file=sys.stderr)
    return sum(len(record["tracks"]) for record in records)


def _stored(path: Path, empty: Any) -> Any:
    if not path.is_file():
        return empty
    try:
        return type(empty)(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise DatasetError(f"{path} is not what labelling writes: remove its folder to label again") from None


def _pack(stem: str, source: str, clips: Sequence[Tuple[Sequence[np.ndarray], List[Dict[str, Any]]]]) -> Labelled:
    """Packs the clips of a video into a tar."""
    records, packed = [], io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for i, (frames, tracks) in enumerate(clips):
            names = [f"{stem}/{i:03d}/{k:02d}.jpg" for k in range(len(frames))]
            for name, frame in zip(names, frames):
                fine, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 92])
                if not fine:
                    raise AsymTrackError(f"OpenCV cannot write JPEG images ({name})")
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data.tobytes()))
            records.append({"frames": names, "tracks": tracks, "source": source, "shard": f"{stem}.tar"})
    return Labelled(packed.getvalue(), records)
