"""From a model's name or directory to a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Union

from asymtrack_edge.errors import ManifestError, UsageError
from asymtrack_edge.manifest import Manifest, load_manifest
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.variants import VARIANTS

#: Inference backends by name. ``auto`` takes TensorRT where the directory has an engine for this
#: device, else ONNX Runtime on the CPU. bf16 is never taken unasked.
BACKENDS = (
    "auto",
    "onnxruntime",
    "openvino",
    "openvino-bf16",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "tensorrt",
)


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
    model: Union[str, Path] = "T", backend: str = "auto", device: int = 0, threads: Optional[int] = None
) -> Backend:
    """Opens an engine; see ``Tracker.load`` for the arguments and errors."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    folder = model_folder(model)
    manifest = load_manifest(folder)
    if backend == "tensorrt" or (backend == "auto" and _has_fitting_engines(manifest, device)):
        from asymtrack_edge.runtime.backends.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(folder, manifest, device)
    if backend.startswith("openvino"):
        from asymtrack_edge.runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(folder, manifest, threads, bf16=backend == "openvino-bf16")
    return _onnxruntime(folder, manifest, backend, device, threads)


def _has_fitting_engines(manifest: Manifest, device: int) -> bool:
    """Whether TensorRT can run this export here; nothing is imported where it has no engines."""
    if not manifest.engines:
        return False
    from asymtrack_edge.runtime.backends.tensorrt.backend import unfit

    return unfit(manifest, device) is None


def _onnxruntime(folder: Path, manifest: Manifest, backend: str, device: int, threads: Optional[int]) -> Backend:
    from asymtrack_edge.runtime.backends import onnxruntime as ort

    if backend in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        return ort.OnnxRuntimeDeviceBackend(folder, manifest, backend.split("-")[1], device)
    return ort.OnnxRuntimeBackend(folder, manifest, threads)
