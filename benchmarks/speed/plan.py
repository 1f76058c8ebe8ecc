"""What ``asymtrack-bench speed`` is asked to measure: which candidates, under which protocols."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from asymtrack_edge.errors import AsymTrackError, UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import BACKENDS
from asymtrack_edge.variants import Variant, get_variant

TORCH_BACKENDS = ("torch-reference", "torch-folded", "torch-reference-cuda", "torch-folded-cuda")
ALL_BACKENDS = (*TORCH_BACKENDS, *(b for b in BACKENDS if b != "auto"))


def default_backends() -> Tuple[str, ...]:
    """What this CPU can measure: ONNX Runtime, and PyTorch and OpenVINO where they are installed."""
    torch = ("torch-reference", "torch-folded") if has_torch() else ()
    return (*torch, "onnxruntime", *openvino_backends())


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def openvino_backends() -> Tuple[str, ...]:
    """The OpenVINO backends that run here; none where it is absent or cannot be imported."""
    from asymtrack_edge.runtime.backends.openvino import has_bf16

    try:
        has_bf16()
        return ("openvino",)
    except AsymTrackError:
        return ()


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        variants: names.
        backends: of ``ALL_BACKENDS``.
        precisions: of the exported models; PyTorch runs in fp32.
        threads: CPU threads to try; None for the runtimes' choice.
        batches: crops in one call to try.
        protocols: ``"P1"`` to ``"P7"``.
        seconds: per group of candidates; None for the protocols' full number of calls.
        device: GPU index.
        model: export directory instead of the variants' own.
        peers: see ``peers.parse_peer``.
        video, box: what P5 and P6 run on; None for a synthetic clip.
        dataset: what P7 runs on, ``NAME=FOLDER``; None for synthetic clips.
    """

    variants: Tuple[str, ...] = ("T",)
    backends: Tuple[str, ...] = ("onnxruntime",)
    precisions: Tuple[str, ...] = ("fp32",)
    threads: Tuple[Optional[int], ...] = (None,)
    batches: Tuple[int, ...] = (1,)
    protocols: Tuple[str, ...] = ("P1", "P2", "P3", "P4", "P5", "P6", "P7")
    seconds: Optional[float] = 15.0
    device: int = 0
    model: Optional[Path] = None
    peers: Tuple[str, ...] = ()
    video: Optional[str] = None
    box: Optional[Sequence[float]] = None
    dataset: Optional[str] = None

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in ALL_BACKENDS:
                raise UsageError(f"unknown backend {name!r}: choose among {', '.join(ALL_BACKENDS)}")
        for name in self.protocols:
            if name not in ("P1", "P2", "P3", "P4", "P5", "P6", "P7"):
                raise UsageError(f"unknown protocol {name!r}: P1 to P7 (energy, P8: asymtrack-bench energy)")
        for name in self.precisions:
            if name not in ("fp32", "fp16"):
                raise UsageError(f"unknown precision {name!r}: fp32 or fp16")
        if any(t is not None and t < 1 for t in self.threads) or any(not 1 <= b <= 64 for b in self.batches):
            raise UsageError("threads must be at least 1, batches within 1..64")
        if (self.video is None) != (self.box is None):
            raise UsageError("--video and --box go together: the target is marked in the video's first frame")
        if self.seconds is not None and self.seconds <= 0:
            raise UsageError(f"--seconds must be positive, not {self.seconds:g}")

    def resolved(self) -> List[Variant]:
        """The variants.

        Raises:
            UsageError: one is unknown.
        """
        if self.model is not None:
            return [get_variant(load_manifest(self.model).variant)]
        return [get_variant(name) for name in self.variants]


def estimate(plan: Plan) -> float:
    """Seconds that a plan takes, about; for the progress bar."""
    groups = len(plan.variants if plan.model is None else (1,)) * len(plan.threads)
    wanted = set(plan.protocols)
    seconds = 30.0 if plan.seconds is None else plan.seconds
    engines = sum(b not in TORCH_BACKENDS for b in plan.backends) * len(plan.precisions)
    once = seconds * len(plan.batches) * bool(wanted & {"P1", "P2", "P3"}) + 3.3 * engines * ("P4" in wanted)
    once += seconds * ("P5" in wanted) + engines * (0.5 * seconds * ("P6" in wanted) + 5 * ("P7" in wanted))
    return groups * once
