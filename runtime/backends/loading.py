"""From a model's name or directory to a backend that runs it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import List, Optional, Union

from asymtrack_edge.cli import BACKENDS, TRITON
from asymtrack_edge.errors import BackendError, ManifestError, UsageError
from asymtrack_edge.manifest import Manifest, load_manifest
from asymtrack_edge.runtime.backends.base import Backend, device_index
from asymtrack_edge.variants import VARIANTS

logger = logging.getLogger("asymtrack_edge")

_ON_CPU = ("onnxruntime", "openvino")


def model_folder(model: Union[str, Path]) -> Path:
    """Directory of bundled weights (``"T"``, ``"S"``, ``"B"``) or the given export directory.

    Raises:
        ManifestError: there is no such directory.
    """
    if isinstance(model, str) and model.upper() in VARIANTS:
        name = model.upper()
        import asymtrack_edge.weights as weights

        for base in weights.__path__:
            folder = Path(base) / name
            if folder.is_dir():
                return folder
        raise ManifestError(
            f"no weights of variant {name} come with this package: export a checkpoint with "
            f"asymtrack-export --variant {name} --checkpoint FILE and give its directory instead"
        )
    folder = Path(model)
    if not folder.is_dir():
        raise ManifestError(f"there is no export directory {folder}: make one with asymtrack-export")
    return folder


def open_backend(
    model: Union[str, Path] = "T",
    backend: str = "auto",
    device: str = "auto",
    threads: Optional[int] = None,
    precision: Optional[str] = None,
) -> Backend:
    """Opens a backend; arguments and errors as in ``Tracker.load``. One line of the log says which."""
    _check(backend, device, threads)
    folder = model_folder(model)
    manifest = load_manifest(folder)
    if precision == manifest.precision:
        precision = None
    if precision == "bf16" and backend == "auto":
        backend = "openvino"
    if precision is not None and (precision, backend) != ("bf16", "openvino"):
        raise UsageError(
            f"the backend {backend} computes this model in {manifest.precision}, not in {precision}: "
            + ("use the backend openvino" if precision == "bf16" else "export it in that precision")
        )
    passed: List[str] = []
    opened = _open(folder, manifest, _choose(manifest, backend, device, passed), device, threads, precision)
    reasons = f"; passed over: {'; '.join(passed)}" if passed else ""
    level = logging.WARNING if passed else logging.INFO
    logger.log(level, "%s in %s runs on %s%s", folder.name, opened.precision, opened.description, reasons)
    return opened


def _check(backend: str, device: str, threads: Optional[int]) -> None:
    remote = backend.startswith(TRITON)
    if backend not in BACKENDS and not remote:
        raise UsageError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}, or {TRITON}HOST:PORT")
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"{device!r} is no device: choose auto, cpu, cuda or cuda:N")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    if remote and (device != "auto" or threads is not None):
        raise UsageError(f"the networks run on the server {backend}: leave out the device and the threads")
    if device.startswith("cuda") and backend in _ON_CPU:
        raise UsageError(f"the backend {backend} runs on the CPU, not on {device}: use onnxruntime-cuda or tensorrt")
    if device == "cpu" and backend not in ("auto", *_ON_CPU):
        raise UsageError(f"the backend {backend} runs on a GPU, not on the CPU: use onnxruntime or openvino")


def _choose(manifest: Manifest, backend: str, device: str, passed: List[str]) -> str:
    """What ``auto`` stands for here; tells in ``passed`` what a GPU that is there cannot be used with, and why.

    Raises:
        BackendError: a GPU was asked for and nothing can run on it.
    """
    if backend != "auto":
        return backend
    if device == "cpu":
        return "onnxruntime"
    from asymtrack_edge.runtime.backends.cuda.gpu import NoGpuError, find_gpu

    try:
        find_gpu(device_index(device))
    except BackendError as error:
        if device != "auto":
            raise
        if not isinstance(error, NoGpuError):
            passed.append(f"the GPU ({error})")
        return "onnxruntime"
    if not manifest.engines:
        passed.append("tensorrt (the model has no engine: build it with asymtrack-build)")
    else:
        from asymtrack_edge.runtime.backends.tensorrt.backend import unfit

        reason = unfit(manifest, device_index(device))
        if reason is None:
            return "tensorrt"
        passed.append(f"tensorrt ({reason})")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return "onnxruntime-cuda"
    passed.append("onnxruntime-cuda (this onnxruntime has no CUDA: install onnxruntime-gpu in its place)")
    if device != "auto":
        raise BackendError(f"nothing can run this model on {device}: {'; '.join(passed)}")
    return "onnxruntime"


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
    from asymtrack_edge.runtime.backends import onnxruntime as ort

    if backend == "onnxruntime":
        return ort.OnnxRuntimeBackend(folder, manifest, threads)
    return ort.OnnxRuntimeDeviceBackend(folder, manifest, backend.split("-")[1], device_index(device))
