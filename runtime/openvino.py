"""OpenVINO backend: CPUs of x86 and Arm in fp32, x86 also in bf16.

It reads the same ONNX models as the ONNX Runtime backend. In fp32 it is about as fast; what it has
that ONNX Runtime has not is arithmetic in bf16 on CPUs with AVX512-BF16 or AMX, without another
export: docs/performance.md has the figures. bf16 has the range of fp32 (nothing overflows), and sums
are kept in fp32. fp16, which Arm CPUs have, is not offered: with OpenVINO 2025.2 the networks' answers
were wrong there (``asymtrack-check``), as those of its int8 are.

Every tensor is bound once: the networks read and write the arrays of ``HostEngine`` in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import EngineError, MissingDependencyError
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.engine import HostEngine
from asymtrack_edge.runtime.threads import processors, side_by_side

#: Pinned, the threads of two processes would sit on the same processors, and leave others idle.
_COMMON = {"ENABLE_CPU_PINNING": False}


class OpenVinoEngine(HostEngine):
    """OpenVINO on the CPU.

    One target uses all threads in each operator; several run side by side, one thread each, as with
    ONNX Runtime.

    Args:
        folder: an export directory.
        manifest: its manifest, already verified.
        threads: how many to use; None for OpenVINO's choice.
        bf16: run the search network in bf16. The template network stays in fp32: it runs once per
            target.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        EngineError: an int8 export, a model that OpenVINO cannot load, or a CPU without bf16.
    """

    on_cpu = True

    def __init__(self, folder: Path, manifest: Manifest, threads: Optional[int] = None, bf16: bool = False) -> None:
        if manifest.precision == "int8":
            # Its int8 convolutions answer something else than the model says (asymtrack-check shows it).
            raise EngineError("int8 exports are for ONNX Runtime: use --backend onnxruntime, or export without --int8")
        ov = _import()
        super().__init__(manifest, "OpenVINO CPU bf16" if bf16 else "OpenVINO CPU")
        self._core = ov.Core()
        self._tensor = ov.Tensor
        self.backend = "openvino"
        if bf16:
            if not _bf16(self._core):
                raise EngineError("this CPU has no bf16 (AVX512-BF16 or AMX): use --backend openvino")
            self.backend, self.precision = "openvino-bf16", "bf16"
        self.threads = threads or processors()
        shared = {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        single = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, **shared}
        self._search_path = folder / "search.onnx"
        self._precision = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
        self._template = self._compile(folder / "template.onnx", {**single, "INFERENCE_PRECISION_HINT": "f32"})
        self._search = self._compile(self._search_path, {**single, **self._precision})
        #: The search network once more, in as many streams of one thread as there are threads.
        self._lanes: Optional[Any] = None
        self._requests: Dict[Tuple[int, int], Any] = {}
        self.reserve(1)

    def reserve(self, slots: int) -> None:
        """See ``Engine.reserve``. Room for a second target compiles the search network once more."""
        if slots > self.capacity:
            # The requests hold addresses of the arrays that are about to be replaced.
            self._requests.clear()
        super().reserve(slots)
        if slots > 1 and self.threads > 1 and self._lanes is None:
            streams = {"NUM_STREAMS": self.threads, "INFERENCE_NUM_THREADS": self.threads}
            self._lanes = self._compile(
                self._search_path, {"PERFORMANCE_HINT": "THROUGHPUT", **streams, **self._precision}
            )

    def close(self) -> None:
        """See ``Engine.close``."""
        self._requests.clear()

    def _compile(self, path: Path, options: Dict[str, Any]) -> Any:
        try:
            model = self._core.read_model(str(path))
            # One target per call: a free batch axis becomes 1.
            shapes = {i.any_name: [d.get_length() if d.is_static else 1 for d in i.partial_shape] for i in model.inputs}
            model.reshape(shapes)
            return self._core.compile_model(model, "CPU", {**_COMMON, **options})
        except Exception as error:  # its own and pybind's, many lines long, the reason last
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise EngineError(f"OpenVINO cannot load {path}: {lines[-1] if lines else 'no reason given'}") from None

    def _run_template(self, slot: int) -> None:
        self._request(self._template, slot, self.manifest.template.name, self._template_image).infer()

    def _run_searches(self, count: int) -> None:
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
        row = slice(slot, slot + 1)
        return self._request(
            model,
            slot,
            self.manifest.search.name,
            self._search_images[row],
            (self.manifest.output.name, self._predictions[row]),
        )

    def _request(self, model: Any, slot: int, image: str, pixels: np.ndarray, *more: Tuple[str, np.ndarray]) -> Any:
        """A network's request for one slot, its tensors bound when it is first asked for."""
        key = (id(model), slot)
        request = self._requests.get(key)
        if request is None:
            request = model.create_infer_request()
            state = ((name, values[slot : slot + 1]) for name, values in self.state.items())
            for name, array in ((image, pixels), *state, *more):
                request.set_tensor(name, self._tensor(array, shared_memory=True))
            self._requests[key] = request
        return request


def has_bf16() -> bool:
    """Whether this CPU computes in bf16, as ``openvino-bf16`` needs it.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    return _bf16(_import().Core())


def _import() -> Any:
    try:
        import openvino
    except ImportError:
        raise MissingDependencyError("openvino", "openvino", "the backend openvino") from None
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
