"""Following several targets at once, in one call of the engine per frame."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Dict, List, Optional, Sequence, Union

import numpy as np

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import check_box, crop_window
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.recovery import default_settings, new_target
from asymtrack_edge.runtime.target import Target, Track, TrackerSettings


class MultiTracker:
    """Follows any number of targets, which may come and go between any two frames.

    The frame is cropped once per target and the engine gets all crops in one call: on a CPU it spreads
    them over the threads, a TensorRT engine takes them in batches as large as the export allows
    (``asymtrack-export --batch``). Each target has its own state; its track does not depend on the
    others'.

    Example::

        many = MultiTracker.load("T")
        first = many.add(frame, (x, y, w, h))
        tracks = many.update(next_frame)      # {first: Track(...)}
        many.remove(first)

    Args:
        engine: where the networks run.
        settings: when a target counts as lost, and what is done about it.
        capacity: targets to make room for at once; more get room when they come, which costs an
            allocation.
    """

    def __init__(self, engine: Backend, settings: Optional[TrackerSettings] = None, capacity: int = 1) -> None:
        if capacity < 1:
            raise UsageError(f"capacity must be at least 1, not {capacity}")
        self.engine = engine
        self.settings = settings or TrackerSettings()
        engine.reserve(capacity)
        # Slot i of the engine holds the target _ids[i]: slots are kept without gaps, as a batch needs.
        self._ids: List[int] = []
        self._targets: List[Target] = []
        self._next_id = 0
        self._decode_seconds = 0.0

    @classmethod
    def load(
        cls,
        model: Union[str, Path] = "T",
        backend: str = "auto",
        device: int = 0,
        threads: Optional[int] = None,
        settings: Optional[TrackerSettings] = None,
        capacity: int = 1,
    ) -> MultiTracker:
        """Opens bundled weights or an export directory; see ``Tracker.load``.

        Raises:
            ManifestError: the directory is incomplete or altered.
            BackendError: the backend is not available here.
        """
        return cls(open_backend(model, backend, device, threads), settings or default_settings(model), capacity)

    def __len__(self) -> int:
        """How many targets are followed."""
        return len(self._ids)

    def __contains__(self, target: object) -> bool:
        """Whether a target of this id is followed."""
        return target in self._ids

    @property
    def ids(self) -> List[int]:
        """The targets' ids, in the order in which they came."""
        return sorted(self._ids)

    @property
    def seconds(self) -> Dict[str, float]:
        """Time spent in ``update`` so far, by stage: crop, infer, decode."""
        return {**self.engine.seconds, "decode": self._decode_seconds}

    def add(self, frame: np.ndarray, box: Sequence[float]) -> int:
        """Starts to follow a target; returns its id, which is never used again.

        Args:
            frame: BGR uint8 ``(H, W, 3)`` that shows it.
            box: x, y, w, h in pixels.

        Raises:
            FrameError: not such a frame.
            BoxError: the box cannot be a target in it.
        """
        manifest = self.engine.manifest
        checked = check_box(box, self.engine.check_frame(frame))
        window = crop_window(checked, manifest.template_factor)
        slot = len(self._ids)
        if slot >= self.engine.capacity:
            # Growing copies what the slots hold: by doubling it happens seldom.
            self.engine.reserve(2 * slot)
        self.engine.template(frame, window, slot)
        self._ids.append(self._next_id)
        self._targets.append(new_target(checked, self.settings, manifest.search_factor))
        self._next_id += 1
        return self._ids[-1]

    def reset(self, target: int, frame: np.ndarray, box: Sequence[float]) -> None:
        """Gives a target a new look and place under its old id; errors as in ``add``, and in ``remove``."""
        slot = self._slot(target)
        manifest = self.engine.manifest
        checked = check_box(box, self.engine.check_frame(frame))
        self.engine.template(frame, crop_window(checked, manifest.template_factor), slot)
        self._targets[slot] = new_target(checked, self.settings, manifest.search_factor)

    def remove(self, target: int) -> None:
        """Stops to follow a target; costs one copy of a template state (131 KB for T).

        Raises:
            UsageError: there is no such target.
        """
        slot, last = self._slot(target), len(self._ids) - 1
        if slot != last:
            self.engine.move(last, slot)
            self._ids[slot], self._targets[slot] = self._ids[last], self._targets[last]
        self._ids.pop()
        self._targets.pop()

    def update(self, frame: np.ndarray) -> Dict[int, Track]:
        """Finds all targets in the next frame.

        Args:
            frame: BGR uint8 ``(H, W, 3)``; its size may change between frames.

        Returns:
            Each target's track by its id, in the order in which they came; empty without targets.

        Raises:
            FrameError: not such a frame; the targets stay as they were.
        """
        shape = self.engine.check_frame(frame)
        if not self._ids:
            return {}
        windows = [target.window(shape) for target in self._targets]
        predictions = self.engine.search(frame, windows)
        began = perf_counter()
        found = {
            number: target.advance(prediction, window, shape)
            for number, target, prediction, window in zip(self._ids, self._targets, predictions, windows)
        }
        tracks = {number: found[number] for number in sorted(found)}
        self._decode_seconds += perf_counter() - began
        return tracks

    def close(self) -> None:
        """Gives back the engine's memory; the tracker cannot be used afterwards."""
        self.engine.close()

    def _slot(self, target: int) -> int:
        try:
            return self._ids.index(target)
        except ValueError:
            followed = ", ".join(map(str, self.ids)) or "none"
            raise UsageError(f"there is no target {target!r}: those followed are {followed}") from None
