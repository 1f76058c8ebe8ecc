"""What looking for lost targets gains and costs: ``python -m tests.runtime.measure_recovery MODEL``.

Made-up clips: a textured ellipse wanders over a textured scene. In half of them it is gone for a
while and comes back elsewhere; in the others it stays. Each is tracked with recovery off and on.
For real sequences: ``asymtrack-eval --tracker T --tracker python:tests.runtime.measure_recovery:as_published``.
"""

from __future__ import annotations

import argparse
import sys
from typing import Iterator, List, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.geometry import Box, iou
from asymtrack_edge.runtime import State, Tracker

SIZE = (480, 360)
OUT, BACK, END = 30, 60, 130


def as_published() -> Tracker:
    """The bundled T without recovery, for asymtrack-eval."""
    return Tracker.load("T", recover=False)


def _texture(random: np.random.RandomState, height: int, width: int, contrast: float) -> np.ndarray:
    made = np.full((height, width, 3), random.uniform(70, 180, 3), np.float32)
    for cells, strength in ((3, 1.0), (9, 0.7), (27, 0.4)):
        noise = random.normal(0, contrast * strength, (cells, cells, 3)).astype(np.float32)
        made += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return made


def clip(seed: int, leaves: bool) -> Iterator[Tuple[np.ndarray, Optional[Box]]]:
    """Yields frames and the target's box, None while it is gone."""
    random = np.random.RandomState(seed)
    width, height = SIZE
    scene, skin = _texture(random, height, width, 35), _texture(random, 96, 96, 50)
    turn = random.uniform(0, 6)
    for i in range(END):
        phase = turn + i / 25 + (2.5 if leaves and i >= BACK else 0.0)
        w, h = int(48 + 6 * np.sin(phase * 1.3)), int(42 + 5 * np.cos(phase))
        x = int(width / 2 + 0.36 * width * np.sin(phase) - w / 2)
        y = int(height / 2 + 0.32 * height * np.sin(2 * phase) - h / 2)
        frame = scene.copy()
        gone = leaves and OUT <= i < BACK
        if not gone:
            mask = np.zeros((h, w), np.uint8)
            cv2.ellipse(mask, (w // 2, h // 2), (w // 2 - 1, h // 2 - 1), 0, 0, 360, 255, -1, cv2.LINE_AA)
            alpha = mask[..., None].astype(np.float32) / 255
            region = frame[y : y + h, x : x + w]
            region += alpha * (cv2.resize(skin, (w, h)) - region)
        frame += random.normal(0, 3, frame.shape).astype(np.float32)
        yield np.clip(frame, 0, 255).astype(np.uint8), None if gone else Box(x, y, w, h)


def follow(tracker: Tracker, seed: int, leaves: bool) -> Tuple[List[float], List[bool], List[float]]:
    """Overlaps where the target is there, states (lost?) and scores of all frames after the first."""
    frames = clip(seed, leaves)
    tracker.init(*next(frames))  # type: ignore[arg-type]
    overlaps, lost, scores = [], [], []
    for frame, truth in frames:
        track = tracker.update(frame)
        overlaps.append(np.nan if truth is None else iou(track.box, truth))
        lost.append(track.state is State.LOST)
        scores.append(track.score)
    return overlaps, lost, scores


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clips", type=int, default=10, help="of each kind")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    for leaves in (True, False):
        rows = []
        for recover in (False, True):
            tracker = Tracker.load(options.model, threads=options.threads, recover=recover)
            rows.append([follow(tracker, seed, leaves) for seed in range(options.clips)])
        print("target leaves and comes back" if leaves else "target stays")
        for name, row in zip(("off", "on"), rows):
            overlaps = np.array([r[0] for r in row])
            lost = np.array([r[1] for r in row])
            scores = np.array([r[2] for r in row])
            line = f"  recovery {name:3}: overlap {np.nanmean(overlaps):.3f}"
            if leaves:
                after = overlaps[:, -40:].mean(1)
                line += f", found again in {(after > 0.5).sum()} of {len(row)} clips"
                line += f" (overlap of the last 40 frames {after.mean():.3f})"
                line += f", called lost in {lost[:, OUT - 1 : BACK - 1].mean():.0%} of the frames without it"
                line += f", score with / without it {np.median(scores[:, : OUT - 1]):.2f}"
                line += f" / {np.median(scores[:, OUT + 4 : BACK - 1]):.2f}"
            else:
                line += f", called lost in {lost.mean():.1%} of the frames"
            print(line)
        if not leaves:
            same = [a[0] == b[0] for a, b in zip(*rows)]
            print(f"  identical boxes in {sum(same)} of {len(same)} clips")
    return 0


if __name__ == "__main__":
    sys.exit(main())
