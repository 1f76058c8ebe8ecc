"""Proof that an export equals the trained model: tensor by tensor, and track by track."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.overflow import largest_half_value
from asymtrack_edge.export.torch_engine import TorchBackend
from asymtrack_edge.geometry import Box, crop_window
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.agreement import LIMITS, SEGMENT, Limits, compare, figures, within
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.host import HostBackend
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend
from asymtrack_edge.runtime.tracker import Tracker


def verify(
    folder: Path,
    manifest: Manifest,
    model: AsymTrack,
    frames: Sequence[np.ndarray],
    box: Box,
    limits: Optional[Limits] = None,
) -> Dict[str, Any]:
    """Compares the ONNX models in ``folder`` with the fp32 PyTorch model in training form.

    Args:
        folder: holds the models; the manifest need not be written yet.
        manifest: describes them.
        model: the trained model, neither folded nor split.
        frames: BGR uint8 frames of one clip.
        box: the target in the first of them.
        limits: None for those of the manifest's precision.

    Returns:
        What was compared and measured, with ``"passed"``; for the manifest.
    """
    reference = TorchBackend(model)
    exported = OnnxRuntimeBackend(folder, manifest)
    report: Dict[str, Any] = {"frames": len(frames), "track_length": SEGMENT, "runtime": exported.description}
    report["state_difference"] = _compare_state(reference, exported, frames[0], box)
    report.update(compare(reference, exported, frames, box))
    if manifest.precision == "fp16":
        report["largest_half"], report["largest_half_tensor"] = _largest_half(exported, folder, frames, box)
    limits = limits or LIMITS[manifest.precision]
    report["limits"] = asdict(limits)
    report["passed"] = within(report, limits)
    return report


def require_passed(report: Dict[str, Any]) -> None:
    """Raises ``ExportError`` with the figures if a verification failed."""
    if not report["passed"]:
        limits = report["limits"]
        if report.get("largest_half", 0.0) > limits["largest_half"]:
            raise ExportError(
                f"fp16 cannot hold this model's numbers: {report['largest_half_tensor']} reaches "
                f"{report['largest_half']:.3g} (limit {limits['largest_half']:g}); nothing was replaced. "
                "Try without --fp16"
            )
        raise ExportError(
            f"the exported model does not equal the trained one: {figures(report)}; nothing was replaced. "
            "Try without --fp16 or --int8"
        )


def _compare_state(reference: Backend, exported: Backend, frame: np.ndarray, box: Box) -> Dict[str, float]:
    """Largest difference of each state tensor, over the tensor's largest value."""
    window = crop_window(box, reference.manifest.template_factor)
    reference.template(frame, window)
    exported.template(frame, window)
    difference = {}
    for name, wanted in reference.state.items():  # type: ignore[attr-defined]
        got = exported.state[name].astype(np.float32)  # type: ignore[attr-defined]
        difference[name] = float(np.abs(got[0] - wanted[0]).max() / np.abs(wanted[0]).max())
    return difference


def _largest_half(exported: HostBackend, folder: Path, frames: Sequence[np.ndarray], box: Box) -> Tuple[float, str]:
    """See ``largest_half_value``; of both networks, over every sixth frame."""
    tracker = Tracker(exported, recover=False)
    tracker.init(frames[0], box)
    feeds = []
    for i, frame in enumerate(frames[1:]):
        tracker.update(frame)
        if i % 6 == 0:
            feeds.append({name: values.copy() for name, values in exported.last_inputs()["search"].items()})
    template = largest_half_value(folder / "template.onnx", [exported.last_inputs()["template"]])
    return max(template, largest_half_value(folder / "search.onnx", feeds))
