"""PyTorch's files, read without running anything in them.

Their pickles are read by an unpickler that imports nothing and calls nothing but what describes a tensor, so files
with classes that are not installed load as well. Tensors are descriptions until they are asked for; what one claims
is compared with what the file holds before memory is taken for it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from types import FunctionType
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, ClassVar, Dict, List, NamedTuple, Tuple

if TYPE_CHECKING:
    from torch import Tensor

#: Bounds what a hostile pickle costs to some seconds and some hundred MB. Weights and AdamW's moments of variant T,
#: the bulk of a published checkpoint, are described in 0.2 MB.
MAX_PICKLE = 8 << 20
#: No size, stride or offset of a tensor reaches this.
_LIMIT = 1 << 48
#: Of the number that begins the format before PyTorch 1.6.
LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19."
#: Data types by the name of a storage's class.
_STORAGES = (
    "Double:float64 Float:float32 Half:float16 BFloat16:bfloat16 Long:int64 Int:int32 Short:int16 Char:int8 Byte:uint8 "
    "Bool:bool"
)
_DTYPES = {f"torch.{name}Storage": dtype for name, dtype in (pair.split(":") for pair in _STORAGES.split())}
#: What pickles of protocol 2 and later are made of, without extensions, buffers and numbers in decimal.
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"
)


class MalformedError(ValueError):
    """A file whose contents cannot be what they claim to be; the message completes "FILE ..."."""


class Foreign:
    """Stands for a class, a function, or an object made by one that is not admitted.

    Attributes:
        name: ``module.qualname`` of the class or function.
        items: what was stored into the object as into a dictionary (string keys only).
    """

    __slots__ = ("items", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: Dict[str, Any] = {}

    def extend(self, items: List[Any]) -> None:
        """Takes the items of a foreign list and forgets them."""

    append = extend


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class StoredTensor(NamedTuple):
    """A tensor as a file describes it: a view of one of its storages."""

    storage: _Storage
    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> Any:
    """``torch._utils._rebuild_tensor_v2``, if every element lies inside the storage and none repeats."""
    if type(storage) is not _Storage:
        return Foreign("tensor")
    good = type(shape) is type(stride) is tuple and len(shape) == len(stride) <= 16
    if not good or not all(type(n) is int and 0 <= n < _LIMIT for n in (offset, *shape, *stride)):
        raise MalformedError("is damaged: a tensor is no view of its storage")
    numel, last = math.prod(shape), offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise MalformedError("is damaged: a tensor reaches outside its storage")
    return StoredTensor(storage, offset, shape, stride)


#: All that a pickle can call.
_KNOWN: Dict[str, Callable[..., Any]] = {
    **{f"collections.{name}": lambda *_: {} for name in ("OrderedDict", "defaultdict", "Counter")},
    **{f"torch._utils._rebuild_{name}": _tensor for name in ("tensor", "tensor_v2")},
    **{f"torch._utils._rebuild_{name}": lambda data, *_: data for name in ("parameter", "parameter_with_state")},
}
_Python: Any = vars(pickle)["_Unpickler"]


class Unpickler(_Python):  # type: ignore[misc]
    """Python's unpickler in Python (large memo indices take no memory there) with nothing to call.

    Nothing is hashed but strings, and nothing of unbounded size is copied: what is shared in a pickle can be
    exponentially larger than it, and what is used again and again costs its size each time. Dictionaries keep string
    keys only, sets become None.
    """

    dispatch: ClassVar[Dict[int, Any]] = {
        opcode: _Python.dispatch[opcode] for opcode in (getattr(pickle, name)[0] for name in _OPCODES.split())
    }

    def __init__(self, content: BinaryIO) -> None:
        super().__init__(content)
        self.dtypes: Dict[str, str] = {}  #: of each storage that the pickle refers to

    def find_class(self, module: str, name: str) -> Any:
        """Looks nothing up."""
        full = f"{module[:100]}.{name[:100]}"
        return _KNOWN.get(full) or Foreign(full)

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(function(*arguments[:4]) if type(function) is FunctionType else Foreign(function.name))

    def _call_with_keywords(self) -> None:
        self.stack.pop()
        self._call()

    def _storage(self) -> None:
        """``("storage", type, key, device, numel, view)``, as PyTorch refers to a storage, or a ``Foreign``."""
        reference, storage = self.stack.pop(), None
        if type(reference) is tuple and len(reference) >= 5 and reference[0] == "storage":
            kind, key, _, numel, *view = reference[1:6]
            dtype = _DTYPES.get(kind.name)
            if dtype and type(key) is str and type(numel) is int and 0 <= numel < _LIMIT:
                self.dtypes[key] = dtype
                storage = None if any(view) else _Storage(dtype, key, numel)
        self.append(storage or Foreign("persistent reference"))

    def _store(self, items: List[Any]) -> None:
        target = self.stack[-1]
        target = target.items if type(target) is Foreign else target
        target.update((key, value) for key, value in zip(items[::2], items[1::2]) if type(key) is str)

    def _set_item(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._store(items)

    def _frozen_set(self) -> None:
        self.pop_mark()
        self.append(None)

    dispatch[pickle.BINPERSID[0]] = _storage
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.NEWOBJ_EX[0]] = _call_with_keywords
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._store(self.pop_mark())
    dispatch[pickle.EMPTY_SET[0]] = lambda self: self.append(None)
    dispatch[pickle.ADDITEMS[0]] = lambda self: self.pop_mark()
    dispatch[pickle.FROZENSET[0]] = _frozen_set
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()  # an object's attributes: nothing needs them
    dispatch[pickle.BYTEARRAY8[0]] = _Python.load_binbytes8  # its own makes an array of the length that is claimed
    dispatch[pickle.FRAME[0]] = lambda self: self.read(8)


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
    storages: Dict[str, Tensor] = {}

    def read(tensor: StoredTensor) -> Tensor:
        storage, offset, shape, stride = tensor
        key, dtype = storage.key, getattr(torch, storage.dtype)
        if key not in storages:
            data = bytearray(content(key))
            storages[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        size = storage.numel * dtype.itemsize
        if len(storages[key]) < size:
            raise MalformedError(f"is truncated or damaged: its storage {key[:80]!a} is missing or too short")
        return storages[key][:size].view(dtype).as_strided(shape, stride, offset)

    return tree, read


def _open_zip(file: BinaryIO) -> Tuple[Any, Callable[[str], bytes]]:
    archive = zipfile.ZipFile(file)
    records = {info.filename: info for info in archive.infolist()}
    # PyTorch stores records side by side and uncompressed; anything else can claim to unpack to any size.
    if sum(info.file_size for info in records.values()) > file.seek(0, os.SEEK_END):
        raise MalformedError("is damaged: its records claim to be larger than the file")
    if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
        raise MalformedError("is a compressed zip archive, which PyTorch does not write: save it again")
    root = next((name[: -len("data.pkl")] for name in records if f"/{name}".endswith("/data.pkl")), None)
    if root is None:
        raise MalformedError("is a zip archive but not a PyTorch checkpoint (no data.pkl inside)")
    if root + "constants.pkl" in records:
        raise MalformedError("is a TorchScript program: give the state_dict it was made of")
    if records[root + "data.pkl"].file_size > MAX_PICKLE:
        raise MalformedError("holds a pickle of unreasonable size")
    for info in records.values():
        info.CRC = info.CRC or None  # type: ignore[assignment]  # PyTorch can be told to write none
    tree = Unpickler(io.BytesIO(archive.read(root + "data.pkl"))).load()
    return tree, lambda key: archive.read(name) if (name := f"{root}data/{key}") in records else b""


def _open_legacy(file: BinaryIO) -> Tuple[Any, Callable[[str], bytes]]:
    import torch

    head = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(3):  # a magic number, the format's version, and what system wrote it
        Unpickler(head).load()
    described = Unpickler(head)
    tree, keys = described.load(), Unpickler(head).load()
    places: Dict[str, Tuple[int, int]] = {}
    end = head.tell()
    for key in keys:
        if type(key) is not str or key not in described.dtypes:
            raise MalformedError("is damaged: it names a storage that it does not describe")
        file.seek(end)
        size = struct.unpack("<Q", file.read(8))[0] * getattr(torch, described.dtypes[key]).itemsize
        places[key] = end + 8, size
        end += 8 + size

    def content(key: str) -> bytes:
        place, size = places.get(key, (0, 0))
        file.seek(place)
        return file.read(size)

    return tree, content
