"""Tables for people and JSON for machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.benchmarks.accuracy.metrics import Summary

#: How metrics are headed in tables, in the order they are shown.
HEADINGS: Dict[str, str] = {
    "auc": "AUC",
    "auc_visible": "AUC vis",
    "success": "Success",
    "precision": "P",
    "norm_precision": "P_norm",
    "sr50": "OP50",
    "ao": "AO",
    "sr0.5": "SR0.5",
    "sr0.75": "SR0.75",
}
#: The metric that stands for a data set: the first of these that it has.
MAIN = ("auc", "success", "ao")


@dataclass(frozen=True)
class Evaluation:
    """One tracker on one data set.

    Attributes:
        tracker: label.
        identity: what made the results; None for result files of unknown origin.
        summary: scores; None where there are none.
        attributes: scores of the sequences that share an attribute.
        speed: as ``results.speed`` gives it.
        failures: sequence without a score -> why, in one line.
        notes: sequence with a score -> what was done to its results.
        submission: zip file for the data set's server.
    """

    tracker: str
    identity: Optional[Dict[str, Any]]
    summary: Optional[Summary]
    attributes: Dict[str, Summary]
    speed: Dict[str, Any]
    failures: Dict[str, str] = field(default_factory=dict)
    notes: Dict[str, str] = field(default_factory=dict)
    submission: Optional[str] = None


def main_metric(summary: Summary) -> float:
    """The metric that stands for the data set: success AUC, or AO."""
    return next(summary.metrics[name] for name in MAIN if name in summary.metrics)


def table(rows: Items[Tuple[str, Summary]], first: str, counted: bool = True) -> str:
    """Aligned text table of metrics in percent; ``counted`` adds how many sequences a row is over."""
    names = [m for m in HEADINGS if any(m in scores.metrics for _, scores in rows)]
    width = max([len(first), *(len(name) for name, _ in rows)])
    lines = [f"{first:<{width}}" + ("      n" if counted else "") + "".join(f"{HEADINGS[m]:>9}" for m in names)]
    for name, scores in rows:
        values = (scores.metrics.get(m, math.nan) for m in names)
        cells = "".join("        -" if math.isnan(v) else f"{100 * v:9.2f}" for v in values)
        lines.append(f"{name:<{width}}" + (f"{len(scores.sequences):>7}" if counted else "") + cells)
    return "\n".join(lines)


def text_report(evaluations: Items[Evaluation], per_sequence: bool = False) -> str:
    """The tables of a run: per tracker its attributes and, if asked for, its sequences; then all trackers."""
    parts: List[str] = []
    for e in evaluations:
        if e.summary is not None and per_sequence:
            rows = [(s.name, e.summary._replace(metrics=s.metrics)) for s in e.summary.sequences]
            parts.append(table(rows, f"{e.tracker}, by sequence", counted=False))
        if e.attributes:
            parts.append(table(list(e.attributes.items()), f"{e.tracker}, by attribute"))
    scored = [(e.tracker, e.summary) for e in evaluations if e.summary is not None]
    if scored:
        parts.append(table(scored, "tracker"))
    timed = [e for e in evaluations if e.speed["frames"]]
    if timed:
        width = max(len("speed (P7)"), *(len(e.tracker) for e in timed))
        lines = [f"{'speed (P7)':<{width}}   frames  frames/total time  mean(1/t)  [frames/s]"]
        for e in timed:
            _, frames, total, mean = e.speed.values()
            lines.append(f"{e.tracker:<{width}}{frames:>9}{total:>19.1f}{mean:>11.1f}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _plain(value: Any) -> Any:
    """Makes numbers JSON can hold: nan becomes null."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _json(e: Evaluation) -> Dict[str, Any]:
    scores = e.summary or Summary({}, {}, ())
    return {
        "tracker": e.tracker,
        "identity": e.identity,
        "metrics": scores.metrics if e.summary else None,
        "curves": {name: {"thresholds": x, "values": y} for name, (x, y) in scores.curves.items()},
        "sequences": {s.name: {"frames": s.counted, **s.metrics} for s in scores.sequences},
        "attributes": {tag: {"sequences": len(s.sequences), **s.metrics} for tag, s in e.attributes.items()},
        "speed": e.speed,
        "failures": e.failures,
        "notes": e.notes,
        "submission": e.submission,
    }


def json_report(
    dataset: str, definition: str, left_out: Dict[str, str], notes: Dict[str, str], evaluations: Items[Evaluation]
) -> Dict[str, Any]:
    """Everything in the tables and plots, JSON-serialisable; metrics are shares of 1, not percent."""
    return {
        "dataset": dataset,
        "definition": definition,
        "left_out": left_out,
        "notes": notes,
        "trackers": [_plain(_json(e)) for e in evaluations],
    }
