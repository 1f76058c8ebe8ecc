"""AsymTrack for edge devices: a visual object tracker from checkpoint to device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, List

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymtrack_edge.runtime import Box, MultiTracker, State, Track, Tracker, TrackerSettings

#: They live in ``runtime``, which is imported when one of them is first asked for: what needs no tracker imports none.
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
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("asymtrack_edge.runtime"), name)


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
