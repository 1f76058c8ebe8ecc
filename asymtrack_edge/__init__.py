"""AsymTrack for edge devices: a visual object tracker from checkpoint to device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, List

__version__ = "0.1.0"

if TYPE_CHECKING:
    from asymtrack_edge.runtime import Box, MultiTracker, State, Track, Tracker, TrackerSettings

#: Defined in ``runtime``, which is imported on first access: code that needs no tracker does not load it.
__all__ = ["Box", "MultiTracker", "State", "Track", "Tracker", "TrackerSettings"]

# From version 1.29 on, ONNX Runtime collects and sends usage data unless this variable is set before the import. A
# tracker on a device must not do so; set the variable to 0 to allow it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# In the source tree, ``export``, ``runtime`` and ``benchmarks`` lie beside this folder, not in it. Python started in
# the source tree imports this folder instead of the installed package, and must find them as well.
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
