"""OpenVINO backend: x86 and Arm CPUs in fp32, x86 also in bf16.

It reads the same ONNX models as the ONNX Runtime backend, and is about as fast in fp32. On CPUs with AVX512-BF16 or AMX
it can compute in bf16, which has the range of fp32. fp16 is not offered: OpenVINO 2025.2 gives wrong results in it.

Some versions of OpenVINO give wrong results in fp32, too: 2023.3 to 2024.1 for the search network, 2026.4 for a
template network with a fixed batch. So ONNX Runtime runs the template network, once per target, and the
search network must agree with ONNX Runtime's on noise before it is used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import numpy as np

from asymtrack_edge.errors import BackendError, require
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

#: How far a prediction on noise may be from ONNX Runtime's, which rounds differently. Trained weights stay within a
#: hundredth of this; the check is for grossly wrong results, which are off by half a crop.
_FARTHEST = {"fp32": 1e-3, "fp16": 0.2, "bf16": 0.2, "int8": 0.2}


class OpenVinoBackend(OnnxRuntimeBackend):
    """OpenVINO on the CPU; the template network runs in ONNX Runtime.

    ``bf16`` runs the search network in bf16. ``MissingDependencyError`` without OpenVINO, ``BackendError`` if it cannot
    load the model or gives wrong results, or the CPU has no bf16.
    """

    name = "openvino"

    def __init__(self, folder: Path, manifest: Manifest, threads: Optional[int] = None, bf16: bool = False) -> None:
        self._ov = _import()
        self._core = self._ov.Core()
        if bf16 and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendError("this CPU has no bf16 (AVX512-BF16 or AMX): leave out the precision")
        self._bf16 = bf16
        super().__init__(folder, manifest, threads)
        if bf16:
            self.precision = "bf16"

    def _open_search(self, lanes: int) -> Any:
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self._bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY" if lanes == 1 else "THROUGHPUT",
            "NUM_STREAMS": lanes,
            "INFERENCE_NUM_THREADS": self.threads,
            # With pinning, the threads of two processes would share processors and leave others idle.
            "ENABLE_CPU_PINNING": False,
        }
        try:
            model = self._core.read_model(self._files["search"], b"")
            # One target per call: a free batch axis becomes 1.
            shapes = {i.any_name: [d.get_length() if d.is_static else 1 for d in i.partial_shape] for i in model.inputs}
            model.reshape(shapes)
            network = self._core.compile_model(model, "CPU", options)
        except Exception as error:  # OpenVINO's or pybind's: many lines, the reason last
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
            raise BackendError(f"OpenVINO cannot load {self._folder}/search.onnx: {reason}") from None
        self._compare_on_noise(network)
        return network

    def _compare_on_noise(self, network: Any) -> None:
        """Raises ``BackendError`` if a compiled search network predicts other than ONNX Runtime's, on noise."""
        random = np.random.RandomState(0)
        feed = {}
        for spec in (self.manifest.search, *self.manifest.state):
            shape = (1, *spec.shape)
            noise = random.randint(0, 256, shape) if spec.dtype == "uint8" else random.normal(0, 1, shape)
            feed[spec.name] = noise.astype(spec.dtype)
        wanted = self._open_session("search", self.threads).run(None, feed)[0]
        got = np.zeros((1, 5), np.float32)
        self._bind_search(network, feed, got)()
        apart = float(np.abs(got - wanted).max())
        # Written so that NaN, which compares false, fails, too.
        if not apart <= _FARTHEST["bf16" if self._bf16 else self.precision]:
            raise BackendError(
                f"OpenVINO {self._ov.__version__} does not compute the same as the model (off by {apart:.2g}): "
                "install another version, or use the backend onnxruntime"
            )

    def _bind_search(self, network: Any, inputs: Dict[str, np.ndarray], prediction: np.ndarray) -> Callable[[], object]:
        request = network.create_infer_request()
        for name, array in {**inputs, self.manifest.output.name: prediction}.items():
            request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
        return request.infer


def _import() -> Any:
    # If openvino_telemetry is installed, openvino reports its import. A tracker on a device must not.
    absent = sys.modules.setdefault("openvino_telemetry", None) is None  # type: ignore[arg-type]
    try:
        return require("openvino", "openvino", "the backend openvino")
    finally:
        if absent:
            sys.modules.pop("openvino_telemetry", None)
