"""The engines of an export: which file fits this TensorRT and GPU, loaded and checked.

A deserialised engine is checked against the manifest tensor by tensor, because the manifest is what
the buffers bound to it are sized by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import numpy as np

from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import Manifest, TensorSpec, check_file
from asymtrack_edge.runtime.backends.cuda.gpu import Gpu
from asymtrack_edge.runtime.backends.tensorrt.key import difference, engine_file, engine_key
from asymtrack_edge.runtime.backends.tensorrt.library import TensorRT, collecting_logger, dtype_name, last_words


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor for one target."""
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


def fitting_engine(manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Gpu) -> str:
    """Name of the engine to load.

    Args:
        manifest: of the export.
        network: ``"template"`` or ``"search"``.
        tensorrt: the library here.
        gpu: the GPU to run on.

    Raises:
        BackendError: there is none, or not one for this TensorRT and GPU.
    """
    key = engine_key(manifest, network, tensorrt, gpu)
    name = engine_file(network, key)
    if name not in manifest.engines or name not in manifest.files:
        raise BackendError(f"the export has no {name}: build it here with asymtrack-build")
    reason = difference(manifest.engines[name], key)
    if reason is not None:
        raise BackendError(f"{name} does not fit, {reason}: build it here with asymtrack-build")
    return name


class Network:
    """An engine of the export, checked and deserialised.

    Args:
        folder: the export directory.
        manifest: its manifest.
        network: ``"template"`` or ``"search"``.
        tensorrt: the library here.
        gpu: the GPU to run on, whose context is current.

    Attributes:
        engine: TensorRT's ``ICudaEngine``.
        inputs: names of the inputs, the image first.
        dynamic: whether the batch is free.

    Raises:
        BackendError: no engine fits, it cannot be loaded, or its tensors are not the manifest's.
        ManifestError: the file is missing or not the one the manifest describes.
    """

    def __init__(self, folder: Path, manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Gpu) -> None:
        trt = self._trt = tensorrt.module
        name = fitting_engine(manifest, network, tensorrt, gpu)
        # Deserialising runs code from the file: not before its hash has been checked.
        content = check_file(folder, name, manifest.files[name]).read_bytes()
        self._logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise BackendError(
                f"{tensorrt.name} cannot load {name}: {last_words(self._logger.errors)}; build it here "
                "with asymtrack-build --rebuild"
            )
        self._name = name
        image = manifest.template if network == "template" else manifest.search
        inputs = [image] if network == "template" else [image, *manifest.state]
        outputs = list(manifest.state) if network == "template" else [manifest.output]
        self.inputs = [spec.name for spec in inputs]
        self._check(trt, inputs, trt.TensorIOMode.INPUT)
        self._check(trt, outputs, trt.TensorIOMode.OUTPUT)
        self.dynamic = self.engine.get_tensor_shape(self.inputs[0])[0] < 0

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

    def context(self, shapes: Mapping[str, Sequence[int]], addresses: Dict[str, int]) -> Any:
        """An execution context with shapes and addresses set.

        Args:
            shapes: of the inputs, batch included.
            addresses: in device memory, by tensor; those left out are set later.

        Raises:
            BackendError: there is no memory for it, or the engine does not take a shape.
        """
        context = self._new_context()
        if context is None:
            raise BackendError(f"{self._name} got no memory to run in: {last_words(self._logger.errors)}")
        self.set_shapes(context, shapes)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        return context

    def _new_context(self) -> Any:
        if not hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            return self.engine.create_execution_context()
        # TensorRT-RTX would begin with makeshift kernels, and a captured graph would keep them for good.
        config = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.engine.create_execution_context(config)

    def set_shapes(self, context: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        """Sets the inputs' shapes where the engine leaves the batch free.

        Raises:
            BackendError: the engine does not take one.
        """
        if not self.dynamic:
            return
        for name in self.inputs:
            if not context.set_input_shape(name, tuple(shapes[name])):
                raise BackendError(f"{self._name} does not take {name} of shape {tuple(shapes[name])}")

    def enqueue(self, context: Any, stream: int) -> None:
        """Queues one run on a stream.

        Raises:
            BackendError: TensorRT refuses; says what it logged.
        """
        if not context.execute_async_v3(stream):
            raise BackendError(f"{self._name} failed to run: {last_words(self._logger.errors)}")
