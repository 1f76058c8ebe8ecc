"""PyTorch's files, read without running anything in them.

``torch.load`` cannot do this: with ``weights_only`` it refuses the classes in the authors' files, a pickle module of
ours it refuses where ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` is set, and before PyTorch 2.10 it reads beyond a record that is
shorter than the file claims. So an unpickler that knows no name but what describes a tensor makes descriptions of
tensors, and what one claims is compared with what the file holds.
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

#: Weights and AdamW's moments of variant T, the bulk of a published checkpoint, are described in 0.2 MB.
MAX_PICKLE = 8 << 20
#: Data types by the beginning of the name of a storage's class.
_DTYPES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
}


class MalformedError(ValueError):
    """A file whose contents cannot be what they claim to be; the message completes "FILE ..."."""


class Foreign(Dict[Any, Any]):
    """Stands in for every unknown class and function, and for their objects, which keep dictionary items only."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> Foreign:
        """What an unknown function returns is unknown, too."""
        return self

    def extend(self, items: Any) -> None:
        """Takes the items of a foreign list and forgets them."""

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
    """``torch._utils._rebuild_tensor_v2``, if every element lies inside the storage and none repeats."""
    if not isinstance(storage, StoredTensor):
        return Foreign()
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
        raise MalformedError("is damaged: a tensor is no view of its storage")
    numel, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise MalformedError("is damaged: a tensor reaches outside its storage")
    return storage._replace(offset=offset, shape=tuple(shape), stride=tuple(stride))


#: What the names in a pickle mean; Python 2 gives a dictionary its items as an argument.
_KNOWN: Dict[Tuple[str, str], Any] = {
    ("collections", "OrderedDict"): dict,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _DTYPES.items()},
    **{("torch._utils", f"_rebuild_{name}"): _tensor for name in ("tensor", "tensor_v2")},
    **{("torch._utils", f"_rebuild_{name}"): lambda data, *_: data for name in ("parameter", "parameter_with_state")},
}
_Python: Any = vars(pickle)["_Unpickler"]


class _Tuple(Tuple[Any, ...]):
    """Hashed by identity: by content, a chain of tuples that each hold the one before twice takes for ever."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def _tuple(opcode: bytes) -> Any:
    def load(self: Any) -> None:
        _Python.dispatch[opcode[0]](self)
        self.stack[-1] = _Tuple(self.stack[-1])

    return load


class Unpickler(_Python):  # type: ignore[misc]
    """Python's unpickler in Python (in C, a large memo index takes as much memory) that imports nothing."""

    dispatch: ClassVar[Dict[int, Any]] = {
        **_Python.dispatch,
        **{code[0]: _tuple(code) for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)},
        pickle.BUILD[0]: lambda self: self.stack.pop(),  # attributes, which nothing needs
        pickle.BYTEARRAY8[0]: _Python.load_binbytes8,  # its own makes an array of the length that is claimed
    }

    def __init__(self, content: BinaryIO) -> None:
        super().__init__(content, encoding="utf-8", errors="replace")
        self.dtypes: Dict[str, str] = {}  #: of each storage that the pickle refers to

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Foreign)

    def get_extension(self, code: int) -> None:
        """Refuses what ``copyreg`` may have registered."""
        raise pickle.UnpicklingError(f"extension {code}")

    def persistent_load(self, reference: Any) -> Any:
        """Takes ``("storage", type, key, device, numel, view)``, or ``("module", class, source)`` of a network."""
        _, dtype, key, *more = reference
        if dtype not in _DTYPES.values() or any(more[2:]) or type(key) is not str or type(more[1]) is not int:
            return Foreign
        self.dtypes[key] = dtype
        return StoredTensor(dtype, key, more[1])


def open_torch(file: BinaryIO) -> Tuple[Any, Callable[[StoredTensor], Tensor]]:
    """Reads a file of PyTorch's zip format (since 1.6), or of the older stream of pickles and storages.

    Returns:
        What was saved (plain Python values and ``StoredTensor``, ``Foreign`` for all that is neither plain nor known),
        and a function that reads a tensor while ``file`` is open. It may be a view of one that others share.

    Raises:
        MalformedError: it is damaged, or of a kind that holds no weights.
        Exception: what pickle and zipfile raise on streams that make no sense.
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
        raise MalformedError("is a TorchScript program: give the state_dict it was made of")
    # PyTorch stores records side by side and uncompressed; anything else can claim to unpack to any size.
    size = sum(info.file_size for info in records.values())
    if size > file.seek(0, os.SEEK_END) or any(info.compress_type for info in records.values()):
        raise MalformedError("is a compressed or damaged zip archive: save it again with torch.save")
    if records[root + "data.pkl"].file_size > MAX_PICKLE:
        raise MalformedError("holds a pickle of unreasonable size")
    for info in records.values():
        info.CRC = info.CRC or None  # type: ignore[assignment]  # PyTorch can be told to write none
    tree = Unpickler(io.BytesIO(archive.read(root + "data.pkl"))).load()
    return tree, lambda key: bytearray(archive.read(name) if (name := f"{root}data/{key}") in records else b"")


def _open_legacy(file: BinaryIO) -> Tuple[Any, Callable[[str], bytearray]]:
    import torch

    head = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(3):  # a magic number, the format's version, and what system wrote it
        Unpickler(head).load()
    described = Unpickler(head)
    tree, keys = described.load(), Unpickler(head).load()
    file.seek(head.tell())
    storages = {}
    for key in keys:
        (numel,) = struct.unpack("<Q", file.read(8))
        storages[key] = bytearray(file.read(numel * getattr(torch, described.dtypes[key]).itemsize))
    return tree, lambda key: storages.get(key, bytearray())
