"""PyTorch's two file formats, read without running anything in them.

The zip format (since PyTorch 1.6) and the older stream of pickles followed by the raw storages.
Tensors are described by a pickle, see ``_unpickle``; only those asked for are read.
"""

from __future__ import annotations

import os
import struct
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Tuple

from asymtrack_edge._tensor_files import Described, TensorFile, require
from asymtrack_edge._unpickle import Foreign, MalformedError, PickleStream, Storage, StoredTensor, unpickle
from asymtrack_edge.errors import CheckpointError

#: First bytes of the zip format (with records, or empty).
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
#: The first object of the older format.
_LEGACY = 0x1950A86A20F9469CFC6C

#: Names under which training programs keep the state_dict in a checkpoint, in the order tried.
WRAPPERS = ("net", "state_dict", "model", "model_state_dict", "ema", "ema_state_dict", "module")

_MAX_PICKLE = 64 << 20
_MAX_LEGACY = 1 << 30
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a zip archive."""
    return head[:4] in _ZIP


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is of PyTorch's older format."""
    try:
        return head[:1] == b"\x80" and unpickle(PickleStream(head)) == _LEGACY
    except MalformedError:
        return False


class _TorchFile(TensorFile):
    """What PyTorch's two formats share: a pickle that describes views of storages."""

    kind = "PyTorch"

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.metadata = {}
        tree = self._describe()
        tensors = _state_dict(tree)
        if not tensors:
            raise MalformedError(_no_tensors(tree))
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    @abstractmethod
    def _describe(self) -> Any:
        """Reads the pickle."""

    @abstractmethod
    def _storages(self, wanted: List[Storage]) -> Iterator[Tuple[Storage, bytes]]:
        """Yields each wanted storage with at least as many bytes as it claims."""

    def read(self, names: Iterable[str]) -> Iterator[Tuple[str, Any]]:
        """See ``TensorFile``."""
        torch = require("torch")
        users: Dict[Storage, List[str]] = {}
        read = 0
        for name in names:
            tensor = self._tensors[name]
            if not tensor.fits():
                raise CheckpointError(f"{self.path} is damaged: tensor {name[-80:]!a} reaches outside its storage")
            users.setdefault(tensor.storage, []).append(name)
        with Described(self.path):
            for storage, data in self._storages(list(users)):
                read += 1
                dtype = getattr(torch, storage.dtype)
                flat = torch.frombuffer(bytearray(data), dtype=dtype, count=storage.numel)
                for name in users[storage]:
                    tensor = self._tensors[name]
                    view = torch.as_strided(flat, tensor.shape, tensor.stride, tensor.offset)
                    yield name, view.clone(memory_format=torch.contiguous_format)
            if read < len(users):
                raise MalformedError("is damaged: some of its tensors have no numbers")


class ZipCheckpoint(_TorchFile):
    """PyTorch's zip format: ``ROOT/data.pkl`` and one record ``ROOT/data/KEY`` a storage."""

    def _describe(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            records = {info.filename: info for info in archive.infolist()}
            # PyTorch stores records side by side and uncompressed; anything else can claim to
            # unpack to any size.
            if sum(info.file_size for info in records.values()) > self.size:
                raise MalformedError("is damaged: its records claim to be larger than the file")
            pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise MalformedError("is a zip archive but not a PyTorch checkpoint (no data.pkl inside)")
            self.root = pickles[0][: -len("data.pkl")]
            if self.root + "constants.pkl" in records:
                raise MalformedError("is a TorchScript program: give the state_dict it was made of")
            if self.root + "byteorder" in records and self._record(archive, "byteorder") != b"little":
                raise MalformedError("was saved on a big-endian machine: save it again on another")
            if records[pickles[0]].file_size > _MAX_PICKLE:
                raise MalformedError("holds a pickle of unreasonable size")
            return unpickle(PickleStream(self._record(archive, "data.pkl")))

    def _record(self, archive: zipfile.ZipFile, name: str) -> bytes:
        info = archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise MalformedError("is a compressed zip archive, which PyTorch does not write: save it again")
        return archive.read(info)  # checks the CRC

    def _storages(self, wanted: List[Storage]) -> Iterator[Tuple[Storage, bytes]]:
        with zipfile.ZipFile(self.path) as archive:
            for storage in wanted:
                data = self._record(archive, f"data/{storage.key}")
                if len(data) < storage.numel * _BYTES.get(storage.dtype, 1):
                    raise MalformedError(f"is damaged: its storage {storage.key!a} is too short")
                yield storage, data


class LegacyCheckpoint(_TorchFile):
    """PyTorch's older format: magic, version, machine, object, list of keys; then the storages."""

    def _describe(self) -> Any:
        if self.size > _MAX_LEGACY:
            raise MalformedError("is unreasonably large for a checkpoint of this model")
        stream = PickleStream(self.path.read_bytes())
        unpickle(stream)  # the magic number, checked by the caller
        version, machine = unpickle(stream), unpickle(stream)
        if version != 1001:
            raise MalformedError("is of an unknown version of PyTorch's old format")
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise MalformedError("was saved on a big-endian machine: save it again on another")
        self._types: Dict[str, Storage] = {}
        tree, keys = unpickle(stream, self._types), unpickle(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise MalformedError("is damaged: the list of its storages is not a list of names")
        self.keys: List[str] = keys
        self.start = stream.tell()
        return tree

    def _storages(self, wanted: List[Storage]) -> Iterator[Tuple[Storage, bytes]]:
        # A storage's length is in elements, so where the next begins depends on its type, which
        # only the references to it tell.
        unread = set(wanted)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for key in self.keys:
                (numel,) = struct.unpack("<q", file.read(8))
                storage = self._types.get(key)
                if storage is None:
                    raise MalformedError(f"is damaged: nothing describes its storage {key!a}")
                length = numel * _BYTES.get(storage.dtype, 1)
                if not 0 <= length <= self.size - file.tell():
                    raise MalformedError("is truncated: copy or download it again")
                if storage in unread:
                    unread.remove(storage)
                    yield storage, file.read(length)
                else:
                    file.seek(length, os.SEEK_CUR)


def _state_dict(node: Any, depth: int = 3) -> Dict[str, StoredTensor]:
    """Finds the state_dict: what a known wrapper holds, or the tensors of ``node`` itself."""
    if isinstance(node, Foreign):  # an instance of a foreign subclass of dict keeps its items
        node = node.items
    if not isinstance(node, dict) or not depth:
        return {}
    for wrapper in WRAPPERS:
        found = _state_dict(node.get(wrapper), depth - 1)
        if found:
            return found
    return {name: value for name, value in node.items() if isinstance(value, StoredTensor)}


def _no_tensors(tree: Any) -> str:
    if isinstance(tree, dict):
        for wrapper in WRAPPERS:
            if isinstance(tree.get(wrapper), Foreign):
                kind = tree[wrapper].name[:80]
                return f"holds an object of {kind!a} as {wrapper!r}: save its state_dict() instead"
        names = ", ".join(ascii(name)[:40] for name in list(tree)[:5])
        return f"holds no state_dict, only {names or 'an empty dictionary'}"
    name = tree.name if isinstance(tree, Foreign) else type(tree).__name__
    return f"holds a {name[:80]!a} and no state_dict: save model.state_dict() instead"
