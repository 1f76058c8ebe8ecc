"""Success, precision and average overlap, each data set's as its own toolkit computes them.

All toolkits reduce a sequence to an overlap and a centre error per counted frame and then ask for the
share of frames past a threshold. They differ in which frames count, and what a frame without a box in
the ground truth is worth: that is what a ``definitions.Protocol`` states. The toolkits write rectangles as pixels
``x ... x + w - 1``; in overlaps and centre *differences* the ones cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.benchmarks.accuracy.definitions import Protocol
from asymtrack_edge.datasets.sequences import Sequence
from asymtrack_edge.errors import UsageError

#: Thresholds of the one-pass evaluation plots (Wu et al., OTB; Fan et al., LaSOT for the normalised one).
SUCCESS_THRESHOLDS = np.linspace(0.0, 1.0, 21)
PRECISION_THRESHOLDS = np.arange(51.0)
NORM_PRECISION_THRESHOLDS = np.arange(51.0) / 100
#: TrackingNet samples its three curves at 21 points and integrates them (devkit, ``metrics.py``).
TRACKINGNET_PRECISION = np.linspace(0.0, 50.0, 21)
TRACKINGNET_NORM_PRECISION = np.linspace(0.0, 0.5, 21)
#: GOT-10k draws its success curve at 101 thresholds.
GOT10K_THRESHOLDS = np.linspace(0.0, 1.0, 101)


#: Curve name -> its thresholds, per family of metrics.
_OPE_CURVES = {
    "success": SUCCESS_THRESHOLDS,
    "precision": PRECISION_THRESHOLDS,
    "norm_precision": NORM_PRECISION_THRESHOLDS,
}
_TRACKINGNET_CURVES = {
    "success": SUCCESS_THRESHOLDS,
    "precision": TRACKINGNET_PRECISION,
    "norm_precision": TRACKINGNET_NORM_PRECISION,
}


def overlaps(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes, row by row.

    Args:
        boxes: float ``(N, 4)``, x, y, w, h.
        truth: the same.

    Returns:
        float64 ``(N,)`` in 0..1; 0 where the union is empty.
    """
    low = np.maximum(boxes[:, :2], truth[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    union = boxes[:, 2:].prod(1) + truth[:, 2:].prod(1) - common
    ratio: np.ndarray = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return ratio.clip(0, 1)


def centre_errors(boxes: np.ndarray, truth: np.ndarray, normalised: bool = False) -> np.ndarray:
    """Distances between centres, in pixels, or in widths and heights of the true box.

    Args:
        boxes: float ``(N, 4)``, x, y, w, h.
        truth: the same.
        normalised: divide the two components by the true width and height (Müller et al., TrackingNet).

    Returns:
        float64 ``(N,)``; infinite where a component is to be divided by zero.
    """
    # Written as the toolkits write it, ones included, so that ties with a threshold fall as theirs do.
    difference = (boxes[:, :2] + (boxes[:, 2:] - 1) / 2) - (truth[:, :2] + (truth[:, 2:] - 1) / 2)
    if normalised:
        side = truth[:, 2:]
        difference = np.divide(difference, side, out=np.full_like(difference, np.inf), where=side > 0)
    distance: np.ndarray = np.sqrt((difference**2).sum(1))
    return distance


def success_curve(overlap: np.ndarray, thresholds: np.ndarray = SUCCESS_THRESHOLDS) -> np.ndarray:
    """Share of frames whose overlap is strictly greater than each threshold."""
    share: np.ndarray = (overlap[:, None] > thresholds).mean(0)
    return share


def precision_curve(error: np.ndarray, thresholds: np.ndarray = PRECISION_THRESHOLDS) -> np.ndarray:
    """Share of frames whose centre error is at most each threshold."""
    share: np.ndarray = (error[:, None] <= thresholds).mean(0)
    return share


@dataclass(frozen=True)
class SequenceScore:
    """One tracker on one sequence.

    Attributes:
        name: of the sequence.
        metrics: name -> value in 0..1.
        curves: ``success``, ``precision``, ``norm_precision`` -> shares of frames, where computed.
        clipped: overlaps that GOT-10k's averages pool, of boxes clipped to the frame.
        counted: how many frames the metrics are over.
    """

    name: str
    metrics: Dict[str, float]
    curves: Dict[str, np.ndarray]
    clipped: np.ndarray
    counted: int


@dataclass(frozen=True)
class Summary:
    """Scores of several sequences together.

    Attributes:
        metrics: name -> value in 0..1.
        curves: name -> (thresholds, values).
        sequences: what they are made of.
    """

    metrics: Dict[str, float]
    curves: Dict[str, Tuple[np.ndarray, np.ndarray]]
    sequences: Tuple[SequenceScore, ...]


@dataclass(frozen=True)
class _Frames:
    """Per counted frame: overlap (-1: failed), centre error, normalised centre error."""

    overlap: np.ndarray
    error: np.ndarray
    norm_error: np.ndarray


def _is_box(truth: np.ndarray, rule: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        if rule == "positive":
            return np.asarray((truth > 0).all(1))
        return np.asarray((truth[:, 2:] > 0).all(1) & np.isfinite(truth).all(1))


def _repaired(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    boxes = boxes.copy()
    for i in range(1, len(boxes)):
        bad = not np.isfinite(boxes[i]).all() or boxes[i, 2:].min() <= 0
        if bad and not np.isnan(truth[i]).any():
            boxes[i] = boxes[i - 1]
    return boxes


def _clip(boxes: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Cuts boxes to the frame as GOT-10k does: corner first, then what is left of the size."""
    limit = np.array(size, np.float64)
    corner = np.clip(boxes[:, :2], 0, limit)
    return np.hstack([corner, np.clip(boxes[:, 2:], 0, limit - corner)])


def _counted(protocol: Protocol, sequence: Sequence) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks ``(N,)``: frames that count; of these, those declared absent; and those without a box."""
    use = np.ones(len(sequence), bool)
    boxless = ~_is_box(sequence.truth, protocol.box_rule)
    absent = np.zeros(len(sequence), bool)
    if sequence.absent is not None and protocol.absent != "ignored":
        absent = sequence.absent
    if protocol.first_frame == "left out":
        use[0] = False
    if protocol.boxless == "left out":
        use &= ~boxless
    if protocol.absent == "left out":
        use &= ~absent
    return use, absent, boxless & ~absent


def _frames(protocol: Protocol, sequence: Sequence, boxes: np.ndarray) -> _Frames:
    use, absent, boxless = _counted(protocol, sequence)
    truth = sequence.truth
    if protocol.repair:
        boxes = _repaired(boxes, truth)
    boxes = np.nan_to_num(boxes, nan=0.0, posinf=0.0, neginf=0.0)
    if protocol.trackingnet:
        boxes, truth = np.round(boxes), np.round(truth)
    if protocol.first_frame == "perfect":
        boxes = np.vstack([truth[:1], boxes[1:]])
    known = np.nan_to_num(truth, nan=0.0)
    overlap = overlaps(boxes, known)
    error = centre_errors(boxes, known)
    norm_error = centre_errors(boxes, known, normalised=True)
    overlap[absent | boxless] = -1
    for values in (error, norm_error):
        values[boxless] = -1
        values[absent] = np.inf
    return _Frames(overlap[use], error[use], norm_error[use])


def score_sequence(protocol: Protocol, sequence: Sequence, boxes: np.ndarray) -> Optional[SequenceScore]:
    """Scores one result.

    Args:
        protocol: which definition.
        sequence: with its ground truth.
        boxes: float ``(N, 4)``, x, y, w, h for every frame; row 0 is the start box.

    Returns:
        The score; None where no frame can be counted (test sets whose annotation is withheld).

    Raises:
        UsageError: the number of boxes differs from that of the frames.
    """
    if boxes.shape != sequence.truth.shape:
        raise UsageError(f"sequence {sequence.name}: {len(boxes)} boxes in the results for {len(sequence)} frames")
    if np.isnan(sequence.truth[1:]).all() and len(sequence) > 1:
        return None
    frames = _frames(protocol, sequence, boxes)
    if not len(frames.overlap):
        return None
    metrics: Dict[str, float] = {}
    curves: Dict[str, np.ndarray] = {}
    clipped = np.zeros(0)
    if protocol.ope:
        curves = {
            "success": success_curve(frames.overlap),
            "precision": precision_curve(frames.error),
            "norm_precision": precision_curve(frames.norm_error, NORM_PRECISION_THRESHOLDS),
        }
        metrics["auc"] = float(curves["success"].mean())
        metrics["precision"] = float(curves["precision"][20])
        metrics["norm_precision"] = float(curves["norm_precision"][20])
        metrics["sr50"] = float(curves["success"][10])
        if protocol.absent == "failed":
            seen = frames.overlap[~(sequence.absent if sequence.absent is not None else np.zeros(len(boxes), bool))]
            metrics["auc_visible"] = float(success_curve(seen).mean()) if len(seen) else float("nan")
    if protocol.trackingnet:
        curves = {
            "success": success_curve(frames.overlap),
            "precision": precision_curve(frames.error, TRACKINGNET_PRECISION),
            "norm_precision": precision_curve(frames.norm_error, TRACKINGNET_NORM_PRECISION),
        }
        metrics.update(_trackingnet_metrics(curves))
    if protocol.got10k:
        use = _counted(protocol, sequence)[0]
        size = sequence.frame_size()
        valid = np.nan_to_num(boxes[use], nan=0.0, posinf=0.0, neginf=0.0)
        clipped = overlaps(_clip(valid, size), _clip(sequence.truth[use], size))
        metrics.update(_got10k_metrics(clipped))
    return SequenceScore(sequence.name, metrics, curves, clipped, len(frames.overlap))


def _got10k_metrics(overlap: np.ndarray) -> Dict[str, float]:
    return {
        "ao": float(overlap.mean()),
        "sr0.5": float((overlap > 0.5).mean()),
        "sr0.75": float((overlap > 0.75).mean()),
    }


def _trackingnet_metrics(curves: Dict[str, np.ndarray]) -> Dict[str, float]:
    # The trapezoidal rule over an axis scaled to 0..1, as the devkit applies it to all three.
    area = {name: float(((c[1:] + c[:-1]) / 2).mean()) for name, c in curves.items()}
    return {
        "success": area["success"],
        "precision": area["precision"],
        "norm_precision": area["norm_precision"],
    }


def summarise(protocol: Protocol, scores: Items[SequenceScore]) -> Summary:
    """Puts sequences together: averages of sequences, but GOT-10k's metrics over all frames at once.

    Raises:
        UsageError: there is nothing to summarise.
    """
    if not scores:
        raise UsageError("no sequence could be scored")
    names = list(scores[0].metrics)
    metrics = {name: float(np.nanmean([s.metrics[name] for s in scores])) for name in names}
    axes = _TRACKINGNET_CURVES if protocol.trackingnet else _OPE_CURVES
    curves = {name: (axes[name], np.mean([s.curves[name] for s in scores], axis=0)) for name in scores[0].curves}
    if protocol.got10k:
        pooled = np.concatenate([s.clipped for s in scores])
        metrics.update(_got10k_metrics(pooled))
        if not protocol.ope:
            curves["success"] = (GOT10K_THRESHOLDS, success_curve(pooled, GOT10K_THRESHOLDS))
    return Summary(metrics, curves, tuple(scores))


def by_attribute(protocol: Protocol, sequences: Items[Sequence], scores: Items[SequenceScore]) -> Dict[str, Summary]:
    """Summaries of the sequences that share an attribute, attributes sorted by name."""
    tags: Dict[str, List[SequenceScore]] = {}
    attributes = {s.name: s.attributes for s in sequences}
    for score in scores:
        for tag in attributes[score.name]:
            tags.setdefault(tag, []).append(score)
    return {tag: summarise(protocol, tags[tag]) for tag in sorted(tags)}
