"""Following one target, or any number of them, over one backend."""

from __future__ import annotations

import weakref
from pathlib import Path
from time import perf_counter
from typing import Any, Dict, List, Optional, Sequence, Type, TypeVar, Union

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import check_box, crop_window
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.target import State, Target, Track, TrackerSettings

__all__ = ["MultiTracker", "State", "Track", "Tracker", "TrackerSettings"]

_Self = TypeVar("_Self", bound="_BackendTracker")


class _BackendTracker:
    """What ``Tracker`` and ``MultiTracker`` share: the backend, and the targets in its slots."""

    def __init__(self, backend: Backend, recover: bool = True, settings: Optional[TrackerSettings] = None) -> None:
        if isinstance(backend, (str, Path)):
            raise UsageError(f"a model is opened by {type(self).__name__}.load({str(backend)!r})")
        self.backend = backend
        self.recover = recover
        self.settings = settings or TrackerSettings()
        #: Slot i of the backend holds the target i: slots have no gaps, as a batch needs.
        self._targets: List[Target] = []
        self._next_id = 0
        self._decode_seconds = 0.0
        self._closed = False

    @classmethod
    def load(
        cls: Type[_Self],
        model: Union[str, Path] = "T",
        backend: str = "auto",
        device: str = "auto",
        threads: Optional[int] = None,
        precision: Optional[str] = None,
        recover: bool = True,
        settings: Optional[TrackerSettings] = None,
        capacity: int = 1,
    ) -> _Self:
        """Opens a model. A tracker that is dropped without ``close()`` gives back what its backend holds.

        Args:
            model: ``"T"`` or ``"S"`` for the bundled weights, or a directory written by ``asymtrack-export``.
            backend: ``"auto"`` takes TensorRT where the model has an engine for this GPU, else ONNX
                Runtime on the GPU where onnxruntime-gpu is installed, else ONNX Runtime on the CPU. Or
                one of ``asymtrack_edge.runtime.BACKENDS``.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. On ``"cuda"`` nothing falls back to
                the CPU.
            threads: CPU threads; None for as many as this process may use.
            precision: ``"bf16"`` for OpenVINO's arithmetic in bf16; None for the model's own.
            recover: whether a lost target is looked for. False tracks exactly as published.
            settings: when a target counts as lost, and how it is looked for.
            capacity: targets that a ``MultiTracker`` makes room for at once. More get room when they
                come, which costs an allocation.

        Raises:
            ManifestError: the directory is incomplete or altered.
            BackendError: the backend is not available here.
            UsageError: the arguments contradict each other.
        """
        if capacity < 1:
            raise UsageError(f"capacity must be at least 1, not {capacity}")
        opened = open_backend(model, backend, device, threads, precision)
        opened.reserve(capacity)
        tracker = cls(opened, recover, settings)
        weakref.finalize(tracker, opened.close)
        return tracker

    def close(self) -> None:
        """Gives back the backend's memory. The tracker cannot be used afterwards; closing twice is harmless."""
        self._closed = True
        self._targets.clear()
        self.backend.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> Dict[str, float]:
        """Time spent in ``update`` so far, by stage: crop, infer, decode."""
        return {**self.backend.seconds, "decode": self._decode_seconds}

    def _choose(self, frame: Any, box: Sequence[float], slot: int, id: int) -> Target:
        """Runs the template network for a target in ``slot``."""
        manifest = self.backend.manifest
        checked = check_box(box, self._check_frame(frame))
        self.backend.template(frame, crop_window(checked, manifest.template_factor), slot)
        return Target(id, checked, self.settings, manifest.search_factor, self.recover)

    def _follow(self, frame: Any) -> List[Track]:
        """Finds all targets in the next frame, in one call of the backend; tracks slot by slot."""
        shape = self._check_frame(frame)
        if not self._targets:
            return []
        windows = [target.window(shape) for target in self._targets]
        predictions = self.backend.search(frame, windows)
        began = perf_counter()
        tracks = [t.advance(p, w, shape) for t, p, w in zip(self._targets, predictions, windows)]
        self._decode_seconds += perf_counter() - began
        return tracks

    def _check_frame(self, frame: Any) -> Sequence[int]:
        if self._closed:
            raise UsageError("this tracker is closed: load another")
        return self.backend.check_frame(frame)


class Tracker(_BackendTracker):
    """Follows one target from frame to frame.

    Frames are BGR uint8 arrays ``(H, W, 3)``; their size may change between frames. Boxes are
    ``(x, y, w, h)`` in pixels: top-left corner and size.

    Example::

        with Tracker.load("T") as tracker:
            tracker.init(frame, (x, y, w, h))
            track = tracker.update(next_frame)
    """

    def init(self, frame: Any, box: Sequence[float]) -> None:
        """Chooses the target; may be called again at any time, for the same or another target.

        Args:
            frame: BGR uint8 ``(H, W, 3)`` that shows the target.
            box: x, y, w, h in pixels.

        Raises:
            FrameError: not such a frame.
            BoxError: the box cannot be a target in it.
            UsageError: the tracker is closed.
        """
        self._targets[:] = [self._choose(frame, box, 0, 0)]

    def update(self, frame: Any) -> Track:
        """Finds the target in the next frame, BGR uint8 ``(H, W, 3)``.

        Raises:
            FrameError: not such a frame; the tracker stays as it was and can go on with the next.
            UsageError: there is no target yet, or the tracker is closed.
        """
        if not self._targets and not self._closed:
            raise UsageError("there is no target: call init(frame, box) before update(frame)")
        return self._follow(frame)[0]


class MultiTracker(_BackendTracker):
    """Follows any number of targets, which may come and go between any two frames.

    The backend gets the crops of all targets in one call: a CPU spreads them over its threads, a
    TensorRT engine takes them in batches as large as the export allows (``asymtrack-export --batch``).
    Each target has its own state; its track does not depend on the others.

    Example::

        with MultiTracker.load("T") as many:
            first = many.add(frame, (x, y, w, h))
            tracks = many.update(next_frame)      # {first: Track(...)}
            many.remove(first)
    """

    def __len__(self) -> int:
        """How many targets are followed."""
        return len(self._targets)

    def __contains__(self, target: object) -> bool:
        """Whether a target of this id is followed."""
        return target in self.ids

    @property
    def ids(self) -> List[int]:
        """The targets' ids, in the order in which they came."""
        return sorted(target.id for target in self._targets)

    def add(self, frame: Any, box: Sequence[float]) -> int:
        """Starts to follow a target and returns its id, which is never used again; otherwise as ``Tracker.init``."""
        slot = len(self._targets)
        if slot >= self.backend.capacity:
            # Growing copies what the slots hold: by doubling it happens seldom.
            self.backend.reserve(max(1, 2 * slot))
        self._targets.append(self._choose(frame, box, slot, self._next_id))
        self._next_id += 1
        return self._targets[slot].id

    def reset(self, target: int, frame: Any, box: Sequence[float]) -> None:
        """Gives a target a new look and place under its old id; errors as in ``add`` and ``remove``."""
        slot = self._slot(target)
        self._targets[slot] = self._choose(frame, box, slot, target)

    def remove(self, target: int) -> None:
        """Stops to follow a target; costs at most one copy of a template state (131 KB for T)."""
        slot, last = self._slot(target), len(self._targets) - 1
        if slot != last:
            self.backend.move(last, slot)
            self._targets[slot] = self._targets[last]
        self._targets.pop()

    def update(self, frame: Any) -> Dict[int, Track]:
        """Finds all targets in the next frame; each one's track by its id. Otherwise as ``Tracker.update``."""
        tracks = self._follow(frame)
        return dict(sorted(zip([target.id for target in self._targets], tracks)))

    def _slot(self, target: int) -> int:
        for slot, followed in enumerate(self._targets):
            if followed.id == target:
                return slot
        known = ", ".join(map(str, self.ids)) or "none"
        raise UsageError(f"there is no target {target!r}: those followed are {known}")
