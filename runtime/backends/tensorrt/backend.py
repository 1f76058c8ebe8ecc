"""The TensorRT backend: engines of an export in the device pipeline, TensorRT 8.5 to 11 and TensorRT-RTX.

One set of calls serves all versions: named tensors, no bindings by index. Features that some versions lack are
detected by name (``getattr``); version numbers are used only for differences that have no name.

An engine is machine code: it runs only with the TensorRT version and on the kind of GPU that it was built for. Its
key is in the manifest, beside its hash, and is compared before the engine is read. A deserialised engine is then
checked against the manifest, tensor by tensor, because the manifest determines the sizes of the buffers bound to it.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import NETWORKS, Manifest, TensorSpec, read_file
from asymtrack_edge.runtime.backends.cuda.driver import Gpu, find_gpu
from asymtrack_edge.runtime.backends.device import DeviceBackend, Network

logger = logging.getLogger("asymtrack_edge")

#: Increased whenever a change to how engines are built changes what they compute.
FORMAT = "2"

TENSORRT = "tensorrt"
RTX = "tensorrt-rtx"

#: Modules that provide a flavour, and the message if none is installed.
_FLAVOURS = {
    TENSORRT: (
        ("tensorrt",),
        "there is no TensorRT for Python here; on a Jetson it comes with JetPack (sudo apt install "
        "python3-libnvinfer; make virtual environments with --system-site-packages), elsewhere see docs/gpu.md",
    ),
    RTX: (
        ("tensorrt_rtx_bindings", "tensorrt_rtx"),
        "there is no TensorRT-RTX here; pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
}


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT."""

    module: Any
    flavour: str  # TENSORRT or RTX
    version: str  # of the library

    @property
    def name(self) -> str:
        """Flavour and version, for messages."""
        return f"{'TensorRT-RTX' if self.flavour == RTX else 'TensorRT'} {self.version}"


def flavour_of(platform: str) -> str:
    """The flavour that an export for ``platform`` is meant for."""
    return RTX if platform == "rtx" else TENSORRT


def load_tensorrt(flavour: str) -> TensorRT:
    """Imports a flavour; ``BackendError`` if it is not installed, too old, or its libraries cannot be loaded."""
    names, reason = _FLAVOURS[flavour]
    for name in names:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reason = f"{name} is installed, but does not load: {' '.join(str(error).split())}"
            continue
        if hasattr(module, "TensorIOMode"):
            return TensorRT(module, flavour, str(module.__version__))
        # An empty module of this name imports, too, if the library is absent.
        if hasattr(module, "Builder"):
            reason = f"TensorRT {module.__version__} is too old: install 8.5 (JetPack 5.1) or newer"
    raise BackendError(reason)


def collecting_logger(module: Any, warn: bool = False) -> Any:
    """A TensorRT ``ILogger`` that collects errors from now on; ``last_words`` gives the latest as one line.

    It prints nothing; with ``warn`` it passes warnings on to our log.
    """
    made = _logger_of(module)
    made.errors, made.warning, made.warn = [], "", warn
    return made


@lru_cache(maxsize=None)  # TensorRT takes one logger per process, and uses it until the process ends
def _logger_of(module: Any) -> Any:
    class CollectingLogger(module.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: List[str] = []
            self.warning, self.warn = "", False

        def log(self, severity: Any, message: str) -> None:
            message = " ".join(message.split())
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.errors.append(message)
            elif severity == module.ILogger.WARNING:
                self.warning = message  # from 8.6 on, also that CUDA cannot start
                if self.warn:
                    logger.warning("TensorRT: %s", message)

        def last_words(self, most: int = 3) -> str:
            return "; ".join(self.errors[-most:]) or self.warning or "it gave no reason"

    return CollectingLogger()


#: TensorRT-RTX compiles for a GPU on first use: one engine serves all GPUs from Ampere on; Turing needs another.
RTX_TURING = "7.5"
_RTX_BEFORE_12 = ((7, 5), (8, 0), (8, 6), (8, 9))

Key = Dict[str, str]


def batch_profile(manifest: Manifest, network: str) -> Tuple[int, int, int]:
    """Smallest, optimal and largest batch of a network; templates are always computed one at a time."""
    most = manifest.max_batch if network == "search" else 1
    return 1, most, most


def engine_key(manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Optional[Gpu]) -> Key:
    """The key of an engine for ``network`` built or run by ``tensorrt`` on ``gpu``, as the manifest holds it.

    ``gpu`` None, for TensorRT-RTX only, means any GPU from Ampere on.
    """
    if tensorrt.flavour == RTX:
        turing = gpu is not None and gpu.compute_capability == (7, 5)
        board = ("any", RTX_TURING if turing else "8.0+", "any", "any")
    else:
        assert gpu is not None
        capability = "{}.{}".format(*gpu.compute_capability)
        # Nominal memory, the next power of two: systems reserve different amounts for themselves.
        memory = str(1 << max(0, (gpu.memory - 1) >> 30).bit_length())
        board = (gpu.name, capability, str(gpu.multiprocessors), memory)
    return {
        "model_sha256": manifest.files[f"{network}.onnx"].sha256,
        "precision": manifest.precision,
        "batch": "{}-{}-{}".format(*batch_profile(manifest, network)),
        "flavour": tensorrt.flavour,
        "tensorrt": tensorrt.version,
        # Boards of one name (AGX Orin, Orin NX, Orin Nano) differ in the last two.
        **dict(zip(("gpu", "compute_capability", "multiprocessors", "memory_gb"), board)),
        "format": FORMAT,
    }


def engine_file(network: str, key: Key) -> str:
    """Name of an engine's file: one export may hold engines for Turing beside the portable ones."""
    turing = key["flavour"] == RTX and key["compute_capability"] == RTX_TURING
    return f"{network}-sm75.engine" if turing else f"{network}.engine"


def difference(recorded: Mapping[str, Any], wanted: Key) -> Optional[str]:
    """Why an engine with the recorded key cannot be used for ``wanted``, or None if it can."""
    for field, value in wanted.items():
        if recorded.get(field) != value:
            return f"its {field.replace('_', ' ')} is {recorded.get(field)!s:.32}, here {value:.32}"
    return None


def fitting_engine(manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Gpu) -> str:
    """Name of a network's engine file; ``BackendError`` if none fits this TensorRT and GPU."""
    if tensorrt.flavour == RTX and gpu.compute_capability < (12, 0) and gpu.compute_capability not in _RTX_BEFORE_12:
        raise BackendError(
            "TensorRT-RTX does not run on {2} (compute capability {0}.{1}): it supports 7.5, 8.0, 8.6, 8.9 and "
            "12.0 or newer; use --target orin or --backend onnxruntime-cuda".format(*gpu.compute_capability, gpu.name)
        )
    key = engine_key(manifest, network, tensorrt, gpu)
    name = engine_file(network, key)
    if name not in manifest.engines or name not in manifest.files:
        fp16 = "sm75" not in name or manifest.precision == "fp16"
        mend = "build it here with asymtrack-build" if fp16 else "only exports with --fp16 have one"
        raise BackendError(f"the export has no {name}: {mend}")
    reason = difference(manifest.engines[name], key)
    if reason is not None:
        raise BackendError(f"{name} does not fit, {reason}: build it here with asymtrack-build")
    return name


class TensorRTBackend(DeviceBackend):
    """Runs a model directory's engines on one GPU; ``BackendError`` without GPU, TensorRT or engines that fit."""

    name = "tensorrt"

    def __init__(self, folder: Path, manifest: Manifest, device: int = 0) -> None:
        if manifest.platform == "onnx":
            raise BackendError("the model is for ONNX Runtime: export with --target orin, xavier or rtx")
        self._folder, gpu = folder, find_gpu(device)
        self._tensorrt = load_tensorrt(flavour_of(manifest.platform))
        # Checked before anything is allocated on the GPU.
        self._engines = {name: fitting_engine(manifest, name, self._tensorrt, gpu) for name in NETWORKS}
        super().__init__(manifest, f"{self._tensorrt.name} on {gpu.name}", device)

    def _open_network(self, name: str) -> Network:
        file = self._engines[name]
        # Deserialising runs code from the file, so its hash is checked first.
        content = read_file(self._folder, file, self.manifest.files[file])
        return TensorRTNetwork(content, file, self.manifest, name, self._tensorrt, self.cuda.stream)


class TensorRTNetwork(Network):
    """An engine of the export, from the content of its file; the GPU's context must be current.

    ``BackendError`` if it cannot be loaded, or its tensors are not the manifest's.
    """

    def __init__(
        self, content: bytes, file: str, manifest: Manifest, network: str, tensorrt: TensorRT, stream: int
    ) -> None:
        self._tensorrt, self._trt, self._stream = tensorrt, tensorrt.module, stream
        self._name = file
        self._logger = collecting_logger(self._trt, warn=True)
        try:
            self._runtime = self._trt.Runtime(self._logger)
        except TypeError:  # "factory function returned nullptr": what the binding says if CUDA cannot start
            self._runtime = None
        self.engine = self._deserialise(content)
        self._inputs, outputs = manifest.tensors(network)
        self._check(self._inputs, self._trt.TensorIOMode.INPUT)
        self._check(outputs, self._trt.TensorIOMode.OUTPUT)
        self._dynamic = self.engine.get_tensor_shape(self._inputs[0].name)[0] < 0
        # Before TensorRT 10, the contexts of an engine with a free batch cannot share its optimization profile.
        one_context = self._dynamic and tensorrt.flavour != RTX and int(tensorrt.version.partition(".")[0]) < 10
        self._content = content if one_context else b""

    def _deserialise(self, content: bytes) -> Any:
        engine = self._runtime and self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise BackendError(
                f"{self._tensorrt.name} cannot load {self._name}: {self._logger.last_words()}; the driver may be too "
                "old; if not, build it here with asymtrack-build --rebuild"
            )
        return engine

    def _check(self, specs: Sequence[TensorSpec], mode: Any) -> None:
        """Compares the engine's tensors with the manifest's, which size the buffers."""
        engine = self.engine
        ours = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8"}  # trt.nptype of 8.5 breaks with numpy 1.24
        dtypes = {getattr(self._trt.DataType, theirs, theirs): name for theirs, name in ours.items()}
        found = {
            (name, str(dtypes.get(engine.get_tensor_dtype(name))), tuple(engine.get_tensor_shape(name))[1:])
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_mode(name) == mode
        }
        for name, dtype, shape in found.symmetric_difference((spec.name, spec.dtype, spec.shape) for spec in specs):
            place = "engine" if (name, dtype, shape) in found else "manifest"
            raise BackendError(f"{self._name}: only the {place} has {name} as {dtype} {shape}: build it again")

    def bind(self, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        """Makes an execution context per binding: a captured graph must not see its context change."""
        name, stream, last_words = self._name, self._stream, self._logger.last_words
        context = self._new_context()
        if context is None:
            raise BackendError(f"{name} cannot get the memory to run: {last_words()}")
        for spec in self._inputs if self._dynamic else ():
            if not context.set_input_shape(spec.name, (batch, *spec.shape)):
                raise BackendError(f"{name} does not take {spec.name} for {batch} targets: {last_words()}")
        for tensor, address in addresses.items():
            if not context.set_tensor_address(tensor, address):
                raise BackendError(f"{name} does not take an address for {tensor}: {last_words()}")

        def run() -> None:
            if not context.execute_async_v3(stream):
                raise BackendError(f"{name} failed to run: {last_words()}")

        return run

    def _new_context(self) -> Any:
        engine = self._deserialise(self._content) if self._content else self.engine
        if not hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context()
        # TensorRT-RTX would begin with fallback kernels, and a captured graph would keep them forever.
        made = engine.create_runtime_config()
        made.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return engine.create_execution_context(made)

    def close(self) -> None:
        """Releases the engine."""
        del self.engine, self._runtime
