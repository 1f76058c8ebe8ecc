"""PyTorch's files, read without running anything in them.

``torch.load`` is given an unpickler that resolves every name to something inert and imports nothing, so that files
with classes that are not installed load as well. Sizes that a file claims are compared with what it holds before
torch sees them: its older versions believe them.
"""

from __future__ import annotations

import importlib
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List

from asymtrack_edge.errors import MissingDependencyError

#: Bounds what a hostile pickle costs to some seconds and some hundred MB. Weights and AdamW's moments of variant T,
#: the bulk of a published checkpoint, are described in 0.2 MB.
MAX_PICKLE = 8 << 20
#: Decimal numbers of megabytes take hours to convert.
_MAX_LINE = 4096
#: First object of the format before PyTorch 1.6.
_LEGACY = 0x1950A86A20F9469CFC6C


class MalformedError(ValueError):
    """A file whose contents cannot be what they claim to be; the message completes "FILE ..."."""


class Foreign:
    """Stands for a class, function or object that is not admitted. Calling it makes another, and nothing else.

    Attributes:
        name: ``module.qualname`` of the class or function.
        items: what was stored into the object as into a dictionary (string keys only).
    """

    __slots__ = ("items", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: Dict[str, Any] = {}

    def __call__(self, *_: Any, **__: Any) -> Foreign:
        return Foreign(self.name)

    def extend(self, items: List[Any]) -> None:
        """Takes the items of a foreign list and forgets them."""

    append = extend


class PickleStream(io.BytesIO):
    """Bytes whose lines are bounded, as is how much is read before the storages (which use ``readinto``)."""

    left = MAX_PICKLE

    def read(self, size: Any = -1) -> bytes:
        """Reads ``size`` bytes, fewer at the end."""
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise MalformedError("holds a pickle of unreasonable size")
        return data

    def readline(self, size: Any = -1) -> bytes:
        """Reads up to and including the next newline, or ``_MAX_LINE`` bytes."""
        return super().readline(_MAX_LINE)


def _dictionary(items: Any = (), *_: Any) -> Dict[str, Any]:
    """``OrderedDict`` and the like; Python 2 pickled the items as an argument."""
    pairs = items if type(items) in (list, tuple) else ()
    return {pair[0]: pair[1] for pair in pairs if type(pair) in (list, tuple) and type(pair[0]) is str}


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    """``torch._utils._rebuild_tensor_v2``, if every element lies inside the storage and none repeats."""
    if type(storage).__name__ != "TypedStorage":
        return Foreign("tensor")
    numel, last = 1, offset
    for size, step in zip(shape, stride):
        if type(size) is not int or type(step) is not int or size < 0 or step < 0:
            raise MalformedError(f"is damaged: a tensor of the shape {shape!r:.80} is no view of its storage")
        numel *= size
        last += (size - 1) * step
    there = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if len(shape) != len(stride) or len(shape) > 16 or offset < 0 or numel > there or (numel and last >= there):
        raise MalformedError(f"is damaged: a tensor of the shape {shape!r:.80} reaches outside its storage")
    import torch

    return torch._utils._rebuild_tensor(storage, offset, tuple(shape), tuple(stride))


def _first(value: Any = (), *_: Any) -> Any:
    return value


#: All that a pickle can call.
_KNOWN: Dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter"), _dictionary),
    **dict.fromkeys(("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"), _tensor),
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), _first),
    "torch.Size": _first,
}


_Python: Any = vars(pickle)["_Unpickler"]


class Unpickler(_Python):  # type: ignore[misc]
    """Python's unpickler in Python (large memo indices take no memory there) with nothing to call.

    Dictionaries keep string keys only: hashing a tuple that shares its parts can take exponential time.
    """

    dispatch: ClassVar[Dict[int, Any]] = dict(_Python.dispatch)

    def __init__(self, file: Any, **_: Any) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")

    def find_class(self, module: str, name: str) -> Any:
        """Looks nothing up."""
        full = f"{module}.{name}"
        return _KNOWN.get(full) or Foreign(full)

    def get_extension(self, code: int) -> None:
        """Looks nothing up in ``copyreg``."""
        self.append(Foreign("copyreg extension"))

    def bytes_of(self, key: str) -> int:
        """How many bytes the file can hold of a storage."""
        return 0

    def _persistent(self) -> None:
        """``("storage", type, key, device, numel, view)`` as PyTorch refers to a storage, or a ``Foreign``."""
        reference = self.stack.pop()
        if type(reference) is tuple and len(reference) >= 5 and reference[0] == "storage":
            kind, key, _, numel = reference[1:5]
            is_view = len(reference) > 5 and reference[5] is not None
            if type(kind).__name__ == "StorageType" and type(key) is str and type(numel) is int and not is_view:
                if not 0 <= numel * kind.dtype.itemsize <= self.bytes_of(key):
                    raise MalformedError(f"is truncated or damaged: its storage {key[:80]!a} is missing or too short")
                self.append(self.persistent_load(("storage", kind, key, "cpu", *reference[4:])))
                return
        self.append(Foreign("persistent reference"))

    def _persistent_line(self) -> None:
        self.readline()
        self.append(Foreign("persistent reference"))

    def _store(self, items: List[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Foreign:
            target = target.items
        if type(target) is not dict:
            raise MalformedError("is damaged: its pickle stores items in what is not a dictionary")
        target.update((key, value) for key, value in zip(items[::2], items[1::2]) if type(key) is str)

    def _set_item(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._store(items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._store(items)

    def _frozen_set(self) -> None:
        self.pop_mark()
        self.append(Foreign("builtins.set"))

    def _new_object_with_keywords(self) -> None:
        self.stack.pop()
        self.load_reduce()

    dispatch[pickle.PERSID[0]] = _persistent_line
    dispatch[pickle.BINPERSID[0]] = _persistent
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._store(self.pop_mark())
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.EMPTY_SET[0]] = lambda self: self.append(Foreign("builtins.set"))
    dispatch[pickle.ADDITEMS[0]] = lambda self: self.pop_mark()
    dispatch[pickle.FROZENSET[0]] = _frozen_set
    dispatch[pickle.BUILD[0]] = lambda self: self.stack.pop()  # an object's attributes: nothing needs them
    dispatch[pickle.NEWOBJ[0]] = _Python.load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = _new_object_with_keywords
    dispatch[pickle.FRAME[0]] = lambda self: self.read(8)
    # The standard handler makes an array of the length that is claimed.
    dispatch[pickle.BYTEARRAY8[0]] = _Python.load_binbytes8


def require(module: str) -> Any:
    """Imports torch or safetensors when first needed.

    Raises:
        MissingDependencyError: it is absent.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(module.split(".")[0], "export", "reading a checkpoint") from None


def is_torch(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is of one of PyTorch's two formats."""
    try:
        return head[:2] == b"PK" or (head[:1] == b"\x80" and Unpickler(PickleStream(head)).load() == _LEGACY)
    except Exception:
        return False


def load_torch(path: Path) -> Any:
    """Reads a file of PyTorch's zip format (since 1.6), or of the older stream of pickles and storages.

    Returns:
        What was saved: plain Python values and ``torch.Tensor`` on the CPU; everything that is neither plain nor
        known is ``Foreign``. Dictionary keys other than strings are dropped with their values.

    Raises:
        MalformedError: it is damaged, or of a kind that holds no weights.
        MissingDependencyError: torch is absent.
        Exception: what torch and pickle raise on streams that make no sense.
    """
    torch = require("torch")
    with open(path, "rb") as file:
        content = file.read()
    sizes: Dict[str, int] = {}
    zipped = content[:2] == b"PK"
    if zipped:
        content = _repacked(content, sizes)

    class Bounded(Unpickler):
        def bytes_of(self, key: str) -> int:
            return sizes.get(f"data/{key}", -1) if zipped else len(content)

    module: Any = types.ModuleType("inert")
    module.Unpickler = Bounded
    module.load = lambda file, **_: Bounded(file).load()
    return torch.load(PickleStream(content), map_location="cpu", pickle_module=module, weights_only=False)


def _repacked(content: bytes, sizes: Dict[str, int]) -> bytes:
    """A zip archive with the checkpoint's records only, so that torch sees what was checked here.

    ``sizes`` is filled with the records' sizes.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(packed, "w") as target:
        records = {info.filename: info for info in archive.infolist()}
        # PyTorch stores records side by side and uncompressed; anything else can claim to unpack to any size.
        if sum(info.file_size for info in records.values()) > len(content):
            raise MalformedError("is damaged: its records claim to be larger than the file")
        root = next((name[: -len("data.pkl")] for name in records if f"/{name}".endswith("/data.pkl")), None)
        if root is None:
            raise MalformedError("is a zip archive but not a PyTorch checkpoint (no data.pkl inside)")
        if root + "constants.pkl" in records:
            raise MalformedError("is a TorchScript program: give the state_dict it was made of")
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise MalformedError("is a compressed zip archive, which PyTorch does not write: save it again")
            if not info.CRC:  # PyTorch can be told to write none (set_crc32_options): nothing to compare
                info.CRC = None  # type: ignore[assignment]
            if name.startswith(root):
                sizes[name[len(root) :]] = info.file_size
                target.writestr("archive/" + name[len(root) :], archive.read(info))
        if root + "version" not in records:
            target.writestr("archive/version", "3\n")
    return packed.getvalue()
