"""TensorRT backend: everything between the frame and five numbers happens on the GPU.

Per frame, one pinned copy of the part of the frame that the windows show, and one captured graph:
windows up (32 bytes per target), crop kernel, search engine, predictions down (20 bytes per target).
The template engine writes into the memory that the search engine reads. Nothing is allocated.

Targets live in groups of up to ``max_batch``; a group is one batch of the search engine
(``tensorrt_group``). The engines themselves are loaded by ``tensorrt_network``, frames brought up by
``cuda_frame``.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, List, Optional, Sequence

import numpy as np

from asymtrack_edge.errors import BackendError
from asymtrack_edge.geometry import CropWindow, check_frame
from asymtrack_edge.manifest import FLOAT_RGB, Manifest
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.cuda import crop as cuda_crop
from asymtrack_edge.runtime.backends.cuda.compile import compile_kernel
from asymtrack_edge.runtime.backends.cuda.device import CudaDevice, open_cuda
from asymtrack_edge.runtime.backends.cuda.device_frame import device_frame, is_device_frame
from asymtrack_edge.runtime.backends.cuda.frame import FrameBuffer
from asymtrack_edge.runtime.backends.cuda.gpu import Gpu, find_gpu
from asymtrack_edge.runtime.backends.tensorrt.group import TargetGroup
from asymtrack_edge.runtime.backends.tensorrt.library import TensorRT, flavour_of, load_tensorrt
from asymtrack_edge.runtime.backends.tensorrt.network import Network, fitting_engine, nbytes

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
            fitting_engine(manifest, network, tensorrt, gpu)
    except BackendError as error:
        return str(error)
    return None


class TensorRTBackend(Backend):
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
        use_graph: as ``graph`` was given.

    Raises:
        BackendError: no GPU, no TensorRT, or no engine that fits them; says which.
    """

    name = "tensorrt"

    def __init__(self, folder: Path, manifest: Manifest, device: int = 0, graph: bool = True) -> None:
        if manifest.input_format != FLOAT_RGB:
            raise BackendError(
                f"the TensorRT backend takes {FLOAT_RGB} exports, this one has {manifest.input_format}: "
                "export with --target xavier, orin or rtx"
            )
        gpu = find_gpu(device)
        tensorrt = load_tensorrt(flavour_of(manifest.target))
        super().__init__(manifest, f"{tensorrt.name} on {gpu.name}")
        self.use_graph = graph
        self.cuda: CudaDevice = open_cuda(device)
        self._groups: List[TargetGroup] = []
        self._frame = FrameBuffer(self.cuda)
        self._predictions = np.zeros((0, 5), np.float32)
        try:
            with self.cuda.current():
                self._open(folder, tensorrt, gpu)
            self.reserve(1)
        except BaseException as error:
            # What a failed call still holds of engines and contexts must go before the GPU's context does.
            traceback.clear_frames(error.__traceback__)
            with suppress(BackendError):
                self.close()
            raise

    @property
    def graphs(self) -> bool:
        """Whether the step runs as a graph: one is asked for and no capture failed."""
        return self.use_graph and all(group.captured for group in self._groups)

    def _open(self, folder: Path, tensorrt: TensorRT, gpu: Gpu) -> None:
        manifest, cuda = self.manifest, self.cuda
        template = Network(folder, manifest, "template", tensorrt, gpu)
        self.search_network = Network(folder, manifest, "search", tensorrt, gpu)
        module = compile_kernel(cuda_crop.SOURCE, gpu.compute_capability)
        self._kernel = cuda.kernel(module, cuda_crop.KERNEL, "PPiffffff")
        self._normalisation = cuda_crop.normalisation(manifest)
        self._template_network = template
        # Where contexts cannot share an engine's optimization profile, each group has an engine of its own.
        self._engine_per_group = self.search_network.dynamic and not tensorrt.shares_profiles
        self._another = partial(Network, folder, manifest, "search", tensorrt, gpu)
        self._template_image = cuda.allocate(nbytes(manifest.template))
        self._template_host = cuda.pinned(cuda_crop.WINDOW.itemsize, gpu.integrated)
        self._template_window = self._template_host.device_address or cuda.allocate(cuda_crop.WINDOW.itemsize)
        # Where a slot's part of a state tensor is not aligned, the template engine writes here first.
        self._aside = {s.name: cuda.allocate(nbytes(s)) for s in manifest.state if nbytes(s) % ALIGNMENT}
        shapes = {manifest.template.name: (1, *manifest.template.shape)}
        self._template_context = template.context(shapes, {manifest.template.name: self._template_image})

    def check_frame(self, frame: Any) -> Sequence[int]:
        """See ``Backend.check_frame``; frames in device memory are taken as well."""
        if is_device_frame(frame):
            return device_frame(frame, self.cuda.stream, self.cuda.gpu.index).shape
        return check_frame(frame).shape

    def reserve(self, slots: int) -> None:
        """See ``Backend.reserve``: groups are added, those that exist stay as they are."""
        batch = self.manifest.max_batch
        with self.cuda.current():
            while self.capacity < slots:
                network = self._another() if self._engine_per_group and self._groups else self.search_network
                self._groups.append(TargetGroup(self.manifest, self.cuda, network, self.launch_crop, self.use_graph))
                self.capacity += batch
        if len(self._predictions) < self.capacity:
            self._predictions = np.zeros((self.capacity, 5), np.float32)

    def template(self, frame: Any, window: CropWindow, slot: int = 0) -> None:
        """See ``Backend.template``."""
        if not 0 <= slot < self.capacity:
            raise BackendError(f"there is no slot {slot}: reserve it first")
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
        """See ``Backend.search``."""
        if len(windows) > self.capacity:
            raise BackendError(f"{len(windows)} windows for {self.capacity} slots: reserve them first")
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
        """See ``Backend.move``."""
        batch = self.manifest.max_batch
        with self.cuda.current():
            for spec in self.manifest.state:
                size = nbytes(spec)
                to, of = (self._groups[s // batch].state[spec.name] + s % batch * size for s in (target, source))
                self.cuda.copy(to, of, size)
            self.cuda.synchronise()

    def launch_crop(self, windows: int, images: int, size: int, targets: int) -> None:
        """Queues the crop kernel; addresses are the device's."""
        arguments = (windows, images, size, *self._normalisation)
        self._kernel(cuda_crop.grid(size, targets), cuda_crop.BLOCK, arguments)

    def close(self) -> None:
        """See ``Backend.close``."""
        with self.cuda.current():
            self.cuda.synchronise()
            # Graphs, contexts and engines before the memory they were given, and before the GPU's context.
            while self._groups:
                self._groups.pop().close_graph()
            for name in ("_template_context", "_template_network", "search_network"):
                with suppress(AttributeError):
                    delattr(self, name)
        self.cuda.close()
        self.capacity = 0
