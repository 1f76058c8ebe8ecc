"""AsymTrack for edge devices: a visual object tracker from checkpoint to device."""

import os

__version__ = "0.1.0"

# In the source tree ``export``, ``runtime`` and ``benchmarks`` lie beside this folder, not in it. Python started
# there finds this folder before the installed package, and must find them all the same.
_source = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_source, "setup.cfg")) and os.path.isdir(os.path.join(_source, "runtime")):
    __path__.append(_source)
