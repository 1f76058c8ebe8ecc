"""Tracking on a device. Imports numpy, OpenCV and the chosen inference runtime; never torch."""

from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.backends.loading import BACKENDS, open_backend
from asymtrack_edge.runtime.sources import open_source
from asymtrack_edge.runtime.sources.reader import Captured, Reader
from asymtrack_edge.runtime.tracker import MultiTracker, State, Track, Tracker, TrackerSettings

__all__ = ["BACKENDS", "Box", "Captured", "MultiTracker", "Reader", "State", "Track", "Tracker", "TrackerSettings",
           "open_backend", "open_source"]  # fmt: skip
