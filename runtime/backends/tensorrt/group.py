"""Targets that run as one batch of the search engine: their memory, execution context and graph.

All addresses are fixed when the group is made, so that the step from the windows to the answers can
be captured once as a CUDA graph and launched again for every frame.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import numpy as np

from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.cuda import crop as cuda_crop
from asymtrack_edge.runtime.backends.cuda.device import CudaDevice, Graph
from asymtrack_edge.runtime.backends.tensorrt.network import Network, nbytes

#: Queues the crop kernel: device addresses of windows and images, side of a crop in pixels, targets.
LaunchCrop = Callable[[int, int, int, int], None]


class TargetGroup:
    """Up to ``max_batch`` targets that run as one batch.

    The GPU's context has to be current whenever a group is made or used.

    Args:
        manifest: of the export.
        cuda: the GPU.
        network: the search engine.
        launch_crop: queues the crop kernel.
        use_graph: whether to capture the step as a CUDA graph.

    Attributes:
        state: device address of each state tensor, ``max_batch`` targets one behind the other.
        windows: ``cuda_crop.WINDOW`` records ``(max_batch,)``, read by ``run``.
        captured: whether all captures so far worked; False where none is asked for.
    """

    def __init__(
        self, manifest: Manifest, cuda: CudaDevice, network: Network, launch_crop: LaunchCrop, use_graph: bool
    ) -> None:
        self._manifest = manifest
        self._cuda = cuda
        self._network = network
        self._launch_crop = launch_crop
        self._use_graph = use_graph
        self.captured = use_graph
        size = manifest.max_batch
        self.state = {spec.name: cuda.allocate(size * nbytes(spec)) for spec in manifest.state}
        self._image = cuda.allocate(size * nbytes(manifest.search))
        self._output = cuda.allocate(size * nbytes(manifest.output))
        # The windows are read by the kernel where they are written, if the GPU shares our memory.
        self._host = cuda.pinned(size * cuda_crop.WINDOW.itemsize, cuda.gpu.integrated)
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
        """Queues the step for the first ``count`` targets.

        Returns:
            float32 ``(count, 5)``: where the answers will be once the stream is done; a view that the
            next run overwrites.

        Raises:
            BackendError: the engine does not take so many, or fails.
        """
        if count != self._count:
            self._prepare(count)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._step()
        return self._answers[:count]

    def close_graph(self) -> None:
        """Gives the graph back."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None

    def _prepare(self, count: int) -> None:
        """Sets the batch and captures the step: once, and again only when the number of targets changes."""
        manifest = self._manifest
        shapes = {s.name: (count, *s.shape) for s in (manifest.search, *manifest.state)}
        self.close_graph()
        self._count = 0
        if self._context is None:
            self._context = self._network.context(shapes, self._addresses)
        else:
            self._network.set_shapes(self._context, shapes)
        self._count = count
        if self._use_graph:
            # TensorRT has to run once with these shapes before it can be captured.
            self._step()
            self._cuda.synchronise()
            self._graph = self._cuda.capture(self._step)
            self.captured = self.captured and self._graph is not None

    def _step(self) -> None:
        cuda, count = self._cuda, self._count
        if not self._host.device_address:
            cuda.upload(self._device, self._host.array[: count * cuda_crop.WINDOW.itemsize])
        self._launch_crop(self._device, self._image, self._manifest.search_size, count)
        self._network.enqueue(self._context, cuda.stream)
        cuda.download(self._answers[:count], self._output)
