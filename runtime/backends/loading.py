"""Opens a backend for a model, given by name or directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import List, Optional, Union

from asymtrack_edge.errors import BackendError, ManifestError, MissingDependencyError, UsageError
from asymtrack_edge.manifest import Manifest, load_manifest
from asymtrack_edge.names import BACKENDS, TRITON
from asymtrack_edge.runtime.backends.base import Backend, device_index
from asymtrack_edge.variants import BUNDLED, VARIANTS

logger = logging.getLogger("asymtrack_edge")

_ON_CPU = ("onnxruntime", "openvino")


def model_folder(model: Union[str, Path]) -> Path:
    """Directory of bundled weights (``"T"``, ``"S"``, ``"B"``) or the given one; ``ManifestError`` if there is none."""
    folder = Path(model)
    if str(model).upper() in VARIANTS and not (isinstance(model, Path) and folder.is_dir()):
        return BUNDLED / str(model).upper()
    if not folder.is_dir():
        raise ManifestError(f"there is no model {folder}: give T, S or B, or a directory written by asymtrack-export")
    return folder


def open_backend(
    model: Union[str, Path] = "T",
    backend: str = "auto",
    device: str = "auto",
    threads: Optional[int] = None,
    precision: Optional[str] = None,
) -> Backend:
    """Opens a backend; arguments and errors as in ``Tracker.load``. A log line says which one."""
    device = str(device)  # a torch.device works, too
    if precision == "bf16" and backend == "auto":
        backend = "openvino"
    _check(backend, device, threads)
    folder = model_folder(model)
    manifest = load_manifest(folder)
    if precision == manifest.precision:
        precision = None
    if precision is not None and (precision, backend) != ("bf16", "openvino"):
        raise UsageError(
            f"the model is in {manifest.precision}, and the backend {backend} cannot compute it in {precision}: "
            + ("use the backend openvino" if precision == "bf16" else f"give a model that was exported in {precision}")
        )
    passed: List[str] = []
    names = _candidates(device, passed) if backend == "auto" else [backend]
    for name in names:
        try:
            opened = _open(folder, manifest, name, device, threads, precision)
            break
        except (BackendError, MissingDependencyError) as error:
            if len(names) == 1 and not passed:
                raise
            passed.append(f"not {name}: {error}")
    else:
        raise BackendError(f"no backend can run this model on {device}; {'; '.join(passed)}")
    used = f", {opened.threads} thread{'s' * (opened.threads > 1)}" if opened.threads else ""
    reasons = f"; {'; '.join(passed)}" if passed else ""
    # Warn about an idle GPU or an engine that does not fit, not about a machine without a GPU.
    surprise = passed and (opened.on_cpu or manifest.platform != "onnx")
    level = logging.WARNING if surprise else logging.INFO
    logger.log(level, "%s in %s runs on %s%s%s", folder.name, opened.precision, opened.description, used, reasons)
    return opened


def _check(backend: str, device: str, threads: Optional[int]) -> None:
    remote = backend.startswith(TRITON)
    if backend not in BACKENDS and not remote:
        raise UsageError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}, or {TRITON}HOST:8001")
    if device != "cpu":
        device_index(device)
    if not (threads is None or (isinstance(threads, int) and 1 <= threads <= 1024)):  # more take minutes
        raise UsageError(f"threads must be an int from 1 to 1024, not {threads!r}")
    if remote and (device != "auto" or threads is not None):
        raise UsageError(f"the networks run on the server {backend}: leave out the device and the threads")
    if device.startswith("cuda") and backend in _ON_CPU:
        raise UsageError(f"the backend {backend} runs on the CPU, not on {device}: use onnxruntime-cuda or tensorrt")
    if device == "cpu" and backend not in ("auto", *_ON_CPU):
        raise UsageError(f"the backend {backend} runs on a GPU, not on the CPU: use onnxruntime or openvino")


def _candidates(device: str, passed: List[str]) -> List[str]:
    """The backends that ``auto`` tries, best first; no CPU backend if ``device`` is a GPU, which must exist then."""
    if device == "cpu":
        return ["onnxruntime"]
    from asymtrack_edge.runtime.backends.cuda.driver import NoGpuError, find_gpu

    try:
        find_gpu(device_index(device))
    except BackendError as error:
        if device != "auto":
            raise
        if not isinstance(error, NoGpuError):
            passed.append(str(error))
        return ["onnxruntime"]
    return ["tensorrt", "onnxruntime-cuda", *(["onnxruntime"] if device == "auto" else [])]


def _open(
    folder: Path, manifest: Manifest, backend: str, device: str, threads: Optional[int], precision: Optional[str]
) -> Backend:
    if backend.startswith(TRITON):
        from asymtrack_edge.runtime.backends.triton import TritonBackend

        return TritonBackend(manifest, backend)
    if backend == "tensorrt":
        from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(folder, manifest, device_index(device))
    if backend == "openvino":
        from asymtrack_edge.runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(folder, manifest, threads, precision == "bf16")
    if backend == "onnxruntime":
        from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(folder, manifest, threads)
    from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend

    return OnnxRuntimeGpuBackend(folder, manifest, backend.split("-")[1], device_index(device))
