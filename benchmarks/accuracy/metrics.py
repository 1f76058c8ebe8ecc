"""Success, precision and average overlap, computed for each data set as its own toolkit does.

All toolkits reduce a sequence to an overlap and a centre error per counted frame and then compute the
share of frames past a threshold. They differ in which frames count, and in how a frame without a
ground-truth box is scored: a ``Protocol`` states both. The toolkits treat a rectangle as the pixels
``x ... x + w - 1``; in overlaps and centre *differences* the ones cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, NamedTuple, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.datasets import Sequence
from asymtrack_edge.geometry import overlaps


@dataclass(frozen=True)
class Protocol:
    """Which frames count, and what is computed from them."""

    definition: str  # one line for reports
    #: Success AUC, precision and normalised precision, averaged over sequences.
    ope: bool = True
    #: AO and SR over the frames of all sequences together, boxes clipped to the frame. Frame 0 and frames whose target
    #: is labelled absent are left out; in the other protocols frame 0 counts as perfect.
    got10k: bool = False
    #: TrackingNet's areas under three curves, with boxes rounded to whole pixels.
    trackingnet: bool = False
    #: As OTB's calc_seq_err_robust.m: frames without a true box never count as success but always as precise (their
    #: error is set to -1). Otherwise they are left out.
    robust: bool = False
    #: True boxes have w, h > 0, and x, y above this.
    corner: float = -np.inf
    #: Frames whose target is labelled absent count as failures of success and precision.
    absent_fails: bool = False


_OPE = "success AUC over 21 thresholds (overlap > t), precision at 20 px"
_LASOT = f"{_OPE}, P_norm at 0.2; frame 0 counts as perfect, frames without the target as failures (not in AUC vis)"
PROTOCOLS: Dict[str, Protocol] = {
    "otb": Protocol(f"OTB toolkit: {_OPE}; frame 0 counts as perfect", robust=True, corner=0.0),
    "uav123": Protocol("UAV123 toolkit: as OTB; frames without annotation fail in success", robust=True, corner=0.0),
    "nfs": Protocol(f"NfS: {_OPE}, as OTB; annotated frames only"),
    "lasot": Protocol(f"LaSOT toolkit: {_LASOT}", robust=True, corner=0.0, absent_fails=True),
    "lasotext": Protocol(f"LaSOText, as pytracking: {_LASOT}", robust=True, absent_fails=True),
    "got10k": Protocol(
        "GOT-10k toolkit: AO, SR0.5, SR0.75 over the visible frames of all sequences together, frame 0 left "
        "out, boxes clipped to the frame",
        ope=False,
        got10k=True,
    ),
    "trackingnet": Protocol(
        "TrackingNet devkit: areas under success (0..1), precision (0..50 px) and normalised precision "
        "(0..0.5), 21 samples, boxes rounded to whole pixels; frame 0 counts as perfect",
        ope=False,
        trackingnet=True,
    ),
    "folder": Protocol(
        f"{_OPE}, normalised precision at 0.2, averaged over sequences; AO, SR0.5, SR0.75 as GOT-10k; "
        "annotated, visible frames only, frame 0 left out",
        got10k=True,
    ),
}

#: Thresholds of the curves of one-pass evaluation (Wu et al., OTB; for normalised precision Fan et al., LaSOT).
OPE_CURVES = {
    "success": np.linspace(0.0, 1.0, 21),
    "precision": np.arange(51.0),
    "norm_precision": np.arange(51.0) / 100,
}
#: TrackingNet samples its three curves at 21 points and integrates them (devkit, ``metrics.py``).
TRACKINGNET_CURVES = {
    "success": np.linspace(0.0, 1.0, 21),
    "precision": np.linspace(0.0, 50.0, 21),
    "norm_precision": np.linspace(0.0, 0.5, 21),
}
#: GOT-10k's success curve has 101 thresholds.
GOT10K_THRESHOLDS = np.linspace(0.0, 1.0, 101)


def centre_errors(boxes: np.ndarray, truth: np.ndarray, normalised: bool) -> np.ndarray:
    """Distances between the centres of boxes ``(N, 4)``: float64 ``(N,)``, in pixels.

    Normalised ones are relative to the true box's size (Müller et al., TrackingNet), infinite without a size.
    """
    # Written as in the toolkits, with the ones, so that a distance equal to a threshold rounds as theirs does.
    difference = (boxes[:, :2] + (boxes[:, 2:] - 1) / 2) - (truth[:, :2] + (truth[:, 2:] - 1) / 2)
    if normalised:
        side = truth[:, 2:]
        difference = np.divide(difference, side, out=np.full_like(difference, np.inf), where=side > 0)
    return np.sqrt((difference**2).sum(1))


def success_curve(overlap: np.ndarray, thresholds: np.ndarray = OPE_CURVES["success"]) -> np.ndarray:
    """For each threshold, the share of frames whose overlap is strictly greater."""
    return (overlap[:, None] > thresholds).mean(0)


class SequenceScore(NamedTuple):
    """One tracker on one sequence."""

    name: str
    attributes: Tuple[str, ...]
    metrics: Dict[str, float]  # in 0..1
    curves: Dict[str, np.ndarray]  # "success", "precision", "norm_precision": shares of frames, if computed
    clipped: np.ndarray  # overlaps of boxes clipped to the frame, which GOT-10k's averages pool
    counted: int  # number of frames that the metrics cover


class Summary(NamedTuple):
    """Scores of several sequences together; a curve is (thresholds, values)."""

    metrics: Dict[str, float]
    curves: Dict[str, Tuple[np.ndarray, np.ndarray]]
    sequences: Tuple[SequenceScore, ...]


def is_box(truth: np.ndarray, corner: float = -np.inf) -> np.ndarray:
    """Which ground-truth rows ``(N, 4)`` are boxes, bool ``(N,)``; ``corner`` as in ``Protocol``."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(truth).all(1) & (truth > (corner, corner, 0, 0)).all(1)


def _repaired(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    boxes = boxes.copy()
    for i in range(1, len(boxes)):
        bad = not np.isfinite(boxes[i]).all() or boxes[i, 2:].min() <= 0
        if bad and not np.isnan(truth[i]).any():
            boxes[i] = boxes[i - 1]
    return boxes


def _clip(boxes: np.ndarray, size: Items[int]) -> np.ndarray:
    """Clips boxes to the frame as GOT-10k does: first the corner, then the size to what remains of the frame."""
    limit = np.array(size, np.float64)
    corner = np.clip(boxes[:, :2], 0, limit)
    return np.hstack([corner, np.clip(boxes[:, 2:], 0, limit - corner)])


def counted(protocol: Protocol, sequence: Sequence) -> np.ndarray:
    """Which frames are scored, bool ``(N,)``; none if only the start box is annotated."""
    if len(sequence) > 1 and np.isnan(sequence.truth[1:]).all():
        return np.zeros(len(sequence), bool)
    use = np.ones(len(sequence), bool) if protocol.robust else is_box(sequence.truth)
    if protocol.got10k:
        use[0] = False
        use &= sequence.visible
    return use


def score_sequence(protocol: Protocol, sequence: Sequence, boxes: np.ndarray) -> Optional[SequenceScore]:
    """Scores one result; None if no frame counts.

    ``boxes`` are float ``(N, 4)``, x, y, w, h for every frame; row 0 is the start box.
    """
    truth, use = sequence.truth, counted(protocol, sequence)
    if not use.any():
        return None
    if not (protocol.got10k or protocol.trackingnet):
        boxes = _repaired(boxes, truth)
    boxes = np.where(np.isfinite(boxes).all(1)[:, None], boxes, -1e9)  # no box: overlaps nothing, far from every target
    metrics: Dict[str, float] = {}
    curves: Dict[str, np.ndarray] = {}
    clipped = np.zeros(0)
    if protocol.ope or protocol.trackingnet:
        absent = ~sequence.visible & protocol.absent_fails
        boxless = ~is_box(truth, protocol.corner)
        known, found = np.nan_to_num(truth, nan=0.0), boxes.copy()
        if protocol.trackingnet:
            known, found = np.round(known), np.round(found)
        if not protocol.got10k:
            found[0] = known[0]
        overlap, axes = overlaps(found, known), _axes(protocol)
        overlap[absent | boxless] = -1
        curves["success"] = success_curve(overlap[use], axes["success"])
        for name, normalised in (("precision", False), ("norm_precision", True)):
            error = centre_errors(found, known, normalised)
            error[boxless] = -1
            error[absent] = np.inf
            curves[name] = (error[use, None] <= axes[name]).mean(0)
        if protocol.trackingnet:
            # The trapezoidal rule over an axis scaled to 0..1, as the devkit applies it to all three curves.
            metrics = {name: float(((curve[1:] + curve[:-1]) / 2).mean()) for name, curve in curves.items()}
        else:
            metrics = {"auc": float(curves["success"].mean()), "sr50": float(curves["success"][10])}
            metrics.update({name: float(curves[name][20]) for name in ("precision", "norm_precision")})
        if protocol.absent_fails:
            seen = overlap[use & ~absent]
            metrics["auc_visible"] = float(success_curve(seen).mean()) if len(seen) else float("nan")
    if protocol.got10k:
        size = sequence.read(0).shape[1::-1]
        clipped = overlaps(_clip(boxes[use], size), _clip(truth[use], size))
        metrics.update(_got10k_metrics(clipped))
    return SequenceScore(sequence.name, sequence.attributes, metrics, curves, clipped, int(use.sum()))


def _axes(protocol: Protocol) -> Dict[str, np.ndarray]:
    return TRACKINGNET_CURVES if protocol.trackingnet else OPE_CURVES


def _got10k_metrics(overlap: np.ndarray) -> Dict[str, float]:
    return {"ao": float(overlap.mean()), **{f"sr{t}": float((overlap > t).mean()) for t in (0.5, 0.75)}}


def summarise(protocol: Protocol, scores: Items[SequenceScore]) -> Summary:
    """Combines one or more sequences: averages over sequences, except GOT-10k's metrics, which are over all frames."""
    metrics = {name: float(np.nanmean([s.metrics[name] for s in scores])) for name in scores[0].metrics}
    axes = _axes(protocol)
    curves = {name: (axes[name], np.mean([s.curves[name] for s in scores], axis=0)) for name in scores[0].curves}
    if protocol.got10k:
        pooled = np.concatenate([s.clipped for s in scores])
        metrics.update(_got10k_metrics(pooled))
        if not protocol.ope:
            curves["success"] = (GOT10K_THRESHOLDS, success_curve(pooled, GOT10K_THRESHOLDS))
    return Summary(metrics, curves, tuple(scores))
