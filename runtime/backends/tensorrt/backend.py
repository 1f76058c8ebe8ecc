"""The TensorRT backend: engines of an export in the device pipeline, TensorRT 8.5 to 11 and TensorRT-RTX.

A deserialised engine is checked against the manifest tensor by tensor, because the manifest is what the
buffers bound to it are sized by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import FLOAT_RGB, Manifest, TensorSpec, check_file
from asymtrack_edge.runtime.backends.cuda.driver import find_gpu
from asymtrack_edge.runtime.backends.device import DeviceBackend, Network
from asymtrack_edge.runtime.backends.tensorrt.library import (
    NETWORKS,
    TensorRT,
    collecting_logger,
    dtype_name,
    fitting_engine,
    flavour_of,
    last_words,
    load_tensorrt,
    pass_warnings_on,
)


class TensorRTBackend(DeviceBackend):
    """Engines of a model directory on one GPU; ``BackendError`` without GPU, TensorRT or an engine that fits them."""

    name = "tensorrt"

    def __init__(self, folder: Path, manifest: Manifest, device: int = 0, graph: bool = True) -> None:
        if manifest.input_format != FLOAT_RGB:
            raise BackendError(
                f"the model takes {manifest.input_format}, which is for ONNX Runtime: "
                "export with --target orin, xavier or rtx"
            )
        self._folder, gpu = folder, find_gpu(device)
        self._tensorrt = load_tensorrt(flavour_of(manifest.target))
        # Before anything of the GPU is taken.
        self._engines = {name: fitting_engine(manifest, name, self._tensorrt, gpu) for name in NETWORKS}
        super().__init__(manifest, f"{self._tensorrt.name} on {gpu.name}", device, graph)

    def _open_network(self, name: str, graph: bool) -> Network:
        file = self._engines[name]
        # Deserialising runs code from the file: not before its hash has been checked.
        content = check_file(self._folder, file, self.manifest.files[file]).read_bytes()
        return TensorRTNetwork(content, file, self.manifest, name, self._tensorrt, self.cuda.stream)


class TensorRTNetwork(Network):
    """An engine of the export, from the content of its file; the GPU's context has to be current.

    ``BackendError`` if it cannot be loaded, or its tensors are not the manifest's.
    """

    def __init__(
        self, content: bytes, file: str, manifest: Manifest, network: str, tensorrt: TensorRT, stream: int
    ) -> None:
        self._tensorrt, self._trt, self._stream = tensorrt, tensorrt.module, stream
        trt = tensorrt.module
        self._name, self._content = file, content
        self._logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._deserialise()
        image = manifest.template if network == "template" else manifest.search
        self._inputs = [image] if network == "template" else [image, *manifest.state]
        self._check(trt, self._inputs, trt.TensorIOMode.INPUT)
        self._check(trt, manifest.state if network == "template" else [manifest.output], trt.TensorIOMode.OUTPUT)
        self._dynamic = self.engine.get_tensor_shape(image.name)[0] < 0
        # Before TensorRT 10 the contexts of an engine with a free batch cannot share its optimization profile.
        self._one_context = self._dynamic and not tensorrt.shares_profiles
        self._free: Any = self.engine
        if not self._one_context:
            self._content = b""

    def _deserialise(self) -> Any:
        engine = self._runtime.deserialize_cuda_engine(self._content)
        pass_warnings_on(self._logger)
        if engine is None:
            raise BackendError(
                f"{self._tensorrt.name} cannot load {self._name}: {last_words(self._logger.errors)}; build it here "
                "with asymtrack-build --rebuild"
            )
        return engine

    def _check(self, trt: Any, specs: Sequence[TensorSpec], mode: Any) -> None:
        """Compares the engine's tensors with the manifest's: buffers are sized by the latter."""
        engine = self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        names = [name for name in names if engine.get_tensor_mode(name) == mode]
        if sorted(names) != sorted(spec.name for spec in specs):
            raise BackendError(f"{self._name} has the tensors {names}, the manifest others: build it again")
        for spec in specs:
            dtype = dtype_name(trt, engine.get_tensor_dtype(spec.name))
            shape = tuple(engine.get_tensor_shape(spec.name))[1:]
            if (dtype, shape) != (spec.dtype, spec.shape):
                raise BackendError(
                    f"{self._name}: {spec.name} is {dtype} {shape}, the manifest says {spec.dtype} "
                    f"{spec.shape}: build it again"
                )

    def bind(self, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        """Makes an execution context of its own: a captured graph must not see its context change."""
        context = self._new_context()
        if context is None:
            raise BackendError(f"{self._name} got no memory to run in: {last_words(self._logger.errors)}")
        if self._dynamic:
            for spec in self._inputs:
                shape = (batch, *spec.shape)
                if not context.set_input_shape(spec.name, shape):
                    raise BackendError(f"{self._name} does not take {spec.name} of shape {shape}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise BackendError(
                    f"{self._name} does not take an address for {name}: {last_words(self._logger.errors)}"
                )
        name, errors, stream = self._name, self._logger.errors, self._stream

        def run() -> None:
            if not context.execute_async_v3(stream):
                raise BackendError(f"{name} failed to run: {last_words(errors)}")

        return run

    def _new_context(self) -> Any:
        engine = self.engine
        if self._one_context:
            engine, self._free = self._free or self._deserialise(), None
        if not hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context()
        # TensorRT-RTX would begin with makeshift kernels, and a captured graph would keep them for good.
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return engine.create_execution_context(config)

    def close(self) -> None:
        """Gives the engine back."""
        del self.engine, self._free, self._runtime
