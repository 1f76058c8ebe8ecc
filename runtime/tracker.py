"""Following one target, or any number of them, over one backend; and how a lost target is found.

A target that is not lost is followed exactly as published, and so is a lost one for a while: often it
comes back into the published crop by itself. After that some frames look elsewhere: where the target
was last seen well, around there in a wider window, and over the whole frame, nearest places first.
What is found there is followed beside the published track, and replaces it only when it has scored
well for several frames while the published crop has not. In no state is more than one crop searched
per frame, so recovery costs no time.
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

WIDEN = 1.6  #: side of the wider windows over that of the ordinary one
GRID_STEP = 0.6  #: distance of the windows of the search over the whole frame, over their side
MOST_WINDOWS = 64  #: a frame that would need more of them gets larger ones
SIZE_CHANGE = 4.0  #: a candidate's area is at most this many times the lost target's, or its inverse


class State(str, enum.Enum):
    """Whether the tracker believes that its box shows the target."""

    TRACKING = "tracking"
    LOST = "lost"
    __str__ = str.__str__  # else Python 3.11 and later print "State.LOST" where earlier ones print "lost"


class Track(NamedTuple):
    """Where a target is in one frame; of a lost target, box and score may be those of the frame before.

    Attributes:
        box: in frame pixels.
        score: 0..1, how sharply the target is located in this frame.
        state: what the scores of this and recent frames say together.
    """

    box: Box
    score: float
    state: State


@dataclass(frozen=True)
class TrackerSettings:
    """When a target counts as lost and as found again, and how it is looked for in between.

    Attributes:
        lost_below: the smoothed score below which the target is lost.
        found_above: the smoothed score above which it is found again.
        smoothing: weight of the newest score in the smoothed one, 0..1.
        patience: frames that a lost target is followed as published before it is looked for elsewhere.
        confirm: looks in a row in which something found elsewhere must score above ``found_above``.
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
            raise UsageError(f"settings need {need}: not {self}")


class _BackendTracker:
    """What ``Tracker`` and ``MultiTracker`` share: the backend, and the targets in its slots."""

    def __init__(self, backend: Backend, recover: bool = True, settings: Optional[TrackerSettings] = None) -> None:
        if isinstance(backend, (str, Path)):
            raise UsageError(f"a model is opened by {type(self).__name__}.load({str(backend)!r})")
        if not isinstance(settings, (TrackerSettings, type(None))):
            raise UsageError(f"settings are a TrackerSettings, not {settings!r}")
        self.backend = backend
        self.recover = recover
        self.settings = settings or TrackerSettings()
        #: Slot i of the backend holds the target i: slots have no gaps, as a batch needs.
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
        """Opens a model. A tracker that is dropped without ``close()`` gives back what its backend holds.

        Args:
            model: ``"T"``, ``"S"`` or ``"B"`` for the bundled weights, or a directory written by ``asymtrack-export``.
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
            MissingDependencyError: its package is not installed.
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
        """Time spent in ``update`` so far, by stage: crop, infer, box."""
        return {**self.backend.seconds, "box": self._box_seconds}

    def _choose(self, frame: Any, box: Iterable[float], slot: int, id: int) -> Target:
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
        tracks = [t.advance(p, w, shape) for t, p, w in zip(self._targets, predictions.tolist(), windows)]
        self._box_seconds += perf_counter() - began
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

    def init(self, frame: Any, box: Iterable[float]) -> None:
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
            ServerError: a Triton server does not answer; the tracker can go on with the next frame.
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

    def add(self, frame: Any, box: Iterable[float]) -> int:
        """Starts to follow a target and returns its id, which is never used again; otherwise as ``Tracker.init``."""
        slot = len(self._targets)
        if slot >= self.backend.capacity:
            # Growing copies what the slots hold: by doubling it happens seldom.
            self.backend.reserve(max(1, 2 * slot))
        self._targets.append(self._choose(frame, box, slot, self._next_id))
        self._next_id += 1
        return self._targets[slot].id

    def reset(self, target: int, frame: Any, box: Iterable[float]) -> None:
        """Gives a target a new look and place under its old id; errors as in ``add`` and ``remove``."""
        slot = self._slot(target)
        self._targets[slot] = self._choose(frame, box, slot, self._targets[slot].id)

    def remove(self, target: int) -> None:
        """Stops to follow a target; costs at most one copy of a template state (131 KB for T)."""
        slot, last = self._slot(target), len(self._targets) - 1
        if slot != last:
            self.backend.move(last, slot)
            self._targets[slot] = self._targets[last]
        self._targets.pop()

    def update(self, frame: Any) -> Dict[int, Track]:
        """Finds all targets in the next frame: each one's track by its id. Errors as in ``Tracker.update``."""
        tracks = self._follow(frame)
        return dict(sorted(zip([target.id for target in self._targets], tracks)))

    def _slot(self, target: int) -> int:
        for slot, followed in enumerate(self._targets):
            if followed.id == target:
                return slot
        known = ", ".join(map(str, self.ids)) or "none"
        raise UsageError(f"there is no target with id {target!r}; ids: {known}")


class Target:
    """Box and state of one target, followed as in the reference and, with ``recover``, looked for while it is lost.

    ``id`` is its owner's name for it, ``factor`` the search window's side over ``sqrt(w * h)``.
    While the target is looked for, ``box`` stays that of the published track.
    """

    def __init__(self, id: int, box: Box, settings: TrackerSettings, factor: float, recover: bool = True) -> None:
        self.id = id
        self.box = box
        self.state = State.TRACKING
        self._settings = settings
        self._factor = factor
        self._patience = settings.patience if recover else math.inf
        self._smoothed = self._score = 1.0  # scores in the published crop: their average, and the latest
        self._last_sure = box  # where it was last seen well, in the published crop or found elsewhere
        self._lost_frames = 0  # since it was last tracked
        self._elsewhere = False  # whether ``window()`` chose another place than the published crop
        self._looks = 0  # elsewhere, in a row
        self._turn = 0  # of the places to look at, one after the other
        self._candidate: Optional[Box] = None  # what was found elsewhere
        self._hits = 0  # good scores of the candidate, in a row
        self._grid: List[CropWindow] = []  # over a frame of height and width ``_grid_for``
        self._grid_for: Sequence[int] = ()

    def window(self, frame_shape: Sequence[int]) -> CropWindow:
        """Where to search in a frame of ``frame_shape`` (H, W, ...).

        It is the published crop, or another one in every second frame while the target is lost for long.
        """
        long_lost = self.state is State.LOST and self._lost_frames >= self._patience
        scores_well = self._score >= self._settings.found_above
        most_looks = 1 if self._candidate is None else 2  # in a row, then one frame searches the published crop
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
        """Takes the search network's prediction for ``window()``: cx, cy, w, h over its side, and score."""
        box, score = None, 0.0
        # An fp16 engine may overflow: its prediction then says nothing, and the box stays.
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
        """Takes what was found in the published crop."""
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
        """Takes what was found elsewhere: a candidate, which replaces the track once it is confirmed."""
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
    """Windows as large as the search window of ``box`` that cover a frame, nearest first; larger if too many."""
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
