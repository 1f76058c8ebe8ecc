"""The machine that ``make gpu-check`` runs on: its GPU and libraries, and backends opened on it."""

from __future__ import annotations

import ctypes.util
import importlib.util
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from asymtrack_edge.checkpoints import bundled_weights, open_checkpoint
from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.names import BACKENDS
from asymtrack_edge.runtime.backends.cuda.driver import Gpu, find_gpu
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.runtime.backends.tensorrt import backend as tensorrt
from asymtrack_edge.variants import VARIANTS

#: Precisions of T to check, and what is needed to make each model.
PRECISIONS = {"fp32": (), "fp16": ("export",)}


class Machine:
    """What can be checked: the GPU, the reason for each ``missing`` part, and models made in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.gpu: Optional[Gpu] = None
        self.missing: Dict[str, str] = {}
        self.folder = folder
        self.began = time.monotonic()  # moved forward by the time that building engines takes
        finds: Any = {"gpu": self._find_gpu, "torch": _find_torch, "onnxruntime": _find_onnxruntime}
        finds.update(export=_find_export, cupy=partial(__import__, "cupy"), numba=partial(__import__, "numba.cuda"))
        for part, find in finds.items():
            try:
                find()
            except Exception as error:
                said = " ".join(str(error).split())[:200]  # CuPy's message begins with an empty line
                self.missing[part] = said or type(error).__name__

    def _find_gpu(self) -> None:
        self.gpu = find_gpu(0)

    def model(self, precision: str, target: str = "onnx") -> Path:
        """A directory of T: the bundled one, or an export of its weights for batches up to 32."""
        if (precision, target) == ("fp32", "onnx"):
            return model_folder("T")
        made = self.folder / f"{precision}-{target}"
        if not made.exists():
            from asymtrack_edge.export.pipeline import Export, ExportOptions

            made.mkdir(parents=True)
            options = ExportOptions(precision, target, max_batch=32)
            Export(open_checkpoint(bundled_weights(VARIANTS["T"])).model(VARIANTS["T"]), options).write(made).save(made)
        return made

    def backends(self) -> List[Tuple[str, str]]:
        """Backends that can run here, each with a precision."""
        names = [n for n in ("onnxruntime-cuda", "tensorrt", "onnxruntime-tensorrt") if self.lacks((n,)) is None]
        return [(name, precision) for name in names for precision, needs in PRECISIONS.items() if not self.lacks(needs)]

    def lacks(self, needs: Sequence[str]) -> Optional[str]:
        """Why ``needs`` are not met, else None. A need is a key of ``missing``, a backend, or ``"any"`` backend."""
        for need in needs:
            reason = self.missing.get("gpu" if need in BACKENDS or need == "any" else need)
            if reason is None and need.startswith("onnxruntime-"):
                reason = self.missing.get("onnxruntime")
            if reason is None and need == "onnxruntime-tensorrt":
                found = ctypes.util.find_library("nvinfer") or importlib.util.find_spec("tensorrt_libs")
                reason = None if found else "there is no libnvinfer"
            if reason is None and need == "tensorrt":
                reason = self.missing.get("export") or self._lacks_tensorrt()
            if reason is None and need == "any" and not self.backends():
                reason = "; ".join(str(self.lacks((name,))) for name in ("onnxruntime-cuda", "tensorrt"))
            if reason is not None:
                return reason
        return None

    @lru_cache(maxsize=None)  # noqa: B019 (there is only one instance)
    def _lacks_tensorrt(self) -> Optional[str]:
        assert self.gpu is not None
        reasons, bundled = [], load_manifest(model_folder("T"))
        for flavour in (tensorrt.TENSORRT, tensorrt.RTX):
            try:
                tensorrt.fitting_engine(bundled, "search", tensorrt.load_tensorrt(flavour), self.gpu)
            except BackendError as error:
                if "the export has no" in str(error):  # only the engine is missing: TensorRT works on this GPU
                    return None
                reasons.append(str(error))
        return "; ".join(reasons)

    def open(self, backend: str, precision: str) -> Any:
        if backend != "tensorrt":
            from asymtrack_edge.runtime.backends.onnxruntime_gpu import OnnxRuntimeGpuBackend

            folder = self.model(precision)
            return OnnxRuntimeGpuBackend(folder, load_manifest(folder), backend.split("-")[1])
        from asymtrack_edge.runtime.backends.tensorrt.build import build_in_place

        try:
            tensorrt.load_tensorrt(tensorrt.TENSORRT)
            target = "xavier" if self.integrated else "orin"
        except BackendError:
            target = "rtx"
        folder = self.model(precision, target)
        began = time.monotonic()
        try:
            build_in_place(folder, lambda line: None)
        finally:
            self.began += time.monotonic() - began  # engines take minutes on some boards
        return tensorrt.TensorRTBackend(folder, load_manifest(folder))

    @property
    def integrated(self) -> bool:
        """Whether the GPU shares the CPU's memory, as on a Jetson."""
        return self.gpu is not None and self.gpu.integrated


def _find_torch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no CUDA device")


def _find_onnxruntime() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: install onnxruntime-gpu")


def _find_export() -> None:
    absent = [name for name in ("torch", "onnx", "onnxsim", "safetensors") if importlib.util.find_spec(name) is None]
    if absent:
        raise RuntimeError(f"making models needs {', '.join(absent)}: pip install '.[export]'")
