"""Drawing tracks on frames."""

from __future__ import annotations

from typing import Tuple

import cv2
import numpy as np

from asymtrack_edge.runtime.target import State, Track

#: BGR colours told apart by people with colour-blindness too (Okabe and Ito), one per target.
COLOURS = (
    (0, 159, 230),
    (233, 180, 86),
    (115, 158, 0),
    (66, 228, 240),
    (178, 114, 0),
    (0, 94, 213),
    (167, 121, 204),
)


def draw_track(frame: np.ndarray, track: Track, target: int = 0, label: str = "") -> None:
    """Draws a box with its score into ``frame`` (BGR uint8, in place); thin and grey while lost."""
    lost = track.state is State.LOST
    colour: Tuple[int, int, int] = (150, 150, 150) if lost else COLOURS[target % len(COLOURS)]
    x, y, w, h = (round(v) for v in track.box)
    scale = max(0.4, min(frame.shape[:2]) / 900)
    cv2.rectangle(frame, (x, y), (x + w, y + h), colour, 1 if lost else 2, cv2.LINE_AA)
    text = f"{label}{track.score:.2f}{' lost' if lost else ''}"
    draw_text(frame, text, (x, y - 4 if y > 20 else y + h + int(24 * scale)), colour, scale)


def draw_text(
    frame: np.ndarray, text: str, at: Tuple[int, int], colour: Tuple[int, int, int], scale: float = 0.5
) -> None:
    """Writes ``text`` with a dark outline, so that it can be read on any picture."""
    cv2.putText(frame, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 3, cv2.LINE_AA)
    cv2.putText(frame, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
