"""Reads PyTorch files without executing anything in them.

``torch.load`` cannot do this: with ``weights_only`` it refuses the classes in the authors' files, it refuses a custom
pickle module where ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is set, and before PyTorch 2.10 it reads past the end of a record
that is shorter than the file claims. The unpickler here knows only the names that describe tensors. It builds
descriptions of tensors, and their claims are checked against the data in the file.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, ClassVar, Dict, NamedTuple, Tuple

if TYPE_CHECKING:
    from torch import Tensor

#: Largest accepted pickle. It only describes the tensors: 0.2 MB for variant T's weights and AdamW moments.
MAX_PICKLE = 8 << 20
#: Data types by the name of the storage class, without the suffix ``Storage``.
_DTYPES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
}


class MalformedError(ValueError):
    """The contents of a file are not what they claim to be; the message completes the sentence "FILE ..."."""


class Foreign(Dict[Any, Any]):
    """Stands in for every unknown class and function and the objects they return; keeps only dictionary items."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Foreign:
        """The result of an unknown function is unknown, too."""
        return self

    def extend(self, items: Any) -> None:
        """Discards the items of a foreign list."""

    append = extend


class StoredTensor(NamedTuple):
    """A tensor as a file describes it: a view of the storage ``key`` of ``numel`` numbers."""

    dtype: str
    key: str
    numel: int
    offset: int = 0
    shape: Tuple[int, ...] = ()
    stride: Tuple[int, ...] = ()


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    """Replaces ``torch._utils._rebuild_tensor_v2``; a tensor must not reach outside its storage or exceed its size."""
    if not isinstance(storage, StoredTensor):
        return Foreign()
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) or not len(stride) == len(shape) <= 64:
        raise MalformedError("is damaged: a tensor is not a view of its storage")
    numel, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise MalformedError("is damaged: a tensor reaches outside its storage")
    return storage._replace(offset=offset, shape=tuple(shape), stride=tuple(stride))


#: The meaning of each known name in a pickle. Pickles from Python 2 pass the items of a dictionary as an argument.
_KNOWN: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    **{("torch._utils", f"_rebuild_{name}"): _tensor for name in ("tensor", "tensor_v2")},
    **{("torch._utils", f"_rebuild_{name}"): lambda data, *_: data for name in ("parameter", "parameter_with_state")},
}
_Python: Any = vars(pickle)["_Unpickler"]
_INTEGERS = (pickle.INT, pickle.LONG, pickle.LONG1, pickle.LONG4)


class _Tuple(Tuple[Any, ...]):
    """A tuple or frozenset, hashed by identity: by content, a chain of them that each hold two takes forever."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _changed(opcode: bytes, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        _Python.dispatch[opcode[0]](self)
        self.stack[-1] = change(self.stack[-1])

    return load


class Unpickler(_Python):  # type: ignore[misc]
    """Python's unpickler without imports. The one in C is not used: it allocates whatever a large memo index asks."""

    dispatch: ClassVar[Dict[int, Any]] = {
        **_Python.dispatch,
        **{code[0]: _changed(code, _Tuple) for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)},
        pickle.FROZENSET[0]: _changed(pickle.TUPLE, _Tuple),
        # Any number of long integers can have one hash, and one that is the side of many dimensions fills the memory.
        **{code[0]: _changed(code, lambda n: n if abs(n) < 1 << 63 else Foreign()) for code in _INTEGERS},
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # drops attributes, which nothing needs
        pickle.BYTEARRAY8[0]: _Python.load_binbytes8,  # Python's own method allocates the length that is claimed
    }

    def __init__(self, content: BinaryIO) -> None:
        super().__init__(content, encoding="utf-8", errors="replace")
        self.dtypes: Dict[str, str] = {}  #: data type of each storage that the pickle refers to

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Foreign)

    def get_extension(self, code: int) -> None:
        """Refuses extensions, which ``copyreg`` may have registered."""
        raise pickle.UnpicklingError(f"extension {code}")

    def persistent_load(self, reference: Any) -> Any:
        """Resolves ``("storage", type, key, device, numel, view)``; a network's ``("module", ...)`` is foreign."""
        _, dtype, key, *more = reference
        if dtype not in _DTYPES.values() or any(more[2:]) or type(key) is not str or type(more[1]) is not int:
            return Foreign
        self.dtypes[key] = dtype
        return StoredTensor(dtype, key, more[1])


def open_torch(file: BinaryIO) -> Tuple[Any, Callable[[StoredTensor], Tensor]]:
    """Reads a file in PyTorch's zip format (since 1.6), or in the older format, a stream of pickles and storages.

    Returns:
        What was saved (plain Python values, ``StoredTensor``, and ``Foreign`` for anything else), and a function that
        reads a tensor while ``file`` is open. Several of the tensors may share memory.

    Raises:
        MalformedError: the file is damaged, or of a kind that holds no weights.
        Exception: whatever pickle and zipfile raise on malformed streams.
    """
    import torch

    zipped = file.read(2) == b"PK"
    file.seek(0)
    tree, content = _open_zip(file) if zipped else _open_legacy(file)
    content = lru_cache(maxsize=None)(content)  # tensors may share a storage

    def read(tensor: StoredTensor) -> Tensor:
        data, dtype = content(tensor.key), getattr(torch, tensor.dtype)
        if not 0 <= tensor.numel * dtype.itemsize <= len(data):
            raise MalformedError(f"is truncated or damaged: its storage {tensor.key[:80]!a} is missing or too short")
        flat = torch.frombuffer(data, dtype=dtype, count=tensor.numel) if tensor.numel else torch.empty(0, dtype=dtype)
        return flat.as_strided(tensor.shape, tensor.stride, tensor.offset)

    return tree, read


def _open_zip(file: BinaryIO) -> Tuple[Any, Callable[[str], bytearray]]:
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    root = next((name[: -len("data.pkl")] for name in records if f"/{name}".endswith("/data.pkl")), None)
    if root is None:
        raise MalformedError("is a zip archive but not a PyTorch checkpoint (no data.pkl inside)")
    if root + "constants.pkl" in records:
        raise MalformedError("is a TorchScript program: give the state_dict that it was made from")
    # PyTorch stores records one after the other and uncompressed; others can claim to unpack to any size.
    size = sum(info.file_size for info in records.values())
    if size > file.seek(0, os.SEEK_END) or any(info.compress_type for info in records.values()):
        raise MalformedError("is a compressed or damaged zip archive: save it again with torch.save")
    if records[root + "data.pkl"].file_size > MAX_PICKLE:
        raise MalformedError("holds a pickle of unreasonable size")
    for info in records.values():
        info.CRC = info.CRC or None  # type: ignore[assignment]  # PyTorch can be told to write no checksums
    tree = Unpickler(io.BytesIO(archive.read(root + "data.pkl"))).load()
    return tree, lambda key: bytearray(archive.read(name) if (name := f"{root}data/{key}") in records else b"")


def _open_legacy(file: BinaryIO) -> Tuple[Any, Callable[[str], bytearray]]:
    import torch

    head = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(3):  # magic number, format version, and the system that wrote the file
        Unpickler(head).load()
    described = Unpickler(head)
    tree, keys = described.load(), Unpickler(head).load()
    file.seek(head.tell())
    storages = {}
    for key in keys:
        (numel,) = struct.unpack("<Q", file.read(8))
        storages[key] = bytearray(file.read(numel * getattr(torch, described.dtypes[key]).itemsize))
    return tree, lambda key: storages.get(key, bytearray())
