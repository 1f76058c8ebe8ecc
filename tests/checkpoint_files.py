"""What the tests of checkpoints share: a small variant, calls in pickles, and to see files refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest

from asymtrack_edge.checkpoints import open_checkpoint
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.variants import VARIANTS, Variant

#: The smallest network that this architecture allows: a file of 4 MB.
TINY = VARIANTS["T"].with_(widths=(32, 32, 32, 32), depths=(1, 1, 1), attention_heads=1)


def refused(path: Path, variant: Variant = TINY, weights: Optional[str] = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, weights).tensors(variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


class Calls:
    """Pickles as a call of ``function``, whose result is then given a ``state``."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Lets pickle accept it as a function in turn."""
