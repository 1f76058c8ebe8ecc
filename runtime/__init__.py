"""Tracking on a device. Imports numpy, OpenCV and the chosen inference runtime; never torch."""

from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.loading import BACKENDS, open_engine
from asymtrack_edge.runtime.tracker import State, Track, Tracker, TrackerSettings

__all__ = ["BACKENDS", "Box", "State", "Track", "Tracker", "TrackerSettings", "open_engine"]
