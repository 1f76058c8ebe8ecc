"""The miniature data sets, and trackers that worker processes can import."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.datasets.conftest import folder_set

__all__ = ["folder_set"]

# A worker process is started with this process's sys.path: there it finds fake_trackers.
HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)
