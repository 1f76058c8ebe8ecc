"""AsymTrack for edge devices: a visual object tracker from checkpoint to device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, List

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymtrack_edge.geometry import Box
    from asymtrack_edge.runtime.tracker import MultiTracker, State, Track, Tracker, TrackerSettings

#: The front door, and where each name lives. The modules are imported when they are first asked for, so that what
#: needs no tracker imports none.
_HOMES = {
    "Box": "asymtrack_edge.geometry",
    **dict.fromkeys(("MultiTracker", "State", "Track", "Tracker", "TrackerSettings"), "asymtrack_edge.runtime.tracker"),
}
__all__ = ["Box", "MultiTracker", "State", "Track", "Tracker", "TrackerSettings"]

# ONNX Runtime from 1.29 on collects and sends usage data unless this is set before it is imported. A tracker on a
# device must not; who wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In the source tree ``export``, ``runtime`` and ``benchmarks`` lie beside this folder, not in it. Python started
# there finds this folder before the installed package, and must find them all the same.
_source = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_source, "setup.cfg")) and os.path.isdir(os.path.join(_source, "runtime")):
    __path__.append(_source)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
