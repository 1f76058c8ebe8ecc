"""Opens a file of tensors of any supported kind, and the safetensors kind itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterable, Iterator, Tuple

from asymtrack_edge._tensor_files import Described, TensorFile, require
from asymtrack_edge._torch_files import LegacyCheckpoint, ZipCheckpoint, is_legacy, is_zip
from asymtrack_edge._unpickle import MalformedError
from asymtrack_edge.errors import CheckpointError

#: What people hand over by accident: first bytes, what it is and what to do.
_OTHERS = (
    (b"\x1f\x8b", "is a gzip archive: unpack it and give the checkpoint inside"),
    (b"version https://git-lfs", "is a Git LFS pointer and not the file itself: run 'git lfs pull'"),
    (b"<", "is a web page and not a checkpoint: the download did not give the file itself"),
    (b"\x80", "is a pickle, but not one that PyTorch saved"),
)


def open_tensors(path: Path) -> TensorFile:
    """Opens a file of any supported kind, told by its contents.

    Raises:
        CheckpointError: it cannot be read, is damaged, or is something else.
        MissingDependencyError: torch or safetensors is absent.
    """
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder: give the checkpoint file inside it")
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist: check the path"
            raise CheckpointError(f"{path} {problem}")
        with open(path, "rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    with Described(path):
        if not head:
            raise MalformedError("is empty: copy or download it again")
        if is_zip(head):
            return ZipCheckpoint(path, size)
        if is_legacy(head):
            return LegacyCheckpoint(path, size)
        if head[8:9] == b"{":
            return SafetensorsFile(path)
        if head[257:262] == b"ustar":
            raise MalformedError("is a tar archive: unpack it and give the checkpoint inside")
        for magic, message in _OTHERS:
            if head.lstrip().startswith(magic):
                raise MalformedError(message)
        raise MalformedError("is not a checkpoint: expected PyTorch's or the safetensors format")
    raise AssertionError("unreachable: Described lets no error pass")


class SafetensorsFile(TensorFile):
    """The safetensors format, read by its own library, which checks sizes and offsets."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            self.metadata = dict(file.metadata() or {})
            self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if not self.shapes:
            raise MalformedError("holds no tensors")

    def read(self, names: Iterable[str]) -> Iterator[Tuple[str, Any]]:
        """See ``TensorFile``."""
        with Described(self.path), self._open() as file:
            for name in names:
                # A copy, because the file may be replaced while its memory is mapped.
                yield name, file.get_tensor(name).clone()

    def _open(self) -> Any:
        require("torch")
        library = require("safetensors")
        try:
            return library.safe_open(str(self.path), framework="pt")
        except library.SafetensorError as error:
            reason = " ".join(str(error).split())
            raise MalformedError(
                f"is a truncated or damaged safetensors file ({reason}): copy or download it again"
            ) from None
