"""ONNX Runtime's GPU providers in the device pipeline: our stream, our buffers, their CUDA graph.

Each session runs one batch size, so that all shapes are constants and nothing is left for the CPU. The CUDA
graph is ONNX Runtime's own. We cannot capture its runs ourselves: some of its operators (``Concat``) stage
data in pinned memory, which released versions free when a run ends, while a graph would go on reading it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import threading
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import BATCH_AXIS, Manifest, read_file
from asymtrack_edge.runtime.backends.cuda.driver import CAPTURE_LOCK, CudaDevice, find_gpu
from asymtrack_edge.runtime.backends.cuda.kernel import cache_file
from asymtrack_edge.runtime.backends.device import DeviceBackend, Network
from asymtrack_edge.runtime.backends.onnxruntime import ort

logger = logging.getLogger("asymtrack_edge")

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

_VERSION = tuple(int(part) for part in ort.__version__.split(".")[:2])

#: Runs after which a session has allocated what it needs, and has captured its graph.
_WARM_UP = 3


class OnnxRuntimeGpuBackend(DeviceBackend):
    """ONNX Runtime on a CUDA device; takes exports of either input format.

    ``provider`` is ``"cuda"`` or ``"tensorrt"``; what TensorRT cannot run is left to CUDA. ``BackendError`` if the
    provider or a GPU is absent, or the model cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: Manifest, provider: str = "cuda", device: int = 0) -> None:
        self.name = f"onnxruntime-{provider}"
        if _PROVIDERS[provider] not in ort.get_available_providers():
            raise BackendError(
                f"onnxruntime {ort.__version__} here has no {_PROVIDERS[provider]}: pip uninstall -y onnxruntime, "
                "then pip install --force-reinstall --no-deps onnxruntime-gpu, or use --backend onnxruntime for the CPU"
            )
        self._folder, self._provider = folder, provider
        super().__init__(manifest, f"onnxruntime {provider} on {find_gpu(device).name}", device)

    def _open_network(self, name: str) -> Network:
        return OnnxRuntimeNetwork(self._folder, self.manifest, name, self._provider, self.cuda)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences ONNX Runtime's messages about plans that it tried and dropped; failures still raise.

    The log level cannot be read: afterwards it is ONNX Runtime's default, warnings.
    """
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


class OnnxRuntimeNetwork(Network):
    """The ``"template"`` or the ``"search"`` network of a model directory, in a session per batch size."""

    capturable = False

    def __init__(self, folder: Path, manifest: Manifest, network: str, provider: str, cuda: CudaDevice) -> None:
        # The template network runs once per target and needs no graph.
        self.graph = network == "search"
        self._name = f"{network}.onnx"
        self._content = read_file(folder, self._name, manifest.files[self._name])
        self._provider = provider
        self._cuda = cuda
        self._inputs, self._outputs = manifest.tensors(network)
        self._precision, self._sha256 = manifest.precision, manifest.files[self._name].sha256
        self._sessions: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._graph_ids = itertools.count(1)
        with CAPTURE_LOCK, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            # Finds the libraries in NVIDIA's wheels. It prints what it misses, which a session reports better. One
            # thread at a time: two that redirect stdout would restore each other's.
            ort.preload_dlls(msvc=False)

    def bind(self, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        """Binds our device memory, and runs until all memory is allocated and the graph is captured."""
        with CAPTURE_LOCK, _quiet():
            try:
                return self._warmed(addresses, batch)
            except BackendError as error:
                if not self.graph:
                    raise
                # As text: a log handler that keeps the error would keep the GPU resources of its frames.
                logger.warning("%s runs without a CUDA graph: %s", self._name, str(error))
            self.graph = False
            self._sessions.clear()
            return self._warmed(addresses, batch)

    def _warmed(self, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        try:
            # The TensorRT provider keeps one graph per session, whatever its id: each binding needs its own session.
            session = self._sessions.get(batch) if self._provider == "cuda" else None
            if session is None:
                session = self._sessions[batch] = self._open(batch)
            run = self._bound(session, addresses, batch)
            for _ in range(_WARM_UP):
                run()
            return run
        except BackendError:
            self._cuda.synchronise()
            raise

    def _bound(self, session: Any, addresses: Mapping[str, int], batch: int) -> Callable[[], None]:
        binding = session.io_binding()
        for bind, specs in ((binding.bind_input, self._inputs), (binding.bind_output, self._outputs)):
            for spec in specs:
                shape = [batch, *spec.shape]
                bind(spec.name, "cuda", self._cuda.gpu.index, np.dtype(spec.dtype).type, shape, addresses[spec.name])
        options = ort.RunOptions()
        # We wait for the stream ourselves, once.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.graph:
            # A graph holds the addresses that it was captured with: each binding needs its own.
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids)))
        name, known = self._name, threading.local()

        def run() -> None:
            # ONNX Runtime allocates and captures anew in every thread that runs a session.
            lock = contextlib.nullcontext() if hasattr(known, "thread") else CAPTURE_LOCK
            try:
                with lock:
                    session.run_with_iobinding(binding, options)
                known.thread = True
            except Exception as error:  # onnxruntime raises many unrelated types here
                raise BackendError(f"onnxruntime cannot run {name}: {str(error).splitlines()[0]}") from None

        return run

    def _open(self, batch: int) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name(BATCH_AXIS, batch)
        first = _PROVIDERS[self._provider]
        # Fused into a Gemm, a matrix product and its bias write the bias out first: slower for several targets.
        without = ["MatMulAddFusion"] if batch > 1 else []
        choices = {"providers": self._options(batch), "disabled_optimizers": without}
        try:
            # The fallback would silently open another session, without our stream.
            session = ort.InferenceSession(self._content, options, enable_fallback=0, **choices)
        except Exception as error:  # onnxruntime raises many unrelated types here
            reason = str(error).splitlines()[0]
            raise BackendError(f"onnxruntime {ort.__version__} cannot load {self._name}: {reason}") from None
        if session.get_providers()[0] != first:
            raise BackendError(
                f"onnxruntime {ort.__version__} cannot start {first}: its libraries do not load (CUDA, cuDNN and, for "
                "TensorRT, libnvinfer; see docs/gpu.md), or have another version than it was built for"
            )
        if session.get_provider_options()[first].get("user_compute_stream") == "0":
            raise BackendError(f"onnxruntime {ort.__version__} cannot run on our CUDA stream: install 1.18 or newer")
        return session

    def _options(self, batch: int) -> Sequence[Tuple[str, Dict[str, str]]]:
        common = {"device_id": str(self._cuda.gpu.index), "user_compute_stream": str(self._cuda.stream)}
        cuda = {
            **common,
            "use_tf32": "0",  # fp32 means fp32
            "arena_extend_strategy": "kSameAsRequested",
            "enable_cuda_graph": str(int(self.graph and self._provider == "cuda")),
        }
        if self._precision == "fp16" and _VERSION >= (1, 20):
            # Channels last, as the network is written, and biases fused into convolutions: a third less time (H100),
            # but slower in fp32. cuDNN's heuristic choice is as fast as that of its search, and immediate.
            cuda.update(prefer_nhwc="1", fuse_conv_bias="1", cudnn_conv_algo_search="HEURISTIC")
        providers = [(_PROVIDERS["cuda"], cuda), ("CPUExecutionProvider", {})]
        if self._provider == "tensorrt":
            tensorrt = {  # this provider takes True and False, but not 1 and 0
                **common,
                "trt_fp16_enable": str(self._precision == "fp16"),
                "trt_int8_enable": str(self._precision == "int8"),
                "trt_cuda_graph_enable": str(self.graph),
            }
            # ONNX Runtime identifies cached engines by file and tensor names, not by weights and shapes.
            cache = cache_file(f"onnxruntime-tensorrt/{self._sha256[:16]}-{batch}")
            if cache is not None:
                with contextlib.suppress(OSError):  # without a cache it only takes longer
                    cache.mkdir(parents=True, exist_ok=True)  # ONNX Runtime makes no parent folders
                    tensorrt.update(trt_engine_cache_enable="True", trt_engine_cache_path=str(cache))
                    tensorrt.update(trt_timing_cache_enable="True", trt_timing_cache_path=str(cache))
            providers.insert(0, (_PROVIDERS["tensorrt"], tensorrt))
        return providers
