"""OpenVINO backend: CPUs of x86 and Arm in fp32, x86 also in bf16.

It reads the same ONNX models as the ONNX Runtime backend. In fp32 it is about as fast; what it has
that ONNX Runtime has not is arithmetic in bf16 on CPUs with AVX512-BF16 or AMX, without another
export: docs/benchmarks.md has the figures. bf16 has the range of fp32, so that nothing overflows.
fp16, which Arm CPUs have, is not offered: with OpenVINO 2025.2 the answers were wrong there.

Some versions of OpenVINO answer wrongly in fp32 too, without a word: of these networks 2023.3 to 2024.1
the search network, 2026.4 the template network of a fixed batch. So the template network, which runs
once per target, is left to ONNX Runtime, and the search network has to agree with ONNX Runtime's on a
made-up crop before it is used.

Every tensor is bound once: the networks read and write the arrays of ``HostBackend`` in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError, MissingDependencyError
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeTemplate, open_session
from asymtrack_edge.runtime.backends.threads import processors, side_by_side

#: Pinned, the threads of two processes would sit on the same processors, and leave others idle.
_COMMON = {"ENABLE_CPU_PINNING": False}
#: How far a prediction on noise may be from ONNX Runtime's, which rounds elsewhere. Trained weights keep to a
#: hundredth of this; what is to be caught are answers to another question, off by half a crop.
_FARTHEST = {"fp32": 1e-3, "fp16": 0.2, "bf16": 0.2, "int8": 0.2}


class OpenVinoBackend(OnnxRuntimeTemplate):
    """OpenVINO on the CPU.

    One target uses all threads in each operator; several run side by side, one thread each, as with
    ONNX Runtime.

    Args:
        folder: an export directory.
        manifest: its manifest, already verified.
        threads: how many to use; None for OpenVINO's choice.
        bf16: run the search network in bf16.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        BackendError: OpenVINO cannot load the model or answers wrongly, or the CPU has no bf16.
    """

    name = "openvino"
    on_cpu = True

    def __init__(self, folder: Path, manifest: Manifest, threads: Optional[int] = None, bf16: bool = False) -> None:
        self._ov = _import()
        super().__init__(folder, manifest, "OpenVINO CPU bf16" if bf16 else "OpenVINO CPU", threads)
        self._core = self._ov.Core()
        if bf16:
            if not _bf16(self._core):
                raise BackendError("this CPU has no bf16 (AVX512-BF16 or AMX): leave out the precision")
            self.precision = "bf16"
        self.threads = threads or processors()
        self._search_path = folder / "search.onnx"
        self._precision = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        self._requests: Dict[Tuple[int, int], Any] = {}
        #: The search network once more, in as many streams of one thread as there are threads.
        self._lanes: Optional[Any] = None
        shared = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._search: Optional[Any] = self._compile({"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **shared})
        self.reserve(1)
        self._require_agreement(self._search)

    def reserve(self, slots: int) -> None:
        """See ``Backend.reserve``. Room for a second target compiles the search network once more."""
        if slots > self.capacity:
            # The requests hold addresses of the arrays that are about to be replaced.
            self._requests.clear()
        super().reserve(slots)
        if slots > 1 and self.threads > 1 and self._lanes is None:
            shared = {"NUM_STREAMS": self.threads, "INFERENCE_NUM_THREADS": self.threads}
            self._lanes = self._compile({"PERFORMANCE_HINT": "THROUGHPUT", **shared})
            self._require_agreement(self._lanes)

    def close(self) -> None:
        """See ``Backend.close``."""
        self._requests.clear()
        self._search = self._lanes = None

    def _compile(self, options: Dict[str, Any]) -> Any:
        try:
            model = self._core.read_model(str(self._search_path))
            # One target per call: a free batch axis becomes 1.
            shapes = {i.any_name: [d.get_length() if d.is_static else 1 for d in i.partial_shape] for i in model.inputs}
            model.reshape(shapes)
            return self._core.compile_model(model, "CPU", {**_COMMON, **self._precision, **options})
        except Exception as error:  # its own and pybind's, many lines long, the reason last
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else "no reason given"
            raise BackendError(f"OpenVINO cannot load {self._search_path}: {reason}") from None

    def _require_agreement(self, model: Any) -> None:
        """Holds a compiled search network against ONNX Runtime's, on noise."""
        random = np.random.RandomState(0)
        feed = {}
        for spec in (self.manifest.search, *self.manifest.state):
            shape = (1, *spec.shape)
            noise = random.randint(0, 256, shape) if spec.dtype == "uint8" else random.normal(0, 1, shape)
            feed[spec.name] = noise.astype(spec.dtype)
        wanted = open_session(self._search_path, self.threads).run(None, feed)[0]
        request = model.create_infer_request()
        for name, array in feed.items():
            request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
        request.infer()
        apart = float(np.abs(request.get_tensor(self.manifest.output.name).data - wanted).max())
        # Not NaN either, which compares false.
        if not apart <= _FARTHEST[self.precision]:
            raise BackendError(
                f"OpenVINO {self._ov.__version__} does not compute what the model says (off by {apart:.2g}): "
                "install another version, or use --backend onnxruntime"
            )

    def _run_searches(self, count: int) -> None:
        if self._search is None:
            raise BackendError("this engine has been closed: open another")
        lanes = side_by_side(count, self.threads) if self._lanes is not None else 0
        started: List[Any] = []
        try:
            for slot in range(lanes):
                request = self._search_request(self._lanes, slot)
                request.start_async()
                started.append(request)
        finally:
            # Nobody may still write the predictions when this returns, whatever happened.
            _wait(started)
        for slot in range(lanes, count):
            self._search_request(self._search, slot).infer()

    def _search_request(self, model: Any, slot: int) -> Any:
        """A network's request for one slot, its tensors bound when it is first asked for."""
        key = (id(model), slot)
        request = self._requests.get(key)
        if request is None:
            request = model.create_infer_request()
            row = slice(slot, slot + 1)
            tensors = {name: values[row] for name, values in self.state.items()}
            tensors[self.manifest.search.name] = self._search_images[row]
            tensors[self.manifest.output.name] = self._predictions[row]
            for name, array in tensors.items():
                request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            self._requests[key] = request
        return request


def has_bf16() -> bool:
    """Whether this CPU computes in bf16, as OpenVINO needs it.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        BackendError: OpenVINO is installed and cannot be imported.
    """
    return _bf16(_import().Core())


def _import() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise BackendError(f"OpenVINO cannot be imported: {error}") from None
        raise MissingDependencyError("openvino", "openvino", "the backend openvino") from None
    except ImportError as error:
        raise BackendError(f"OpenVINO cannot be imported: {error}") from None
    return openvino


def _bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _wait(requests: Sequence[Any]) -> None:
    """Waits for all, then raises what the first that failed raised."""
    failed = None
    for request in requests:
        try:
            request.wait()
        except Exception as error:
            failed = failed or error
    if failed is not None:
        raise failed
