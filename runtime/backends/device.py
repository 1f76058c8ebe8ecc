"""The GPU pipeline from frame to predictions, around any network that runs on the GPU.

Each frame takes one copy, through pinned memory, of the part that the windows show (none if the frame is on
the GPU), and one step: upload of the windows (40 bytes per target), crop kernel, search network, download of
the predictions (20 bytes per target). The template state stays in device memory, where the search network reads
it. The step is captured as a CUDA graph, once per number of targets. No memory is allocated per frame.

Targets are kept in groups of up to ``max_batch``; a group is one batch of the search network.
"""

from __future__ import annotations

import traceback
import weakref
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np

from asymtrack_edge.errors import BackendError, UsageError
from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import NETWORKS, Manifest, TensorSpec
from asymtrack_edge.runtime.backends.base import Backend, nbytes
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.runtime.backends.cuda.driver import CAPTURE_LOCK, CudaDevice, Graph, open_cuda
from asymtrack_edge.runtime.backends.cuda.frame import FrameBuffer

#: Most steps that a group keeps, one per number of targets; the least recently used is dropped first.
KEPT = 8


class Network(ABC):
    """A network that runs on the GPU, on the stream it was opened with."""

    capturable = True  # whether what it queues can be captured as part of a CUDA graph
    graph = True  # whether everything queued so far runs as a CUDA graph

    @abstractmethod
    def bind(self, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        """Binds all tensors for a batch of targets to ``addresses`` in device memory, aligned to 256 bytes.

        Returns a function that queues one run. The binding is released with the function's last reference.
        ``BackendError`` if it cannot be bound, or (from the function) cannot run.
        """

    def close(self) -> None:  # noqa: B027 - most are released with their last reference
        """Releases the network, after everything that ``bind`` returned."""


class _Resources:
    """A backend's GPU resources. They hold no reference to the backend, so that they can be closed after it."""

    def __init__(self, cuda: CudaDevice) -> None:
        self.cuda = cuda
        self.groups: List[_Group] = []
        self.networks: Dict[str, Network] = {}
        self.run_template: Optional[Callable[[], None]] = None

    def close(self) -> None:
        """Closes the groups (runs, graphs and memory), then the networks, then other memory and the GPU's context."""
        with suppress(BackendError), self.cuda.current():  # nothing runs on a GPU that no longer answers
            self.cuda.synchronise()
        with CAPTURE_LOCK, self.cuda.current():
            while self.groups:
                self.groups.pop().close()
            self.run_template = None
            while self.networks:
                self.networks.popitem()[1].close()
        self.cuda.close()


class DeviceBackend(Backend):
    """Crops and runs a model on one GPU.

    ``seconds["crop"]`` is the host's time until the frame's upload is queued, ``"infer"`` all the rest: the
    GPU crops and infers in one step. A backend that is dropped without ``close`` releases everything, too.
    ``BackendError`` if the GPU or the model cannot be used.
    """

    def __init__(self, manifest: Manifest, description: str, device: int = 0) -> None:
        super().__init__(manifest, description)
        self.cuda = open_cuda(device)
        self.integrated = self.cuda.gpu.integrated
        self._open = _Resources(self.cuda)
        self._finalizer = weakref.finalize(self, self._open.close)
        self._predictions = np.zeros((0, 5), np.float32)
        try:
            self._prepare()
            self.reserve(1)
        except BaseException as error:
            # Networks and contexts that a failed call's frames still hold must go before the GPU's context does.
            traceback.clear_frames(error.__traceback__)
            self.close()
            raise

    @abstractmethod
    def _open_network(self, name: str) -> Network:
        """Opens the ``"template"`` or the ``"search"`` network on ``cuda``, whose context is current."""

    def _prepare(self) -> None:
        manifest, cuda = self.manifest, self.cuda
        with CAPTURE_LOCK, cuda.current():
            launch = kernel.load_crop(cuda)
            pixels = kernel.pixel_arguments(manifest)

            def crop(windows: int, images: int, size: int, targets: int) -> None:
                launch(kernel.grid(size, targets), kernel.BLOCK, (windows, images, size, *pixels))

            self._crop = crop
            self._frame = FrameBuffer(cuda)
            self._host_window = cuda.pinned(kernel.WINDOW.itemsize).array.view(kernel.WINDOW)
            self._device_window = cuda.allocate(kernel.WINDOW.itemsize)
            self._template_image = cuda.allocate(nbytes(manifest.template))
            # The template network writes here, because a slot's place in a batch may be unaligned.
            self._new_state = {spec.name: cuda.allocate(nbytes(spec)) for spec in manifest.state}
            for name in NETWORKS:
                self._open.networks[name] = self._open_network(name)
            bound = {manifest.template.name: self._template_image, **self._new_state}
            self._open.run_template = self._open.networks["template"].bind(bound, 1)

    def map_frames(self) -> None:
        """Lets an integrated GPU read frames where the CPU staged them, without a copy. Call it before the first frame.

        Such memory may be uncached, which can be slower than copying: ``asymtrack-bench speed`` measures both.
        """
        self._frame.mapped = self.integrated

    def check_frame(self, frame: Any) -> Any:
        """The frame may also be in device memory (array interface, DLPack): it is returned as a ``DeviceFrame``."""
        return self._frame.check(frame)

    def reserve(self, slots: int) -> None:
        """Makes room: the last group grows up to ``max_batch``, then new groups are added."""
        if not self._finalizer.alive:
            raise UsageError("this backend has been closed: open another")
        groups, batch = self._open.groups, self.manifest.max_batch
        with CAPTURE_LOCK, self.cuda.current():
            try:
                while self.capacity < slots:
                    last = groups[-1] if groups and groups[-1].size < batch else None
                    before = last.size if last is not None else 0
                    size = min(batch, before + slots - self.capacity)
                    if last is not None:
                        last.close_steps()
                    network = self._open.networks["search"]
                    grown = _Group(self.manifest, self.cuda, size, last, network, self._crop)
                    self.cuda.synchronise()
                    if last is not None:
                        groups.pop().close()
                    groups.append(grown)
                    self.capacity += size - before
            finally:
                self.cuda.synchronise()
        if len(self._predictions) < self.capacity:
            self._predictions = np.zeros((self.capacity, 5), np.float32)

    def template(self, frame: Any, window: CropWindow, slot: int = 0) -> None:
        """Crops and runs the template network, and copies its state to the slot in device memory."""
        if not 0 <= slot < self.capacity:
            raise BackendError(f"there is no slot {slot}: reserve it first")
        manifest, cuda, run = self.manifest, self.cuda, self._open.run_template
        assert run is not None
        with cuda.current():
            try:
                self._frame.write(frame, (window,), (self._host_window,))
                cuda.upload(self._device_window, self._host_window)
                self._crop(self._device_window, self._template_image, manifest.template_size, 1)
                run()
                for spec in manifest.state:
                    cuda.copy(self._state_address(spec, slot), self._new_state[spec.name], nbytes(spec))
            finally:
                # Even after an error: work in flight reads buffers that the next call overwrites.
                cuda.synchronise()

    def search(self, frame: Any, windows: Sequence[CropWindow]) -> np.ndarray:
        """Runs the step of every group that has windows; waits for the stream once."""
        if len(windows) > self.capacity:
            raise BackendError(f"{len(windows)} windows for {self.capacity} slots: reserve them first")
        began = perf_counter()
        groups, step = self._open.groups, self.manifest.max_batch
        parts = [windows[start : start + step] for start in range(0, len(windows), step)]
        with self.cuda.current():
            try:
                self._frame.write(frame, windows, [group.windows for group in groups], step)
                cropped = perf_counter()
                predictions = [group.run(len(part)) for group, part in zip(groups, parts)]
            finally:
                self.cuda.synchronise()
        for i, prediction in enumerate(predictions):
            self._predictions[i * step : i * step + len(prediction)] = prediction
        self.seconds["crop"] += cropped - began
        self.seconds["infer"] += perf_counter() - cropped
        return self._predictions[: len(windows)]

    def move(self, source: int, to: int) -> None:
        """Copies the state in device memory."""
        with self.cuda.current():
            try:
                for spec in self.manifest.state:
                    self.cuda.copy(self._state_address(spec, to), self._state_address(spec, source), nbytes(spec))
            finally:
                self.cuda.synchronise()

    def _state_address(self, spec: TensorSpec, slot: int) -> int:
        group, row = divmod(slot, self.manifest.max_batch)
        return self._open.groups[group].state[spec.name] + row * nbytes(spec)

    def close(self) -> None:
        """Releases networks, memory and the GPU's context; calling it again does nothing."""
        self._finalizer()
        self.capacity = 0


class _Group:
    """Up to ``max_batch`` targets that run as one batch: their memory, and a step per number of targets.

    All addresses are fixed when the group is made, so that a step is bound and captured once. The GPU's context
    must be current whenever a group is made or used.

    Args:
        size: targets to make room for.
        before: a smaller group whose state is copied.
        network: the search network.
        crop: queues the crop kernel; takes device addresses of windows and images, crop side, number of targets.

    Attributes:
        state: device address of each state tensor, one target after another.
        windows: ``kernel.WINDOW`` records ``(size,)``, read by ``run``.
    """

    def __init__(
        self,
        manifest: Manifest,
        cuda: CudaDevice,
        size: int,
        before: Optional[_Group],
        network: Network,
        crop: Callable[[int, int, int, int], None],
    ) -> None:
        self.size = size
        self._network, self._crop = network, crop
        self._manifest = manifest
        self._cuda = cuda
        self._steps: Dict[int, Callable[[], None]] = {}
        self._memory: List[int] = []  # addresses
        try:
            self.state = {spec.name: self._allocate(size * nbytes(spec)) for spec in manifest.state}
            self._image = self._allocate(size * nbytes(manifest.search))
            self._output = self._allocate(size * nbytes(manifest.output))
            self.windows = self._pinned(size * kernel.WINDOW.itemsize).view(kernel.WINDOW)
            self._device_windows = self._allocate(self.windows.nbytes)
            self._predictions = self._pinned(size * nbytes(manifest.output)).view(np.float32).reshape(size, -1)
        except BackendError:  # not enough memory: the backend remains usable
            self.close()
            raise
        if before is not None:
            for spec in manifest.state:
                cuda.copy(self.state[spec.name], before.state[spec.name], before.size * nbytes(spec))

    def _allocate(self, size: int) -> int:
        self._memory.append(self._cuda.allocate(size))
        return self._memory[-1]

    def _pinned(self, size: int) -> np.ndarray:
        array = self._cuda.pinned(size).array
        self._memory.append(array.ctypes.data)
        return array

    def run(self, count: int) -> np.ndarray:
        """Queues the step for the first ``count`` targets.

        Returns float32 ``(count, 5)``: where the predictions will be once the stream is done.
        """
        step = self._steps.pop(count, None)
        if step is None:
            with CAPTURE_LOCK:
                self.close_steps(KEPT - 1)
                step = self._new_step(count)
        self._steps[count] = step  # moved to the end: the least recently used is dropped first
        step()
        return self._predictions[:count]

    def _new_step(self, count: int) -> Callable[[], None]:
        manifest, cuda = self._manifest, self._cuda
        addresses = {**self.state, manifest.search.name: self._image, manifest.output.name: self._output}
        run = self._network.bind(addresses, count)
        queue = partial(self._queue, count, self.windows[:count], run, self._predictions[:count])
        if not self._network.capturable:
            return queue
        # A network has to run once with these shapes before it can be captured.
        queue()
        cuda.synchronise()
        graph = cuda.capture(queue)
        self._network.graph &= graph is not None
        return graph or queue

    def _queue(self, count: int, windows: np.ndarray, run: Callable[[], None], predictions: np.ndarray) -> None:
        self._cuda.upload(self._device_windows, windows)
        self._crop(self._device_windows, self._image, self._manifest.search_size, count)
        run()
        self._cuda.download(predictions, self._output)

    def close_steps(self, leave: int = 0) -> None:
        """Releases all but the ``leave`` most recently used graphs and bound runs; they are remade on demand."""
        while len(self._steps) > leave:
            step = self._steps.pop(next(iter(self._steps)))
            if isinstance(step, Graph):
                step.close()

    def close(self) -> None:
        """Releases the steps and the memory."""
        self.close_steps()
        while self._memory:
            self._cuda.free(self._memory.pop())
