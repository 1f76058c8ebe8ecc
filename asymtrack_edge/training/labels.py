"""Pseudo-labels: boxes on unlabelled video, kept where forward and backward tracking agree."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import cv2
import numpy as np

import asymtrack_edge
from asymtrack_edge import cli
from asymtrack_edge.errors import AsymTrackError, BoxError, DatasetError, UsageError
from asymtrack_edge.files import check_folder, open_video, printable, write_bytes, write_text
from asymtrack_edge.geometry import iou
from asymtrack_edge.training.imagery import files_under, read_records, shrink

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".mts", ".wmv", ".flv", ".3gp")

#: A clip has ``FRAMES`` frames, every ``STRIDE``-th of the video. A long video gives ``CLIPS`` to twice as many.
FRAMES, STRIDE, CLIPS = 16, 3, 20
LONGEST_GAP = 1000  #: a video is given up after this many successive frames that cannot be decoded
#: Frames are shrunk to this many pixels on their long side.
SIDE = 320
#: Most objects per clip, and the IoU of forward and backward boxes that they need: on average, and in each frame.
TRACKS, MEAN_AGREEMENT, LEAST_AGREEMENT = 3, 0.75, 0.5


def forward_backward(tracker: Any, frames: Sequence[np.ndarray], box: Sequence[float]) -> Tuple[List[Any], List[float]]:
    """Tracks ``box`` (x, y, w, h) through ``frames`` (BGR uint8) and back to the first.

    ``tracker`` has ``init`` and ``update`` like ``asymtrack_edge.Tracker``. Returns the forward boxes, one per frame,
    and the IoU of each with its backward box; all IoUs are zero if the tracker refused a box.
    """
    forward = [list(map(float, box))]
    try:
        tracker.init(frames[0], forward[0])
        forward += [list(map(float, tracker.update(frame).box)) for frame in frames[1:]]
        backward = [forward[-1]]
        tracker.init(frames[-1], forward[-1])
        backward += [list(map(float, tracker.update(frame).box)) for frame in frames[-2::-1]]
    except BoxError:
        return forward[:1] * len(frames), [0.0] * len(frames)
    return forward, [iou(a, b) for a, b in zip(forward, reversed(backward))]


def propose_regions(frames: Sequence[np.ndarray], random: np.random.Generator) -> List[List[float]]:
    """Boxes x, y, w, h of up to ``TRACKS`` regions that stand out from their surroundings and do not overlap.

    They stand out by texture and motion in the first of ``frames`` (BGR uint8). ``random`` decides their sizes.
    """
    grey, later = (cv2.cvtColor(frames[i], cv2.COLOR_BGR2GRAY) for i in (0, min(2, len(frames) - 1)))
    edges = cv2.convertScaleAbs(cv2.Laplacian(cv2.GaussianBlur(grey, (5, 5), 0), cv2.CV_16S))
    texture = edges.astype(np.float32) + 2.0 * cv2.absdiff(grey, later)
    height, width = grey.shape
    chosen: List[Tuple[int, int, int, int]] = []
    for _ in range(TRACKS):
        extent, aspect = min(width, height) * random.uniform(0.1, 0.4), np.exp(random.normal(0, 0.35))
        w, h = min(width, max(10, round(extent * aspect))), min(height, max(10, round(extent / aspect)))
        inside = cv2.boxFilter(texture, -1, (w, h))
        around = cv2.boxFilter(texture, -1, (w + 2 * (w // 3), h + 2 * (h // 3)))
        # For each possible top-left corner of a box: the result of a filter lies at its centre.
        contrast = (inside - around)[h // 2 :, w // 2 :][: height - h + 1, : width - w + 1]
        for x, y, other_w, other_h in chosen:
            contrast[max(0, y - h) : y + other_h, max(0, x - w) : x + other_w] = 0
        _, most, _, (x, y) = cv2.minMaxLoc(contrast)
        if most > 0:
            chosen.append((x, y, w, h))
    return [list(map(float, box)) for box in chosen]


def read_clips(path: Path) -> Iterator[List[np.ndarray]]:
    """Yields the clips of a video, BGR uint8; raises ``DatasetError`` if OpenCV cannot read it."""
    video = open_video(path)
    if not video.isOpened():
        raise DatasetError(f"cannot open the video {printable(path)}: convert it to H.264 MP4, or remove it")
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    every = max(1, count // (FRAMES * STRIDE) // CLIPS)
    clip: List[np.ndarray] = []
    number = given = failed = 0
    while failed < LONGEST_GAP:
        if number % (FRAMES * STRIDE) == 0:  # an unfinished clip has a damaged frame
            if len(clip) >= 2:
                yield clip
            clip = []
        good, frame = video.grab(), None
        # Keeps every `every`-th clip of the video.
        if good and number // (FRAMES * STRIDE) % every == 0 and number % STRIDE == 0:
            good, frame = video.retrieve()
        given, failed = given + good, 0 if good else failed + 1
        if failed and number >= count:
            break
        if frame is not None:
            clip.append(shrink(frame, SIDE)[0])
            if len(clip) == FRAMES:
                yield clip
                clip = []
        number += 1
    if not given:
        raise DatasetError(f"the video {printable(path)} has no frame that OpenCV can decode: convert or remove it")
    if len(clip) >= 2:
        yield clip


def label_video(folder: Path, tracker: Any, path: Path) -> Tuple[bytes, List[Dict[str, Any]]]:
    """A tar of a video's clips, and their records; the video's path below ``folder`` seeds the choice of regions.

    Raises ``DatasetError`` if OpenCV cannot read the video.
    """
    name = path.relative_to(folder).as_posix()
    random = np.random.default_rng([0, zlib.crc32(name.encode("utf-8", "surrogateescape"))])
    packed = io.BytesIO()
    records: List[Dict[str, Any]] = []
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for clip in read_clips(path):
            tracks = []
            for region in propose_regions(clip, random):
                boxes, agreement = forward_backward(tracker, clip, region)
                mean = float(np.mean(agreement))
                if mean >= MEAN_AGREEMENT and min(agreement) >= LEAST_AGREEMENT:
                    tracks.append({"boxes": boxes, "kind": "pseudo", "fb": round(mean, 3)})
            names = [f"{len(records):03d}/{k:02d}.jpg" for k in range(len(clip))]
            if not tracks:
                continue
            records.append({"frames": names, "tracks": tracks, "source": name, "shard": "clips.tar"})
            for file, frame in zip(names, clip):
                data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
                member = tarfile.TarInfo(file)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return packed.getvalue(), records


def find_videos(folder: Path) -> List[Path]:
    """All videos below ``folder``; raises ``DatasetError`` if there is no such folder."""
    return [path for path in files_under(folder) if path.name.lower().endswith(VIDEO_SUFFIXES)]


def label_videos(folder: Path, output: Path, load: Mapping[str, Any]) -> Tuple[int, List[str]]:
    """Turns each video below ``folder`` into a collection in ``output`` with the video's name.

    Each finished video is written at once; a later call skips it. A video that cannot be read is named on stderr at
    the end; a later call tries it again. ``load`` holds the arguments of ``asymtrack_edge.Tracker.load``. Returns the
    number of tracks, and the reasons why videos were left out.

    Raises:
        DatasetError: there is no video.
        UsageError: ``output`` is the folder of the videos.
    """
    videos = find_videos(folder)
    if not videos:
        raise DatasetError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)})")
    if folder.resolve() == output.resolve():
        raise UsageError(f"{output} holds the videos: choose another --output")
    check_folder(output)
    indexes = {path: output / path.relative_to(folder) / "clips.json" for path in videos}
    waiting = [path for path in videos if not indexes[path].is_file()]
    if done := len(videos) - len(waiting):
        cli.say(f"{done} videos are labelled already: remove {output} to label them again")
    tracker = asymtrack_edge.Tracker.load(**load) if waiting else None
    failed = []
    for path in cli.progress(waiting, "videos"):
        try:
            clips, records = label_video(folder, tracker, path)
        except AsymTrackError as error:
            failed.append(str(error))
            continue
        index = indexes[path]
        index.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(index.with_name("clips.tar"), clips)
        write_text(index, json.dumps(records, indent=1))
    for reason in failed:
        cli.say(f"error: left out: {reason}")
    return sum(len(record["tracks"]) for index in indexes.values() for record in read_records(index)), failed
