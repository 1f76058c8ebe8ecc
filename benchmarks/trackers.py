"""Trackers that can be evaluated and timed, each named by a string (``asymtrack-eval run --help`` says how)."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple
from typing import Sequence as Items

import cv2
import numpy as np

from asymtrack_edge import __version__
from asymtrack_edge.errors import BoxError, UsageError
from asymtrack_edge.files import opencv_path, printable
from asymtrack_edge.geometry import check_box
from asymtrack_edge.manifest import FILE_NAME, file_entry, load_manifest, read_networks
from asymtrack_edge.variants import VARIANTS

# Forced, because uninstalling opencv-python also removes files of an installed opencv-contrib-python.
_CONTRIB = "pip uninstall opencv-python, then pip install --force-reinstall --no-deps opencv-contrib-python"
#: OpenCV's trackers: class, model files by parameter, what to do if the installed OpenCV lacks the class.
_OPENCV: Dict[str, Tuple[str, Dict[str, str], str]] = {
    "mil": ("TrackerMIL", {}, ""),
    "kcf": ("TrackerKCF", {}, _CONTRIB),
    "csrt": ("TrackerCSRT", {}, _CONTRIB),
    "nano": ("TrackerNano", {"backbone": "BACKBONE.onnx", "neckhead": "HEAD.onnx"}, "install 4.7 or newer"),
    "vit": ("TrackerVit", {"net": "MODEL.onnx"}, "install 4.9 or newer"),
}


def box_of(track: Any) -> Tuple[float, float, float, float]:
    """x, y, w, h in pixels from what a tracker's ``update`` returns: a box, or an object with a ``box``."""
    x, y, w, h = (float(v) for v in getattr(track, "box", track))
    return x, y, w, h


class _OpenCvTracker:
    """One of OpenCV's trackers, with whole-pixel boxes; while the target is lost, the last box is returned."""

    def __init__(self, create: Callable[[], Any], smallest: int) -> None:
        self.create = create
        self.smallest = smallest

    def init(self, frame: np.ndarray, box: Items[float]) -> None:
        x, y, w, h = check_box(box, frame.shape)
        low = np.maximum(np.round([x, y]), 0).astype(int)
        size = np.minimum(np.round([x + w, y + h]), frame.shape[1::-1]).astype(int) - low
        if size.min() < self.smallest:
            raise BoxError(f"the part inside the frame of the {w:g}x{h:g} box is too small for this OpenCV tracker")
        # A new object each time: some of OpenCV's trackers cannot be initialised twice.
        self.tracker = self.create()
        self.tracker.init(frame, (*low.tolist(), *size.tolist()))
        self.box: Tuple[float, ...] = (x, y, w, h)

    def update(self, frame: np.ndarray) -> Tuple[float, ...]:
        found, box = self.tracker.update(frame)
        if found:
            self.box = tuple(float(v) for v in box)
        return self.box


@dataclass(frozen=True)
class TrackerSpec:
    """How to make a tracker, in this or another process: its name (see above) and arguments of ``Tracker.load``.

    All arguments except ``threads`` apply to this package's trackers only.
    """

    name: str
    backend: str = "auto"
    device: str = "auto"
    threads: Optional[int] = None
    precision: Optional[str] = None
    recover: bool = True

    @classmethod
    def of(cls, name: str, args: argparse.Namespace, recover: bool = True) -> TrackerSpec:
        """A tracker with the options of ``cli.add_backend``."""
        return cls(name, args.backend, args.device, args.threads, args.precision, recover)

    @property
    def load_arguments(self) -> Dict[str, Any]:
        """Arguments of ``open_backend`` and ``Tracker.load`` for this package's trackers."""
        return {"model": self.name, **{n: getattr(self, n) for n in ("backend", "device", "threads", "precision")}}

    @property
    def kind(self) -> str:
        """``"opencv"``, ``"python"``, or ``"model"`` for this package's trackers."""
        return self.name.partition(":")[0] if self.name.startswith(("opencv:", "python:")) else "model"

    @property
    def _named(self) -> str:
        """The part of the name after ``opencv:`` or ``python:``."""
        return self.name.partition(":")[2]

    @property
    def label(self) -> str:
        """A short name that can name a folder."""
        if self.kind == "opencv":
            return "opencv-" + self._named.partition("=")[0].lower()
        if self.kind == "python":
            return re.sub(r"[^\w.-]+", "-", self._named)
        return f"asymtrack-{self.name.lower()}" if self.name.upper() in VARIANTS else Path(self.name).resolve().name

    def build(self) -> Any:
        """Makes the tracker, with ``init(frame, box)`` and ``update(frame)``; ``box_of`` reads the latter's result.

        Raises AsymTrackError if the tracker does not exist or something that it needs is missing.
        """
        if self.kind == "opencv":
            if self.threads is not None:
                cv2.setNumThreads(self.threads)
            # In a box smaller than 6 pixels, MIL searches for features forever.
            return _OpenCvTracker(_opencv(self._named)[0], 6 if self._named.upper() == "MIL" else 1)
        if self.kind == "python":
            return _import_callable(self._named)()
        from asymtrack_edge.runtime import Tracker

        return Tracker.load(**self.load_arguments, recover=self.recover)

    def identity(self) -> Dict[str, Any]:
        """Everything that determines this tracker's results and times; it tells whether old results still apply.

        Raises AsymTrackError if there is no such tracker, so that it is refused before anything is written.
        """
        identity: Dict[str, Any] = {"tracker": self.label, "threads": self.threads}  # a path has several spellings
        if self.kind == "opencv":
            files = _opencv(self._named)[1]
            identity["opencv"] = cv2.__version__
        elif self.kind == "python":
            _import_callable(self._named)
            source = getattr(sys.modules[self._named.partition(":")[0]], "__file__", None)
            files = [Path(source)] if source else []
        else:
            from asymtrack_edge.runtime.backends.loading import model_folder

            # The manifest holds the hashes of the models, so its own hash stands for all of them.
            folder = model_folder(self.name)
            read_networks(folder, load_manifest(folder))
            files = [folder / FILE_NAME]
            identity.update(backend=self.backend, device=self.device, precision=self.precision)
            identity.update(recovers=self.recover, version=__version__)
        return {**identity, "sha256": [file_entry(file).sha256 for file in files]}


def _import_callable(path: str) -> Callable[[], Any]:
    module, _, name = path.partition(":")
    # A command installed by pip does not have the working directory on sys.path.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the tracker python:{path}: {error}") from None
    if not callable(found):
        raise UsageError(f"python:{path} is not callable: give python:module:callable")
    return found  # type: ignore[no-any-return]


def _opencv(kind: str) -> Tuple[Callable[[], Any], List[Path]]:
    """A function that makes one of OpenCV's trackers, such as ``MIL`` or ``vit=MODEL.onnx``, and its model files."""
    name, _, given = kind.partition("=")
    name, models = name.lower(), [Path(file) for file in given.split(",") if file]
    if name not in _OPENCV:
        raise UsageError(f"unknown tracker opencv:{name}: choose {', '.join(_OPENCV)}")
    class_name, files, advice = _OPENCV[name]
    if len(models) != len(files):
        raise UsageError(f"opencv:{kind}: expected opencv:{name}{'=' if files else ' alone'}{','.join(files.values())}")
    for path in models:
        if not path.is_file():
            raise UsageError(f"opencv:{kind}: there is no file {printable(path)}")
    create = getattr(cv2, f"{class_name}_create", None)
    if create is None:
        raise UsageError(f"opencv:{name} is not in this OpenCV ({cv2.__version__}): {advice}")
    if not models:
        return create, models
    parameters = getattr(cv2, f"{class_name}_Params")()
    for attribute, path in zip(files, models):
        setattr(parameters, attribute, opencv_path(path))
    try:
        create(parameters)
    except cv2.error as error:
        raise UsageError(f"opencv:{kind}: OpenCV cannot load it: {error.err}") from None
    return partial(create, parameters), models
