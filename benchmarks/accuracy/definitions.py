"""Which frames count towards a data set's metrics, and which metrics they are, as its own toolkit has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict


@dataclass(frozen=True)
class Protocol:
    """Which frames count, and what is computed from them.

    Attributes:
        definition: one sentence for reports.
        first_frame: ``"perfect"`` (the result of frame 0 is replaced by the ground truth and counts) or
            ``"left out"``.
        box_rule: which rows of the ground truth are boxes: ``"positive"`` (x, y, w, h > 0)
            or ``"sized"`` (w, h > 0). Rows with nan never are.
        boxless: frames without such a box: ``"left out"``, or ``"failed"``: they never count as
            success but, their error being set to -1, always as precise.
        absent: frames whose target is declared absent: ``"ignored"`` (the label is not used),
            ``"left out"``, or ``"failed"`` (neither success nor precise, but part of the total).
        repair: whether an invalid result (nan, or no area) is replaced by that of the frame before.
        ope: computes success AUC, precision and normalised precision, averaged over sequences.
        got10k: computes AO and SR over the frames of all sequences together, boxes clipped to the frame.
        trackingnet: computes TrackingNet's three integrals, of boxes rounded to whole pixels.
    """

    definition: str
    first_frame: str = "perfect"
    box_rule: str = "sized"
    boxless: str = "left out"
    absent: str = "ignored"
    repair: bool = True
    ope: bool = True
    got10k: bool = False
    trackingnet: bool = False


PROTOCOLS: Dict[str, Protocol] = {
    "otb": Protocol(
        "OTB toolkit: success AUC over 21 thresholds (overlap > t), precision at 20 px; frame 0 counts as perfect",
        box_rule="positive",
        boxless="failed",
    ),
    "uav123": Protocol(
        "UAV123 toolkit: as OTB; frames without annotation count as failures of success, over all frames",
        box_rule="positive",
        boxless="failed",
    ),
    "nfs": Protocol("NfS: success AUC over 21 thresholds and precision at 20 px as OTB; annotated frames only"),
    "lasot": Protocol(
        "LaSOT toolkit: success AUC over 21 thresholds, precision at 20 px, normalised precision at 0.2; "
        "frame 0 counts as perfect, frames with the target absent as failures (AUC vis leaves them out)",
        box_rule="positive",
        boxless="failed",
        absent="failed",
    ),
    "got10k": Protocol(
        "GOT-10k toolkit: AO, SR0.5, SR0.75 over the visible frames of all sequences together, frame 0 left "
        "out, boxes clipped to the frame",
        first_frame="left out",
        absent="left out",
        repair=False,
        ope=False,
        got10k=True,
    ),
    "trackingnet": Protocol(
        "TrackingNet devkit: areas under success (0..1), precision (0..50 px) and normalised precision "
        "(0..0.5), 21 samples, boxes rounded to whole pixels; frame 0 counts as perfect",
        repair=False,
        ope=False,
        trackingnet=True,
    ),
    "folder": Protocol(
        "success AUC over 21 thresholds (overlap > t), precision at 20 px, normalised precision at 0.2, "
        "averaged over sequences; AO, SR0.5, SR0.75 as GOT-10k; annotated, visible frames only, frame 0 left "
        "out",
        first_frame="left out",
        absent="left out",
        repair=False,
        got10k=True,
    ),
}
