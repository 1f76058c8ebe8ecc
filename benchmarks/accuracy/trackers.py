"""What can be evaluated: this package's trackers, OpenCV's as baselines, and the user's own.

A tracker is named by a string:

* ``T``, ``S``, ``B`` or a directory written by asymtrack-export: this package
* ``opencv:MIL``, ``opencv:KCF``, ``opencv:CSRT``
* ``opencv:nano=BACKBONE.onnx,HEAD.onnx`` and ``opencv:vit=MODEL.onnx``
* ``python:module:callable``: an importable callable that returns an object with ``init`` and ``update``
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple
from typing import Sequence as Items

import cv2
import numpy as np

from asymtrack_edge import __version__
from asymtrack_edge.errors import BoxError, UsageError
from asymtrack_edge.geometry import check_box
from asymtrack_edge.manifest import FILE_NAME
from asymtrack_edge.variants import VARIANTS

_OPENCV_CONTRIB = ("KCF", "CSRT")


class BoxTracker:
    """One target, boxes only: what the evaluation drives.

    Args:
        tracker: has ``init(frame, (x, y, w, h))`` and ``update(frame)``, which returns a box or an
            object with a ``box`` and perhaps a ``score``.
    """

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        self.score = 1.0

    def init(self, frame: np.ndarray, box: Items[float]) -> None:
        """Chooses the target: BGR uint8 ``(H, W, 3)`` and x, y, w, h in pixels."""
        self.score = 1.0
        self.tracker.init(frame, tuple(box))

    def update(self, frame: np.ndarray) -> Tuple[float, float, float, float]:
        """The target's box in the next frame: x, y, w, h in pixels."""
        track = self.tracker.update(frame)
        self.score = float(getattr(track, "score", 1.0))
        x, y, w, h = (float(v) for v in getattr(track, "box", track))
        return x, y, w, h


class _OpenCvTracker:
    """OpenCV's trackers: whole-pixel boxes, and none where the target is lost (the last one stays)."""

    def __init__(self, create: Callable[[], Any], smallest: int) -> None:
        self.create = create
        self.smallest = smallest
        self.tracker: Any = None
        self.box: Tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    def init(self, frame: np.ndarray, box: Items[float]) -> None:
        x, y, w, h = check_box(box, frame.shape)
        left, top = max(round(x), 0), max(round(y), 0)
        right, bottom = min(round(x + w), frame.shape[1]), min(round(y + h), frame.shape[0])
        if min(right - left, bottom - top) < self.smallest:
            raise BoxError(f"{w:g}x{h:g} pixels, less outside the frame, is too small a box for this tracker of OpenCV")
        # A new object each time: some of OpenCV's trackers cannot be initialised twice.
        self.tracker = self.create()
        self.tracker.init(frame, (left, top, right - left, bottom - top))
        self.box = (x, y, w, h)

    def update(self, frame: np.ndarray) -> Tuple[float, ...]:
        found, box = self.tracker.update(frame)
        if found:
            self.box = tuple(float(v) for v in box)
        return self.box


@dataclass(frozen=True)
class TrackerSpec:
    """How to make a tracker, in this or another process.

    Attributes:
        name: the string described in the module's docstring.
        backend, device, threads, precision, recover: as ``Tracker.load`` takes them; all but the threads
            are for this package's trackers.
    """

    name: str
    backend: str = "auto"
    device: str = "auto"
    threads: Optional[int] = None
    precision: Optional[str] = None
    recover: bool = True

    @property
    def kind(self) -> str:
        """``"opencv"``, ``"python"``, or ``"model"`` for this package's trackers."""
        kind = self.name.partition(":")[0]
        return kind if kind in ("opencv", "python") and ":" in self.name else "model"

    @property
    def label(self) -> str:
        """Short name, fit for a folder."""
        if self.kind == "opencv":
            return "opencv-" + self.name[7:].partition("=")[0].lower()
        if self.kind == "python":
            return re.sub(r"[^\w.-]+", "-", self.name[7:])
        if self.name.upper() in VARIANTS:
            return f"asymtrack-{self.name.lower()}"
        return Path(self.name).resolve().name

    def build(self) -> BoxTracker:
        """Makes the tracker.

        Raises:
            AsymTrackError: it does not exist, or what it needs is missing.
        """
        if self.kind == "opencv":
            if self.threads is not None:
                cv2.setNumThreads(self.threads)
            # MIL looks for features in the box, for ever where it is smaller than this.
            smallest = 6 if self.name.upper() == "OPENCV:MIL" else 1
            return BoxTracker(_OpenCvTracker(_opencv_factory(self.name[7:]), smallest))
        if self.kind == "python":
            return BoxTracker(_import_callable(self.name[7:])())
        from asymtrack_edge.runtime import Tracker

        options = {"backend": self.backend, "device": self.device, "threads": self.threads}
        return BoxTracker(Tracker.load(self.name, precision=self.precision, recover=self.recover, **options))

    def identity(self) -> Dict[str, Any]:
        """What decides this tracker's results and times, for telling old results from new ones."""
        identity: Dict[str, Any] = {"tracker": self.name, "threads": self.threads}
        if self.kind == "opencv":
            # Asked for here too, so that a tracker this OpenCV lacks is refused before anything is written.
            _opencv_factory(self.name[7:])
            identity["opencv"] = cv2.__version__
            identity["sha256"] = [_sha256(path) for path in _opencv_models(self.name[7:])]
        elif self.kind == "python":
            _import_callable(self.name[7:])
            source = getattr(sys.modules[self.name[7:].partition(":")[0]], "__file__", None)
            identity["sha256"] = [_sha256(Path(source))] if source else []
        else:
            from asymtrack_edge.runtime.backends.loading import model_folder

            # The manifest holds the hashes of the models, so its own hash stands for all of them.
            identity["sha256"] = [_sha256(model_folder(self.name) / FILE_NAME)]
            identity.update(backend=self.backend, device=self.device, precision=self.precision)
            identity.update(recovers=self.recover, version=__version__)
        return identity


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the model {path}: {error.strerror or error}") from None


def _import_callable(path: str) -> Callable[[], Any]:
    module, _, name = path.partition(":")
    # A command that pip installed does not look where it is called.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the tracker python:{path}: {error}") from None
    if not callable(found):
        raise UsageError(f"python:{path} is not callable: give python:module:callable")
    return found  # type: ignore[no-any-return]


def _opencv_models(kind: str) -> List[Path]:
    _, _, files = kind.partition("=")
    return [Path(f) for f in files.split(",")] if files else []


def _opencv_factory(kind: str) -> Callable[[], Any]:
    name, models = kind.partition("=")[0], _opencv_models(kind)
    wanted = {"nano": 2, "vit": 1}.get(name.lower(), 0)
    if len(models) != wanted:
        example = {"nano": "opencv:nano=BACKBONE.onnx,HEAD.onnx", "vit": "opencv:vit=MODEL.onnx"}
        raise UsageError(f"opencv:{kind}: expected {example.get(name.lower(), f'opencv:{name} alone')}")
    for path in models:
        if not path.is_file():
            raise UsageError(f"opencv:{kind}: there is no file {path}")
    if name.lower() == "nano":
        nano = _opencv_attribute("TrackerNano_Params", "Nano")()
        nano.backbone, nano.neckhead = str(models[0]), str(models[1])
        return lambda: cv2.TrackerNano_create(nano)  # type: ignore[attr-defined]
    if name.lower() == "vit":
        vit = _opencv_attribute("TrackerVit_Params", "Vit")()
        vit.net = str(models[0])
        return lambda: cv2.TrackerVit_create(vit)  # type: ignore[attr-defined]
    if name.upper() not in ("MIL", *_OPENCV_CONTRIB):
        raise UsageError(f"unknown tracker opencv:{name}: choose MIL, KCF, CSRT, nano=... or vit=...")
    create = _opencv_attribute(f"Tracker{name.upper()}_create", name.upper())
    return create  # type: ignore[no-any-return]


def _opencv_attribute(attribute: str, tracker: str) -> Any:
    legacy = getattr(cv2, "legacy", None)
    found = getattr(cv2, attribute, None) or getattr(legacy, attribute, None)
    if found is None and tracker in _OPENCV_CONTRIB:
        raise UsageError(
            f"opencv:{tracker} is not in this OpenCV ({cv2.__version__}): pip uninstall opencv-python, then "
            "pip install opencv-contrib-python"
        )
    if found is None:
        raise UsageError(f"opencv:{tracker} is not in OpenCV {cv2.__version__}: install a newer one")
    return found
