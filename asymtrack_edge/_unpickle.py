"""Reads pickles without running anything in them.

The standard unpickler imports what a pickle names and calls it. This one interprets the opcodes
itself and knows no way to import or call: the few names that PyTorch uses to describe tensors and
ordered dictionaries are understood here, and every other class or function becomes a ``Foreign``.
It needs no torch; a tensor is a description of where its numbers lie.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

#: Bounds on time and memory: some seconds and some hundred MB. Weights and AdamW's moments of variant
#: T, the bulk of a published checkpoint, take 24,000 opcodes.
MAX_OPCODES = 2_000_000
MAX_LINE = 4096

_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


class MalformedError(ValueError):
    """A file whose contents cannot be what they claim to be; the message completes "FILE: ..."."""


class Foreign:
    """Stands for a class, function or object that is not admitted. It does nothing.

    Attributes:
        name: ``module.qualname`` of the class or function.
        items: what was stored into the object as into a dictionary (string keys only).
    """

    __slots__ = ("items", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.items: Optional[Dict[str, Any]] = None


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: torch name of their type, the storage's key, how many."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a view of a storage: offset and strides in elements. Bounds are not yet checked."""

    storage: Storage
    offset: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]

    def fits(self) -> bool:
        """Whether every element lies inside the storage, and none is there only by repetition."""
        numel, last = 1, self.offset
        for size, step in zip(self.shape, self.stride):
            if size < 0 or step < 0:
                return False
            numel *= size
            last += (size - 1) * step
        return self.offset >= 0 and (numel == 0 or last < self.storage.numel) and numel <= self.storage.numel


class PickleStream(io.BytesIO):
    """Bytes whose lines have a bounded length, as decimal numbers of megabytes take hours to convert."""

    def readline(self, size: Optional[int] = -1) -> bytes:
        """Reads up to and including the next newline, or ``MAX_LINE`` bytes."""
        return super().readline(MAX_LINE)


def unpickle(stream: PickleStream, storages: Optional[Dict[str, Storage]] = None) -> Any:
    """Reads one pickle from where ``stream`` stands, and leaves it behind the pickle's end.

    Args:
        stream: bytes that begin with a pickle of any protocol (0 to 5).
        storages: filled with every storage the pickle refers to, by key.

    Returns:
        Plain Python values, in which tensors are ``StoredTensor``, storages ``Storage`` and
        everything that is neither plain nor known is ``Foreign``. Sets are ``Foreign``, and
        dictionary keys other than strings are dropped with their values.

    Raises:
        MalformedError: this is not a pickle, or one of unreasonable size.
    """
    return _Machine({} if storages is None else storages).run(stream)


class _Machine:
    """The stack machine of the pickle protocols 0 to 5."""

    def __init__(self, storages: Dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: List[Any] = []
        self.below: List[List[Any]] = []  # stacks set aside by MARK
        self.memo: Dict[int, Any] = {}

    def run(self, stream: PickleStream) -> Any:
        count = 0
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                count += 1
                if count > MAX_OPCODES:
                    raise MalformedError("holds a pickle of unreasonable size")
                if opcode.name == "STOP":
                    return self.stack.pop()
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise MalformedError(f"holds a pickle with an unsupported opcode ({opcode.name})")
                handler(self, argument)
        except MalformedError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError) as error:
            # What pickletools and the handlers below raise on an opcode stream that makes no sense.
            raise MalformedError(f"truncated or damaged: its pickle ends in {type(error).__name__}") from None
        raise MalformedError("truncated or damaged: its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> List[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def drop(self) -> None:
        """POP removes the topmost value, or the mark if that is topmost."""
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def push_tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) < length:
            raise MalformedError("truncated or damaged: its pickle takes more values than it made")
        self.stack[-length:] = [items]

    def append(self, items: List[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Foreign:  # a foreign list: nothing needs its items
            raise MalformedError("damaged: its pickle appends to what is not a list")

    def set_items(self, items: List[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Foreign:
            if target.items is None:
                target.items = {}
            target = target.items
        if type(target) is not dict:
            raise MalformedError("damaged: its pickle stores items in what is not a dictionary")
        for key, value in zip(items[::2], items[1::2]):
            # Hashing a tuple that shares its parts can take exponential time, and integers can be
            # chosen to collide; tensors are named by strings.
            if type(key) is str:
                target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def dict_from_mark(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def frozen_set(self) -> None:
        self.pop_mark()
        self.push(Foreign("builtins.frozenset"))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push(Foreign(f"{module}.{name}" if type(module) is type(name) is str else "?"))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(_call(function, arguments))

    def new_object(self, keywords: bool) -> None:
        if keywords:
            self.pop()
        self.reduce()

    def build_from_mark(self) -> None:
        items = self.pop_mark()
        self.push(_call(items[0], tuple(items[1:])))

    def inst(self, name: str) -> None:
        self.pop_mark()
        self.push(Foreign(name.replace(" ", ".", 1)))

    def persistent(self) -> None:
        value = _persistent(self.pop())
        if type(value) is Storage:
            self.storages.setdefault(value.key, value)
        self.push(value)


def _call(function: Any, arguments: Any) -> Any:
    """What a call would make, without calling: a tensor, a dictionary or a ``Foreign``."""
    if type(function) is not Foreign:
        raise MalformedError("damaged: its pickle calls what is not a function")
    name = function.name
    if name in _DICTS:
        return {}
    if type(arguments) is tuple and arguments:
        if name == "torch.Size" and type(arguments[0]) in (tuple, list):
            return arguments[0]
        if name in _TENSORS:
            return _tensor(arguments) or Foreign(name)
        if name in _PARAMETERS and type(arguments[0]) is StoredTensor:
            return arguments[0]
    return Foreign(name)


def _tensor(arguments: Tuple[Any, ...]) -> Optional[StoredTensor]:
    """``(storage, offset, size, stride, ...)`` as PyTorch describes a tensor; None if it is not that."""
    if len(arguments) < 4 or type(arguments[0]) is not Storage or type(arguments[1]) is not int:
        return None
    shape, stride = arguments[2:4]
    for values in (shape, stride):
        if type(values) not in (tuple, list) or len(values) > 16 or any(type(v) is not int for v in values):
            return None
    if len(shape) != len(stride):
        return None
    return StoredTensor(arguments[0], arguments[1], tuple(shape), tuple(stride))


def _persistent(reference: Any) -> Any:
    """``("storage", type, key, device, numel, ...)`` as PyTorch refers to a storage, or a ``Foreign``."""
    if type(reference) is tuple and len(reference) >= 5 and reference[0] == "storage":
        kind, key, _, numel = reference[1:5]
        if type(kind) is Foreign and type(key) is str and type(numel) is int and numel >= 0:
            package, _, name = kind.name.rpartition(".")
            is_view = len(reference) > 5 and reference[5] is not None
            if package.split(".")[0] == "torch" and name in _DTYPES and not is_view:
                return Storage(_DTYPES[name], key, numel)
    return Foreign("persistent reference")


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.push(value)


_HANDLERS: Dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.push(Foreign("builtins.set")),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "FROZENSET": lambda m, _: m.frozen_set(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "DICT": lambda m, _: m.dict_from_mark(),
    "SETITEM": lambda m, _: m.set_item(),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    "GLOBAL": lambda m, name: m.push(Foreign(name.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "INST": lambda m, name: m.inst(name),
    "OBJ": lambda m, _: m.build_from_mark(),
    "NEWOBJ": lambda m, _: m.new_object(False),
    "NEWOBJ_EX": lambda m, _: m.new_object(True),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.pop(),  # an object's attributes: nothing needs them
    "PERSID": lambda m, _: m.push(Foreign("persistent reference")),
    "BINPERSID": lambda m, _: m.persistent(),
}
for _name in ("PUT", "BINPUT", "LONG_BINPUT"):
    _HANDLERS[_name] = lambda m, index: m.memo.__setitem__(index, m.stack[-1])
for _name in ("GET", "BINGET", "LONG_BINGET"):
    _HANDLERS[_name] = lambda m, index: m.push(m.memo[index])
for _name in ("EXT1", "EXT2", "EXT4"):
    _HANDLERS[_name] = lambda m, _: m.push(Foreign("copyreg extension"))
#: Opcodes that carry their value.
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
for _name in _LITERALS:
    _HANDLERS[_name] = lambda m, value: m.push(value)
