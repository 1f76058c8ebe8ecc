"""TensorRT backend: everything between the frame and five numbers happens on the GPU.

Per frame, one pinned copy of the part of the frame that the windows show, and one captured graph:
windows up (32 bytes per target), crop kernel, search engine, predictions down (20 bytes per target).
The template engine writes into the memory that the search engine reads. Nothing is allocated.

Targets live in groups of up to ``max_batch``; a group is one batch of the search engine, with its
own memory at fixed addresses, its own execution context and its own graph.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from asymtrack_edge.engine_key import difference, engine_file, engine_key
from asymtrack_edge.errors import EngineError
from asymtrack_edge.geometry import CropWindow, check_frame
from asymtrack_edge.gpu import Gpu, find_gpu
from asymtrack_edge.manifest import FLOAT_RGB, Manifest, TensorSpec, check_file
from asymtrack_edge.runtime import cuda_crop
from asymtrack_edge.runtime.cuda import CudaDevice, Graph, HostBuffer, open_cuda
from asymtrack_edge.runtime.cuda_compile import compile_kernel
from asymtrack_edge.runtime.device_frame import device_frame, is_device_frame
from asymtrack_edge.runtime.engine import Engine
from asymtrack_edge.trt import (
    TensorRT,
    collecting_logger,
    dtype_name,
    flavour_of,
    last_words,
    load_tensorrt,
)

#: TensorRT wants the addresses of tensors aligned to this.
ALIGNMENT = 256


def unfit(manifest: Manifest, device: int = 0) -> Optional[str]:
    """Why the TensorRT backend cannot run this export on a GPU here; None if it can."""
    if manifest.input_format != FLOAT_RGB:
        return f"the export takes {manifest.input_format}: it was made for ONNX Runtime"
    try:
        gpu = find_gpu(device)
        tensorrt = load_tensorrt(flavour_of(manifest.target))
        for network in ("template", "search"):
            _engine_name(manifest, network, tensorrt, gpu)
    except EngineError as error:
        return str(error)
    return None


def _engine_name(manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Gpu) -> str:
    """Name of the engine to load.

    Raises:
        EngineError: there is none, or not one for this TensorRT and GPU.
    """
    key = engine_key(manifest, network, tensorrt, gpu)
    name = engine_file(network, key)
    if name not in manifest.engines or name not in manifest.files:
        raise EngineError(f"the export has no {name}: build it here with asymtrack-build")
    reason = difference(manifest.engines[name], key)
    if reason is not None:
        raise EngineError(f"{name} does not fit, {reason}: build it here with asymtrack-build")
    return name


class Network:
    """An engine of the export, checked and deserialised."""

    def __init__(self, folder: Path, manifest: Manifest, network: str, tensorrt: TensorRT, gpu: Gpu) -> None:
        trt = tensorrt.module
        name = _engine_name(manifest, network, tensorrt, gpu)
        # Deserialising runs code from the file: not before its hash has been checked.
        content = check_file(folder, name, manifest.files[name]).read_bytes()
        self.logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self.logger)
        self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise EngineError(
                f"{tensorrt.name} cannot load {name}: {last_words(self.logger.errors)}; build it here "
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
            raise EngineError(f"{self._name} has the tensors {names}, the manifest others: build it again")
        for spec in specs:
            dtype = dtype_name(trt, engine.get_tensor_dtype(spec.name))
            shape = tuple(engine.get_tensor_shape(spec.name))[1:]
            if (dtype, shape) != (spec.dtype, spec.shape):
                raise EngineError(
                    f"{self._name}: {spec.name} is {dtype} {shape}, the manifest says {spec.dtype} "
                    f"{spec.shape}: build it again"
                )

    def context(self, shapes: Mapping[str, Sequence[int]], addresses: Dict[str, int]) -> Any:
        """An execution context with shapes and addresses set.

        Args:
            shapes: of the inputs, batch included.
            addresses: of all tensors.
        """
        context = self.engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self._name} got no memory to run in: {last_words(self.logger.errors)}")
        self.set_shapes(context, shapes)
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        return context

    def set_shapes(self, context: Any, shapes: Mapping[str, Sequence[int]]) -> None:
        """Sets the inputs' shapes where the engine leaves the batch free."""
        if not self.dynamic:
            return
        for name in self.inputs:
            if not context.set_input_shape(name, tuple(shapes[name])):
                raise EngineError(f"{self._name} does not take {name} of shape {tuple(shapes[name])}")

    def enqueue(self, context: Any, stream: int) -> None:
        """Queues one run on a stream."""
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self._name} failed to run: {last_words(self.logger.errors)}")


class _Group:
    """Up to ``max_batch`` targets that run as one batch: memory, context, graph."""

    def __init__(self, owner: TensorRTEngine, mapped: bool) -> None:
        manifest, cuda = owner.manifest, owner.cuda
        self._owner = owner
        size = manifest.max_batch
        self.state = {spec.name: cuda.allocate(size * nbytes(spec)) for spec in manifest.state}
        self._image = cuda.allocate(size * nbytes(manifest.search))
        self._output = cuda.allocate(size * nbytes(manifest.output))
        # The windows are read by the kernel where they are written, if the GPU shares our memory.
        self._host = cuda.pinned(size * cuda_crop.WINDOW.itemsize, mapped)
        self._device = self._host.device_address or cuda.allocate(self._host.array.nbytes)
        self.windows = self._host.array.view(cuda_crop.WINDOW)
        self._answers = cuda.pinned(size * nbytes(manifest.output)).array.view(np.float32).reshape(size, -1)
        self._addresses = {
            **self.state,
            manifest.search.name: self._image,
            manifest.output.name: self._output,
        }
        self._count = 0
        self._context: Any = None
        self._graph: Optional[Graph] = None

    def run(self, count: int) -> np.ndarray:
        """Queues the step for the first ``count`` targets; returns where the answers will be."""
        if count != self._count:
            self._prepare(count)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._step()
        return self._answers[:count]

    def _prepare(self, count: int) -> None:
        """Sets the batch and captures the step: once, and again only when the number of targets changes."""
        owner = self._owner
        shapes = {s.name: (count, *s.shape) for s in (owner.manifest.search, *owner.manifest.state)}
        self.close_graph()
        self._count = 0
        if self._context is None:
            self._context = owner.search_network.context(shapes, self._addresses)
        else:
            owner.search_network.set_shapes(self._context, shapes)
        self._count = count
        if owner.use_graph:
            # TensorRT has to run once with these shapes before it can be captured.
            self._step()
            owner.cuda.synchronise()
            self._graph = owner.cuda.capture(self._step)
            owner.graphs = owner.graphs and self._graph is not None

    def close_graph(self) -> None:
        """Gives the graph back."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _step(self) -> None:
        owner, count = self._owner, self._count
        if not self._host.device_address:
            owner.cuda.upload(self._device, self._host.array[: count * cuda_crop.WINDOW.itemsize])
        owner.launch_crop(self._device, self._image, owner.manifest.search_size, count)
        owner.search_network.enqueue(self._context, owner.cuda.stream)
        owner.cuda.download(self._answers[:count], self._output)


class TensorRTEngine(Engine):
    """TensorRT 8.5 to 11, or TensorRT-RTX, on one GPU.

    ``seconds["crop"]`` counts the host's work until the frame is on its way, ``"infer"`` all the rest:
    the GPU crops, infers and decodes in one go.

    Args:
        folder: an export directory with engines.
        manifest: its manifest.
        device: index of the GPU.
        graph: whether to capture the per-frame step as a CUDA graph.

    Attributes:
        cuda: the GPU.
        search_network: the search engine.
        use_graph: as given.
        graphs: whether the last capture worked.

    Raises:
        EngineError: no GPU, no TensorRT, or no engine that fits them; says which.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: int = 0, graph: bool = True) -> None:
        if manifest.input_format != FLOAT_RGB:
            raise EngineError(
                f"the TensorRT backend takes {FLOAT_RGB} exports, this one has {manifest.input_format}: "
                "export with --target xavier, orin or rtx"
            )
        gpu = find_gpu(device)
        tensorrt = load_tensorrt(flavour_of(manifest.target))
        super().__init__(manifest, f"{tensorrt.name} on {gpu.name}")
        self.use_graph = graph
        self.graphs = graph
        self.cuda: CudaDevice = open_cuda(device)
        self._groups: List[_Group] = []
        self._frame = _FrameBuffer(self.cuda)
        self._predictions = np.zeros((0, 5), np.float32)
        try:
            with self.cuda.current():
                self._open(folder, tensorrt, gpu)
            self.reserve(1)
        except BaseException:
            self.cuda.close()
            raise

    def _open(self, folder: Path, tensorrt: TensorRT, gpu: Gpu) -> None:
        manifest, cuda = self.manifest, self.cuda
        template = Network(folder, manifest, "template", tensorrt, gpu)
        self.search_network = Network(folder, manifest, "search", tensorrt, gpu)
        module = compile_kernel(cuda_crop.SOURCE, gpu.compute_capability)
        self._kernel = cuda.kernel(module, cuda_crop.KERNEL, "PPiffffff")
        self._normalisation = cuda_crop.normalisation(manifest)
        self._template_network = template
        self._template_image = cuda.allocate(nbytes(manifest.template))
        self._template_host = cuda.pinned(cuda_crop.WINDOW.itemsize, gpu.integrated)
        self._template_window = self._template_host.device_address or cuda.allocate(cuda_crop.WINDOW.itemsize)
        # Where a slot's part of a state tensor is not aligned, the template engine writes here first.
        self._aside = {s.name: cuda.allocate(nbytes(s)) for s in manifest.state if nbytes(s) % ALIGNMENT}
        shapes = {manifest.template.name: (1, *manifest.template.shape)}
        self._template_context = template.context(shapes, {manifest.template.name: self._template_image})

    def check_frame(self, frame: Any) -> Sequence[int]:
        """See ``Engine.check_frame``; frames in device memory are taken as well."""
        if is_device_frame(frame):
            return device_frame(frame, self.cuda.stream).shape
        return check_frame(frame).shape

    def reserve(self, slots: int) -> None:
        """See ``Engine.reserve``: groups are added, those that exist stay as they are."""
        batch = self.manifest.max_batch
        with self.cuda.current():
            while self.capacity < slots:
                self._groups.append(_Group(self, self.cuda.gpu.integrated))
                self.capacity += batch
        if len(self._predictions) < self.capacity:
            self._predictions = np.zeros((self.capacity, 5), np.float32)

    def template(self, frame: Any, window: CropWindow, slot: int = 0) -> None:
        """See ``Engine.template``."""
        if not 0 <= slot < self.capacity:
            raise EngineError(f"there is no slot {slot}: reserve it first")
        manifest, cuda = self.manifest, self.cuda
        group, row = divmod(slot, manifest.max_batch)
        with cuda.current():
            records = self._template_host.array.view(cuda_crop.WINDOW)
            self._frame.write(frame, (window,), (records,))
            if not self._template_host.device_address:
                cuda.upload(self._template_window, self._template_host.array)
            self.launch_crop(self._template_window, self._template_image, manifest.template_size, 1)
            late = []
            for spec in manifest.state:
                place = self._groups[group].state[spec.name] + row * nbytes(spec)
                if place % ALIGNMENT:
                    late.append((place, spec))
                target = self._aside[spec.name] if place % ALIGNMENT else place
                self._template_context.set_tensor_address(spec.name, target)
            self._template_network.enqueue(self._template_context, cuda.stream)
            for place, spec in late:
                cuda.copy(place, self._aside[spec.name], nbytes(spec))
            # The frame and the window's record may be overwritten as soon as we return.
            cuda.synchronise()

    def search(self, frame: Any, windows: Sequence[CropWindow]) -> np.ndarray:
        """See ``Engine.search``."""
        if len(windows) > self.capacity:
            raise EngineError(f"{len(windows)} windows for {self.capacity} slots: reserve them first")
        began = perf_counter()
        step = self.manifest.max_batch
        with self.cuda.current():
            parts = [windows[start : start + step] for start in range(0, len(windows), step)]
            self._frame.write(frame, windows, [group.windows for group in self._groups], step)
            cropped = perf_counter()
            answers = [group.run(len(part)) for group, part in zip(self._groups, parts)]
            self.cuda.synchronise()
        for i, answer in enumerate(answers):
            self._predictions[i * step : i * step + len(answer)] = answer
        self.seconds["crop"] += cropped - began
        self.seconds["infer"] += perf_counter() - cropped
        return self._predictions[: len(windows)]

    def move(self, source: int, target: int) -> None:
        """See ``Engine.move``."""
        batch = self.manifest.max_batch
        with self.cuda.current():
            for spec in self.manifest.state:
                size = nbytes(spec)
                to, of = (
                    self._groups[s // batch].state[spec.name] + s % batch * size for s in (target, source)
                )
                self.cuda.copy(to, of, size)
            self.cuda.synchronise()

    def launch_crop(self, windows: int, images: int, size: int, targets: int) -> None:
        """Queues the crop kernel; addresses are the device's."""
        arguments = (windows, images, size, *self._normalisation)
        self._kernel(cuda_crop.grid(size, targets), cuda_crop.BLOCK, arguments)

    def close(self) -> None:
        """See ``Engine.close``."""
        with self.cuda.current():
            self.cuda.synchronise()
            # Graphs, contexts and engines before the memory they were given.
            for group in self._groups:
                group.close_graph()
            self._groups.clear()
            for name in ("_template_context", "_template_network", "search_network"):
                with suppress(AttributeError):
                    delattr(self, name)
        self.cuda.close()
        self.capacity = 0


class _FrameBuffer:
    """Brings the part of a frame that windows show to where the GPU can read it."""

    def __init__(self, cuda: CudaDevice) -> None:
        self._cuda = cuda
        self._mapped = cuda.gpu.integrated
        self._host: Optional[HostBuffer] = None
        self._device = 0
        self._kept: Any = None

    def write(
        self, frame: Any, windows: Sequence[CropWindow], records: Sequence[np.ndarray], step: int = 1
    ) -> None:
        """Queues the upload of a frame and writes the records of its windows.

        Args:
            frame: on the host or on the device.
            windows: of all targets.
            records: where to write them, ``step`` to each array.
            step: see ``records``.
        """
        if is_device_frame(frame):
            there = device_frame(frame, self._cuda.stream)
            if there.stream is not None:
                self._cuda.wait_for(there.stream)
            pixels, pitch, shape = there.address, there.pitch, there.shape
            self._kept = there.owner
        else:
            pixels, pitch = self._upload(frame, windows)
            shape = frame.shape
        for i in range(0, len(windows), step):
            cuda_crop.write_windows(records[i // step], windows[i : i + step], pixels, pitch, shape)

    def _upload(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> Any:
        """Stages and uploads what the windows show; returns address of the frame's origin, and pitch."""
        left, top, right, bottom = cuda_crop.covered(windows, frame.shape)
        width, height = right - left, bottom - top
        if not width:
            return 0, 0
        self._grow(frame.nbytes)
        assert self._host is not None
        staged = self._host.array[: width * height * 3]
        np.copyto(staged.reshape(height, width, 3), frame[top:bottom, left:right])
        address = self._host.device_address
        if not address:
            self._cuda.upload(self._device, staged)
            address = self._device
        # Only pixels inside the staged part are read; the origin may lie before the buffer.
        return (address - top * width * 3 - left * 3) % 2**64, width * 3

    def _grow(self, size: int) -> None:
        """Makes room for a whole frame, so that frames of one size never allocate again."""
        if self._host is not None and self._host.array.nbytes >= size:
            return
        if self._host is not None:
            self._cuda.release(self._host)
            if not self._mapped:
                self._cuda.free(self._device)
        self._host = self._cuda.pinned(size, self._mapped)
        if not self._mapped:
            self._device = self._cuda.allocate(size)


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor for one target."""
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
