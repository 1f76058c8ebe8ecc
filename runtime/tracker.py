"""Tracks one or more targets with one backend, and recovers lost targets.

A target that is not lost is tracked exactly as published. So is a lost one for a while: often it comes
back into the published crop by itself. After that, some frames are searched elsewhere: where the target
was last seen well, in a wider window around that place, and over the whole frame, nearest places first.
What is found there is tracked alongside the published track, and replaces it only after it has scored
well for several frames while the published crop has not. Only one crop per target is searched in each
frame, so recovery costs no time.
"""

from __future__ import annotations

import enum
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Type, TypeVar, Union

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import Box, CropWindow, box_from_crop, check_box, clip_box, crop_window
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import open_backend

_Self = TypeVar("_Self", bound="_BackendTracker")

WIDEN = 1.6  #: side of the wider windows, relative to the ordinary window's
GRID_STEP = 0.6  #: distance between windows of the whole-frame search, relative to their side
MOST_WINDOWS = 64  #: most windows for a frame; one that would need more gets larger windows
SIZE_CHANGE = 4.0  #: a candidate's area is at most this many times larger or smaller than the lost target's


class State(str, enum.Enum):
    """Whether the tracker believes that its box shows the target."""

    TRACKING = "tracking"
    LOST = "lost"
    __str__ = str.__str__  # else Python 3.11 and later print "State.LOST" where earlier ones print "lost"


class Track(NamedTuple):
    """Where a target is in one frame. While it is lost, box and score may be those of an earlier frame.

    Attributes:
        box: in frame pixels.
        score: 0..1, how clearly the target is located in this frame.
        state: derived from the scores of this and recent frames.
    """

    box: Box
    score: float
    state: State


@dataclass(frozen=True)
class TrackerSettings:
    """When a target counts as lost or found again, and how it is searched for in between.

    Attributes:
        lost_below: the smoothed score below which the target is lost.
        found_above: the smoothed score above which it is found again.
        smoothing: weight of the newest score in the smoothed score, 0..1.
        patience: frames for which a lost target is tracked as published before it is searched for elsewhere.
        confirm: consecutive looks in which a candidate found elsewhere must score at least ``found_above``.
    """

    lost_below: float = 0.4
    found_above: float = 0.6
    smoothing: float = 0.3
    patience: int = 10
    confirm: int = 5

    def __post_init__(self) -> None:
        scores = 0 <= self.lost_below <= self.found_above <= 1 and 0 < self.smoothing <= 1
        if not (scores and self.patience >= 0 and self.confirm >= 1):
            need = "0 <= lost_below <= found_above <= 1, 0 < smoothing <= 1, patience >= 0, confirm >= 1"
            raise UsageError(f"settings must satisfy {need}, got {self}")


class _BackendTracker:
    """What ``Tracker`` and ``MultiTracker`` share: the backend, and the targets in its slots."""

    def __init__(self, backend: Backend, recover: bool = True, settings: Optional[TrackerSettings] = None) -> None:
        if isinstance(backend, (str, Path)):
            raise UsageError(f"open a model with {type(self).__name__}.load({str(backend)!r})")
        if not isinstance(settings, (TrackerSettings, type(None))):
            raise UsageError(f"settings must be a TrackerSettings, not {settings!r}")
        self.backend = backend
        self.recover = recover
        self.settings = settings or TrackerSettings()
        #: Slot i of the backend holds target i of this list: a batch needs slots without gaps.
        self._targets: List[Target] = []
        self._next_id = 0
        self._box_seconds = 0.0
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
        """Opens a model. A tracker that is dropped without ``close()`` releases its backend, too.

        Args:
            model: ``"T"``, ``"S"`` or ``"B"`` for the bundled weights, or a directory written by ``asymtrack-export``.
            backend: ``"auto"`` uses TensorRT if the model has an engine for this GPU, else ONNX
                Runtime on the GPU if onnxruntime-gpu is installed, else ONNX Runtime on the CPU. Or
                one of ``asymtrack_edge.runtime.BACKENDS``.
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. ``"cuda"`` never falls back to
                the CPU.
            threads: number of CPU threads; None for one per core that this process may use.
            precision: ``"bf16"`` to compute in bf16 with OpenVINO; None for the model's own precision.
            recover: whether to search for a lost target. False tracks exactly as published.
            settings: when a target counts as lost, and how it is searched for.
            capacity: number of targets for which a ``MultiTracker`` makes room in advance. Adding
                more is possible but costs an allocation.

        Raises:
            ManifestError: the directory is incomplete or altered.
            BackendError: the backend is not available here.
            MissingDependencyError: the backend's package is not installed.
            UsageError: the arguments contradict each other.
        """
        if capacity < 1:
            raise UsageError(f"capacity must be at least 1, not {capacity}")
        tracker = cls(open_backend(model, backend, device, threads, precision), recover, settings)
        weakref.finalize(tracker, tracker.backend.close)
        tracker.backend.reserve(capacity)
        return tracker

    def close(self) -> None:
        """Releases the backend. The tracker cannot be used afterwards; closing twice is harmless."""
        self._closed = True
        self._targets.clear()
        self.backend.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> Dict[str, float]:
        """Time spent in ``update`` so far, by stage: crop, infer, box."""
        return {**self.backend.seconds, "box": self._box_seconds}

    def _choose(self, frame: Any, box: Iterable[float], slot: int, id: int) -> Target:
        """Runs the template network for a target in ``slot``."""
        manifest = self.backend.manifest
        frame = self._check_frame(frame)
        checked = check_box(box, frame.shape)
        self.backend.template(frame, crop_window(checked, manifest.template_factor), slot)
        return Target(id, checked, self.settings, manifest.search_factor, self.recover)

    def _follow(self, frame: Any) -> List[Track]:
        """Finds all targets in the next frame with one backend call; returns tracks in slot order."""
        frame = self._check_frame(frame)
        if not self._targets:
            return []
        windows = [target.window(frame.shape) for target in self._targets]
        predictions = self.backend.search(frame, windows)
        began = perf_counter()
        tracks = [t.advance(p, w, frame.shape) for t, p, w in zip(self._targets, predictions.tolist(), windows)]
        self._box_seconds += perf_counter() - began
        return tracks

    def _check_frame(self, frame: Any) -> Any:
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

    def init(self, frame: Any, box: Iterable[float]) -> None:
        """Sets the target; may be called again at any time, for the same or another target.

        Args:
            frame: BGR uint8 ``(H, W, 3)`` that shows the target.
            box: x, y, w, h in pixels.

        Raises:
            FrameError: the frame is not as described.
            BoxError: the box cannot be a target in this frame.
            UsageError: the tracker is closed.
        """
        self._targets[:] = [self._choose(frame, box, 0, 0)]

    def update(self, frame: Any) -> Track:
        """Finds the target in the next frame, BGR uint8 ``(H, W, 3)``.

        Raises:
            FrameError: the frame is not as described; the tracker is unchanged and can go on with the next.
            ServerError: a Triton server does not answer; the tracker can go on with the next frame.
            UsageError: there is no target yet, or the tracker is closed.
        """
        if not self._targets and not self._closed:
            raise UsageError("there is no target: call init(frame, box) before update(frame)")
        return self._follow(frame)[0]


class MultiTracker(_BackendTracker):
    """Follows any number of targets, which may be added and removed between any two frames.

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
        """The targets' ids, in the order in which they were added."""
        return sorted(target.id for target in self._targets)

    def add(self, frame: Any, box: Iterable[float]) -> int:
        """Starts tracking a target and returns its id, which is never reused; otherwise like ``Tracker.init``."""
        slot = len(self._targets)
        if slot >= self.backend.capacity:
            # Growing copies the contents of the slots: doubling makes that rare.
            self.backend.reserve(max(1, 2 * slot))
        self._targets.append(self._choose(frame, box, slot, self._next_id))
        self._next_id += 1
        return self._targets[slot].id

    def reset(self, target: int, frame: Any, box: Iterable[float]) -> None:
        """Marks a target anew, keeping its id; errors as in ``add`` and ``remove``."""
        slot = self._slot(target)
        self._targets[slot] = self._choose(frame, box, slot, self._targets[slot].id)

    def remove(self, target: int) -> None:
        """Stops tracking a target; costs at most one copy of a template state (131 KB for T)."""
        slot, last = self._slot(target), len(self._targets) - 1
        if slot != last:
            self.backend.move(last, slot)
            self._targets[slot] = self._targets[last]
        self._targets.pop()

    def update(self, frame: Any) -> Dict[int, Track]:
        """Finds all targets in the next frame; returns their tracks by id. Errors as in ``Tracker.update``."""
        tracks = self._follow(frame)
        return dict(sorted(zip([target.id for target in self._targets], tracks)))

    def _slot(self, target: int) -> int:
        for slot, followed in enumerate(self._targets):
            if followed.id == target:
                return slot
        known = ", ".join(map(str, self.ids)) or "none"
        raise UsageError(f"there is no target with id {target!r}; ids: {known}")


class Target:
    """Box and state of one target: tracked as in the reference and, with ``recover``, searched for while it is lost.

    ``id`` is chosen by the owner. ``factor`` is the search window's side relative to ``sqrt(w * h)``.
    While the target is searched for, ``box`` remains that of the published track.
    """

    def __init__(self, id: int, box: Box, settings: TrackerSettings, factor: float, recover: bool = True) -> None:
        self.id = id
        self.box = box
        self.state = State.TRACKING
        self._settings = settings
        self._factor = factor
        self._patience = settings.patience if recover else math.inf
        self._smoothed = self._score = 1.0  # scores in the published crop: smoothed, and latest
        self._last_sure = box  # last box with a good score, in the published crop or elsewhere
        self._lost_frames = 0  # frames since the target was last tracked
        self._elsewhere = False  # whether ``window()`` chose a place other than the published crop
        self._looks = 0  # consecutive looks elsewhere
        self._turn = 0  # index of the next place to look at
        self._candidate: Optional[Box] = None  # the box found elsewhere
        self._hits = 0  # consecutive good scores of the candidate
        self._grid: List[CropWindow] = []  # windows over a frame of height and width ``_grid_for``
        self._grid_for: Sequence[int] = ()

    def window(self, frame_shape: Sequence[int]) -> CropWindow:
        """Where to search in a frame of ``frame_shape`` (H, W, ...).

        This is the published crop, but in some frames another place once the target has been lost for long.
        """
        long_lost = self.state is State.LOST and self._lost_frames >= self._patience
        scores_well = self._score >= self._settings.found_above
        most_looks = 1 if self._candidate is None else 2  # then one frame searches the published crop
        self._elsewhere = long_lost and not scores_well and self._looks < most_looks
        if not self._elsewhere:
            self._looks = 0
            return crop_window(self.box, self._factor)
        self._looks += 1
        if self._candidate is not None:
            return crop_window(self._candidate, self._factor)
        # Turns 0, 4, 8... search the last sure place, turns 2, 6, 10... a wider window there, odd turns the grid.
        turn, self._turn = self._turn, self._turn + 1
        if turn % 2 == 0:
            return crop_window(self._last_sure, self._factor * (1 if turn % 4 == 0 else WIDEN))
        if self._grid_for != tuple(frame_shape[:2]):
            self._grid_for = tuple(frame_shape[:2])
            self._grid = search_grid(self._last_sure, frame_shape, self._factor * WIDEN)
        return self._grid[turn // 2 % len(self._grid)]

    def advance(self, prediction: Sequence[float], window: CropWindow, frame_shape: Sequence[int]) -> Track:
        """Applies the search network's prediction for ``window()``: cx, cy, w, h relative to its side, and score."""
        box, score = None, 0.0
        # An fp16 engine may overflow: its prediction is then useless, and the box stays.
        if all(map(math.isfinite, prediction)):
            box, score = clip_box(box_from_crop(prediction, window), frame_shape), float(prediction[4])
        self._lost_frames += 1
        if self._elsewhere:
            self._look(box, score)
        else:
            self._follow(box, score)
        if self.state is State.TRACKING:
            self._lost_frames = self._turn = 0
            self._grid_for = ()
        return Track(self.box, self._score, self.state)

    def _follow(self, box: Optional[Box], score: float) -> None:
        """Applies a prediction from the published crop."""
        settings = self._settings
        self.box, self._score = box or self.box, score
        self._smoothed += settings.smoothing * (score - self._smoothed)
        if self.state is State.TRACKING and self._smoothed < settings.lost_below:
            self.state = State.LOST
        elif self.state is State.LOST and self._smoothed > settings.found_above:
            self.state = State.TRACKING
        if score >= settings.found_above:
            self._candidate, self._hits = None, 0
            if self.state is State.TRACKING:
                self._last_sure = self.box

    def _look(self, box: Optional[Box], score: float) -> None:
        """Applies a prediction from elsewhere: a candidate, which replaces the track once it is confirmed."""
        if box is not None:
            change = box.w * box.h / (self._last_sure.w * self._last_sure.h)
            likely = score >= self._settings.found_above and 1 / SIZE_CHANGE <= change <= SIZE_CHANGE
            box = box if likely else None
        self._candidate, self._hits = box, 0 if box is None else self._hits + 1
        if box is not None and self._hits >= self._settings.confirm:
            self.box = self._last_sure = box
            self._smoothed = self._score = score
            self.state = State.TRACKING
            self._candidate, self._hits = None, 0


def search_grid(box: Box, frame_shape: Sequence[int], factor: float) -> List[CropWindow]:
    """Windows that cover a frame, nearest to ``box`` first: as large as its search window, or larger if too many."""
    height, width = frame_shape[:2]
    side = crop_window(box, factor).side
    while True:
        across = max(1, math.ceil(width / (GRID_STEP * side)))
        down = max(1, math.ceil(height / (GRID_STEP * side)))
        if across * down <= MOST_WINDOWS:
            break
        side = math.ceil(side * 1.1)
    x, y = box.centre
    columns = [(i + 0.5) * width / across for i in range(across)]
    rows = [(j + 0.5) * height / down for j in range(down)]
    centres = sorted(((cx, cy) for cx in columns for cy in rows), key=lambda c: math.hypot(c[0] - x, c[1] - y))
    return [CropWindow(round(cx - side * 0.5), round(cy - side * 0.5), side, (cx, cy)) for cx, cy in centres]
