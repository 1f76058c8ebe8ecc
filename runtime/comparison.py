"""Compares two backends, prediction by prediction and track by track."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

import numpy as np

from asymtrack_edge.geometry import Box, box_from_crop, clip_box, crop_window, iou
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.tracker import Tracker


@dataclass(frozen=True)
class Limits:
    """How far an exported model may differ from the trained one."""

    box_difference: float  #: largest difference of a predicted coordinate, in crop units
    score_difference: float  #: largest difference of a score, which decides when a target is lost or found
    track_iou_mean: float  #: smallest mean IoU of the two tracks
    largest_half: float = 65504 / 2  #: largest magnitude in an fp16 tensor: half of fp16's maximum


#: Limits by precision for a model that ONNX Runtime runs on a CPU, where fp16 is only a storage format.
#: Predictions show how well two backends agree. Tracks amplify every difference where the target is hard to see:
#: with the bundled T on the synthetic clip, 0.0003 of the crop becomes an IoU of 0.977.
LIMITS: Dict[str, Limits] = {
    "fp32": Limits(1e-4, 1e-3, 0.99),
    "fp16": Limits(2e-3, 2e-2, 0.95),
    "int8": Limits(3e-2, 0.2, 0.90),
}
#: Limits for arithmetic in half precision: bf16 keeps 8 bits, fp16 11. 1e-2 is 2.6 pixels of the crop.
HALF_ARITHMETIC = Limits(1e-2, 5e-2, 0.90)

#: Limits for an fp32 model on crops whose pixel values differ by up to 1: OpenCV resizes differently on arm64 than
#: on x86, which the crop kernel follows. (With the bundled T, predictions differ by 0.0006 of the crop.)
OTHER_CROPS = Limits(1e-3, 2e-3, 0.98)

#: Frames after which a track restarts.
SEGMENT = 12


def compare(reference: Backend, other: Backend, frames: Sequence[np.ndarray], box: Box) -> Dict[str, float]:
    """Largest differences of box and score on the same crops, and the overlap of short tracks.

    Predictions are compared on the crops of the reference's track. For tracks, each backend follows its own
    boxes, and both restart from the reference's box every ``SEGMENT`` frames: once a target is lost, the
    smallest difference grows without limit and says nothing about the backends.

    ``frames`` are BGR uint8 frames of one clip, ``box`` is the target in the first. Returns ``box_difference``
    (crop units), ``score_difference``, ``track_iou_mean`` and ``track_iou_min``.
    """
    manifest = reference.manifest
    for backend in (reference, other):
        backend.template(frames[0], crop_window(box, manifest.template_factor))
    differences, place = [np.zeros(5)], box
    for frame in frames[1:]:
        window = crop_window(place, manifest.search_factor)
        wanted, got = (backend.search(frame, (window,))[0] for backend in (reference, other))
        differences.append(np.abs(got - wanted))
        place = clip_box(box_from_crop(np.nan_to_num(wanted), window), frame.shape)
    # NaN compares false with everything: count it as a failure.
    apart = np.nan_to_num(np.array(differences), nan=np.inf).max(axis=0)
    trackers = [Tracker(backend, recover=False) for backend in (reference, other)]
    overlaps, place = [], box
    for i, frame in enumerate(frames):
        if i % SEGMENT == 0:
            for tracker in trackers:
                tracker.init(frame, place)
            continue
        place, theirs = (tracker.update(frame).box for tracker in trackers)
        overlaps.append(iou(place, theirs))
    return {
        "box_difference": float(apart[:4].max()),
        "score_difference": float(apart[4]),
        "track_iou_mean": float(np.mean(overlaps)),
        "track_iou_min": float(np.min(overlaps)),
    }


def compare_together(backend: Backend, frames: Sequence[np.ndarray], box: Box, targets: int = 4) -> float:
    """Largest difference between a backend's prediction for one target and those for several equal ones in one call."""
    backend.reserve(targets)
    window = crop_window(box, backend.manifest.search_factor)
    for slot in range(targets):
        backend.template(frames[0], crop_window(box, backend.manifest.template_factor), slot)
    alone = backend.search(frames[1], (window,))[0].copy()
    return float(np.nan_to_num(np.abs(backend.search(frames[1], [window] * targets) - alone), nan=np.inf).max())


def within(report: Dict[str, Any], limits: Limits) -> bool:
    """Whether the measurements of ``compare`` are within the limits."""
    return bool(
        report["box_difference"] <= limits.box_difference
        and report["score_difference"] <= limits.score_difference
        and report["track_iou_mean"] >= limits.track_iou_mean
        and report.get("largest_half", 0.0) <= limits.largest_half
        and report.get("together_difference", 0.0) <= limits.box_difference
    )


def figures(report: Dict[str, Any]) -> List[str]:
    """The measurements of ``compare`` with their ``"limits"``, each as text."""
    limits = report["limits"]
    texts = [
        f"boxes differ by {report['box_difference']:.2g} of the crop (limit {limits['box_difference']:g})",
        f"scores differ by {report['score_difference']:.2g} (limit {limits['score_difference']:g})",
        f"track IoU {report['track_iou_mean']:.3f} (limit {limits['track_iou_mean']:g})",
    ]
    if "together_difference" in report:
        texts.append(f"several targets at once differ by {report['together_difference']:.2g}")
    return texts
