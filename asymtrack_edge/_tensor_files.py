"""The interface behind which all kinds of files of tensors look alike.

Nothing is converted or checked against a model here.
"""

from __future__ import annotations

import importlib
import struct
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, Iterator, Tuple

from asymtrack_edge._unpickle import MalformedError
from asymtrack_edge.errors import CheckpointError, MissingDependencyError


class TensorFile(ABC):
    """A file of named tensors.

    Attributes:
        kind: for messages, such as ``"PyTorch"``.
        shapes: of all tensors, by name.
        metadata: what the file says about itself, if its format can (safetensors).
    """

    kind: str
    shapes: Dict[str, Tuple[int, ...]]
    metadata: Dict[str, str]

    @abstractmethod
    def read(self, names: Iterable[str]) -> Iterator[Tuple[str, Any]]:
        """Yields names and their ``torch.Tensor`` as stored: any dtype, on the CPU, its own memory.

        Raises:
            CheckpointError: the numbers are damaged or missing.
        """


def require(module: str) -> ModuleType:
    """Imports torch or safetensors when first needed.

    Raises:
        MissingDependencyError: it is absent.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(module.split(".")[0], "export", "reading a checkpoint") from None


class Described:
    """Turns what parsers raise on damaged files into a ``CheckpointError`` of one line naming the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, MalformedError):
            raise CheckpointError(f"{self.path} {error}") from None
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from None
        damage = (zipfile.BadZipFile, struct.error, ValueError, LookupError, ArithmeticError, EOFError)
        # NotImplementedError and plain RuntimeError: zipfile on features that PyTorch does not use.
        if isinstance(error, (*damage, RuntimeError, MemoryError)):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"{self.path} is truncated or damaged ({reason}): copy or download it again"
            ) from None
