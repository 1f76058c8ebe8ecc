"""What the tests of checkpoints share: weights, ways to write files, and to see them refused."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asymtrack_edge.checkpoints import _described, _read, _state_dicts, load_weights
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import fill_all, official_shapes

T = VARIANTS["T"]
#: The smallest network that this architecture allows: a file of 4 MB.
TINY = T.with_(widths=(32, 32, 32, 32), depths=(1, 1, 1), attention_heads=1)


def official_weights() -> Dict[str, Tensor]:
    """What an authors' checkpoint of T holds, unused modules included."""
    return fill_all(official_shapes("T"))


def tiny_weights() -> Dict[str, Tensor]:
    """Weights of ``TINY``."""
    return fill_all({name: tuple(v.shape) for name, v in AsymTrack(TINY).state_dict().items()})


def refused(path: Path, variant: Optional[Variant] = T, weights: Optional[str] = None) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, variant, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Lets pickle accept it as a function in turn."""


class Builds(Calls):
    """Pickles as an object made by a call and then given a state."""

    def __init__(self, state: Any, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments, state)  # type: ignore[assignment]


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def bad(path: Path) -> Calls:
    return Calls(os.system, f"touch {path}")


def files_of(tensors: Dict[str, Tensor], folder: Path) -> List[Path]:
    """The same tensors in every supported format."""
    paths = [folder / "zip.pt", folder / "old.pt", folder / "w.safetensors"]
    torch.save({"net": tensors, "settings": Calls(os.getcwd)}, paths[0])
    torch.save({"net": tensors, "settings": Calls(os.getcwd)}, paths[1], _use_new_zipfile_serialization=False)
    save_file(tensors, str(paths[2]))
    return paths


def read_all(path: Path) -> Dict[str, Tensor]:
    with _described(path):
        return dict(pair for _, tensors in _state_dicts(_read(path)[1]) for pair in tensors.items())


def rezip(path: Path, change: Callable[[Dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> None:
    """Rewrites a checkpoint with changed records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
