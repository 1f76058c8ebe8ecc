"""Proof that an export equals the trained model: tensor by tensor, and track by track."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.overflow import LARGEST_HALF, largest_half_value
from asymtrack_edge.export.torch_engine import TorchEngine
from asymtrack_edge.geometry import Box, box_from_crop, clip_box, crop_window, iou
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime.engine import Engine, HostEngine
from asymtrack_edge.runtime.ort import OnnxRuntimeEngine
from asymtrack_edge.runtime.tracker import Tracker


@dataclass(frozen=True)
class Limits:
    """How far an exported model may differ from the trained one.

    Attributes:
        box_difference: largest of a predicted coordinate, in crop units.
        score_difference: largest of a score: what is lost and what is found hangs on it.
        track_iou_mean: smallest mean IoU of their tracks.
        largest_half: largest magnitude of an fp16 tensor: half of what fp16 can hold.
    """

    box_difference: float
    score_difference: float
    track_iou_mean: float
    largest_half: float = LARGEST_HALF / 2


#: By precision.
LIMITS: Dict[str, Limits] = {
    "fp32": Limits(1e-4, 1e-3, 0.99),
    "fp16": Limits(2e-3, 2e-2, 0.98),
    "int8": Limits(3e-2, 0.2, 0.90),
}

#: Frames that a track is followed before it starts afresh.
SEGMENT = 12


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
    reference = TorchEngine(model)
    exported = OnnxRuntimeEngine(folder, manifest)
    report: Dict[str, Any] = {"frames": len(frames), "track_length": SEGMENT, "runtime": exported.name}
    report["state_difference"] = _compare_state(reference, exported, frames[0], box)
    report.update(_compare_predictions(reference, exported, frames, box))
    overlaps = _compare_tracks(reference, exported, frames, box)
    report["track_iou_mean"] = float(np.mean(overlaps))
    report["track_iou_min"] = float(np.min(overlaps))
    if manifest.precision == "fp16":
        report["largest_half"], report["largest_half_tensor"] = _largest_half(exported, folder, frames, box)
    limits = limits or LIMITS[manifest.precision]
    report["limits"] = asdict(limits)
    report["passed"] = bool(
        report["box_difference"] <= limits.box_difference
        and report["score_difference"] <= limits.score_difference
        and report["track_iou_mean"] >= limits.track_iou_mean
        and report.get("largest_half", 0.0) <= limits.largest_half
    )
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
            f"the exported model does not equal the trained one: boxes differ by {report['box_difference']:.2g} "
            f"(limit {limits['box_difference']:g}), scores by {report['score_difference']:.2g} (limit "
            f"{limits['score_difference']:g}), track IoU {report['track_iou_mean']:.3f} "
            f"(limit {limits['track_iou_mean']:g}); nothing was replaced. Try without --fp16 or --int8"
        )


def _compare_state(reference: Engine, exported: Engine, frame: np.ndarray, box: Box) -> Dict[str, float]:
    """Largest difference of each state tensor, over the tensor's largest value."""
    window = crop_window(box, reference.manifest.template_factor)
    reference.template(frame, window)
    exported.template(frame, window)
    difference = {}
    for name, wanted in reference.state.items():  # type: ignore[attr-defined]
        got = exported.state[name].astype(np.float32)  # type: ignore[attr-defined]
        difference[name] = float(np.abs(got[0] - wanted[0]).max() / np.abs(wanted[0]).max())
    return difference


def _compare_predictions(
    reference: Engine, exported: Engine, frames: Sequence[np.ndarray], box: Box
) -> Dict[str, float]:
    """Largest differences of box (crop units) and score, both models on the reference's crops."""
    boxes, scores = [0.0], [0.0]
    for frame in frames[1:]:
        window = crop_window(box, reference.manifest.search_factor)
        wanted = reference.search(frame, (window,))[0]
        got = exported.search(frame, (window,))[0]
        difference = np.abs(got - wanted)
        # NaN compares false with everything: make it count as the failure it is.
        boxes.append(float(np.nan_to_num(difference[:4], nan=np.inf).max()))
        scores.append(float(np.nan_to_num(difference[4], nan=np.inf)))
        box = clip_box(box_from_crop(wanted, window), frame.shape)
    return {"box_difference": max(boxes), "score_difference": max(scores)}


def _largest_half(exported: HostEngine, folder: Path, frames: Sequence[np.ndarray], box: Box) -> Tuple[float, str]:
    """See ``largest_half_value``; of both networks, over every sixth frame."""
    tracker = Tracker(exported)
    tracker.init(frames[0], box)
    feeds = []
    for i, frame in enumerate(frames[1:]):
        tracker.update(frame)
        if i % 6 == 0:
            feeds.append({name: values.copy() for name, values in exported.last_inputs()["search"].items()})
    template = largest_half_value(folder / "template.onnx", [exported.last_inputs()["template"]])
    return max(template, largest_half_value(folder / "search.onnx", feeds))


def _compare_tracks(reference: Engine, exported: Engine, frames: Sequence[np.ndarray], box: Box) -> Sequence[float]:
    """IoU per frame of two trackers that each follow their own boxes.

    Every ``SEGMENT`` frames both start afresh from the reference's box: where a tracker loses its
    target, the smallest difference grows without limit, and says nothing about the export.
    """
    ours, theirs = Tracker(reference), Tracker(exported)
    overlaps = []
    for i, frame in enumerate(frames):
        if i % SEGMENT == 0:
            ours.init(frame, box)
            theirs.init(frame, box)
            continue
        box = ours.update(frame).box
        overlaps.append(iou(box, theirs.update(frame).box))
    return overlaps
