"""``asymtrack-track`` with a stand-in for the networks: ``python -m tests.runtime.fake_command ...``.

``FAKE_PAUSE`` is the duration of a search in seconds.
"""

from __future__ import annotations

import os
import sys
from typing import Any, List, Optional
from unittest import mock

from asymtrack_edge.runtime import MultiTracker
from asymtrack_edge.runtime.commands import track as command
from tests.runtime.simulated import ColourBackend


def load(**options: Any) -> MultiTracker:
    return MultiTracker(ColourBackend(float(os.environ.get("FAKE_PAUSE", "0"))), options["recover"])


def main(arguments: Optional[List[str]] = None) -> int:
    with mock.patch.object(command.MultiTracker, "load", load):
        return command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
