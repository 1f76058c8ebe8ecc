"""TensorRT in its flavours and versions: import, messages, data types.

One set of calls serves TensorRT 8.5 to 11 and TensorRT-RTX: named tensors, no bindings by index.
What some versions lack is asked for with ``getattr``; version numbers tell only what has no name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

from asymtrack_edge.errors import BackendError

TENSORRT = "tensorrt"
RTX = "tensorrt-rtx"

#: Modules that bring a flavour, and what to do where none is installed.
_FLAVOURS: Dict[str, Tuple[Tuple[str, ...], str]] = {
    TENSORRT: (
        ("tensorrt",),
        "there is no TensorRT for Python here; on a Jetson it comes with JetPack (sudo apt install "
        "python3-libnvinfer; make virtual environments with --system-site-packages)",
    ),
    RTX: (
        ("tensorrt_rtx_bindings", "tensorrt_rtx"),
        "there is no TensorRT-RTX here; pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
}

#: Our names of data types by TensorRT's. ``trt.nptype`` is not used: 8.5's breaks with numpy 1.24.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "BOOL": "bool"}


class NoTensorRTError(BackendError):
    """The TensorRT that is needed is not installed."""


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        module: its Python module.
        flavour: ``TENSORRT`` or ``RTX``.
        version: of the library.
    """

    module: Any
    flavour: str
    version: str

    @property
    def name(self) -> str:
        """Flavour and version, for people."""
        return f"{'TensorRT-RTX' if self.flavour == RTX else 'TensorRT'} {self.version}"

    @property
    def shares_profiles(self) -> bool:
        """Whether several contexts of one engine may use its one optimization profile (TensorRT 10)."""
        return self.flavour == RTX or int(self.version.partition(".")[0]) >= 10


def flavour_of(target: str) -> str:
    """The flavour that an export for ``target`` is meant for."""
    return RTX if target == "rtx" else TENSORRT


def load_tensorrt(flavour: str) -> TensorRT:
    """Imports a flavour.

    Raises:
        NoTensorRTError: it is not installed, or its libraries cannot be loaded.
    """
    names, advice = _FLAVOURS[flavour]
    for name in names:
        try:
            module = importlib.import_module(name)
            # A namesake without the library behind it imports, but has nothing in it.
            if hasattr(module, "Builder"):
                return TensorRT(module, flavour, str(module.__version__))
        except (ImportError, OSError, RuntimeError):
            continue
    raise NoTensorRTError(advice)


def dtype_name(module: Any, dtype: Any) -> str:
    """The name that numpy has for a TensorRT data type; else the type's own."""
    for theirs, ours in _DTYPES.items():
        if dtype == getattr(module.DataType, theirs, None):
            return ours
    return str(dtype)


def collecting_logger(module: Any) -> Any:
    """A TensorRT logger that keeps errors and warnings for the caller instead of printing them.

    Returns:
        An ``ILogger`` with the lists of messages ``errors`` and ``warnings``.
    """
    errors_of = (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)

    class CollectingLogger(module.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: List[str] = []
            self.warnings: List[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in errors_of:
                self.errors.append(message)
            elif severity == module.ILogger.WARNING:
                self.warnings.append(message)

    return CollectingLogger()


def last_words(messages: List[str], most: int = 3) -> str:
    """The last few messages as one line."""
    kept = [" ".join(message.split()) for message in messages[-most:]]
    return "; ".join(kept) if kept else "it gave no reason"
