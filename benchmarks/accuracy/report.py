"""Tables for people and JSON for machines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.benchmarks.accuracy.metrics import Summary
from asymtrack_edge.benchmarks.accuracy.results import Speed

#: How metrics are headed in tables, in the order they are shown.
HEADINGS: Dict[str, str] = {
    "auc": "AUC",
    "auc_visible": "AUC vis",
    "precision": "P",
    "norm_precision": "P_norm",
    "sr50": "OP50",
    "success": "Success",
    "ao": "AO",
    "sr0.5": "SR0.5",
    "sr0.75": "SR0.75",
}


@dataclass(frozen=True)
class Evaluation:
    """One tracker on one data set.

    Attributes:
        tracker: label.
        identity: what made the results; None for result files of unknown origin.
        summary: scores; None where the ground truth is withheld or every sequence failed.
        attributes: scores of the sequences that share an attribute.
        speed: as measured during the run.
        failures: sequence -> error line.
        submission: zip file for the data set's server.
    """

    tracker: str
    identity: Optional[Dict[str, Any]]
    summary: Optional[Summary]
    attributes: Dict[str, Summary]
    speed: Speed
    failures: Dict[str, str]
    submission: Optional[str] = None


def table(rows: Items[Tuple[str, Dict[str, float]]], first: str, counts: Optional[Items[int]] = None) -> str:
    """Aligned text table of metrics in percent.

    Args:
        rows: (name, metrics) each; the metrics of the first decide the columns.
        first: heading of the names.
        counts: a further column, how many sequences a row is over.
    """
    names = [m for m in HEADINGS if any(m in metrics for _, metrics in rows)]
    width = max([len(first), *(len(name) for name, _ in rows)])
    head = f"{first:<{width}}" + ("      n" if counts is not None else "")
    lines = [head + "".join(f"{HEADINGS[m]:>9}" for m in names)]
    for i, (name, metrics) in enumerate(rows):
        line = f"{name:<{width}}" + (f"{counts[i]:>7}" if counts is not None else "")
        values = (metrics.get(m, math.nan) for m in names)
        lines.append(line + "".join("        -" if math.isnan(v) else f"{100 * v:9.2f}" for v in values))
    return "\n".join(lines)


def text_report(evaluations: Items[Evaluation], per_sequence: bool = False) -> str:
    """The tables of a run: per tracker its attributes and, if asked for, its sequences; then all trackers."""
    parts: List[str] = []
    for e in evaluations:
        if e.summary is not None and per_sequence:
            parts.append(table([(s.name, s.metrics) for s in e.summary.sequences], f"{e.tracker}, by sequence"))
        if e.attributes:
            counts = [len(s.sequences) for s in e.attributes.values()]
            rows = [(tag, s.metrics) for tag, s in e.attributes.items()]
            parts.append(table(rows, f"{e.tracker}, by attribute", counts))
    scored = [e for e in evaluations if e.summary is not None]
    if scored:
        rows = [(e.tracker, e.summary.metrics) for e in scored if e.summary is not None]
        parts.append(table(rows, "tracker", [len(e.summary.sequences) for e in scored if e.summary is not None]))
    timed = [e for e in evaluations if e.speed.frames]
    if timed:
        width = max(len("speed (P7)"), *(len(e.tracker) for e in timed))
        lines = [f"{'speed (P7)':<{width}}   frames  frames/total time  mean(1/t)  [frames/s]"]
        for e in timed:
            s = e.speed
            lines.append(f"{e.tracker:<{width}}{s.frames:>9}{s.total:>19.1f}{s.mean_of_rates:>11.1f}")
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


def json_report(dataset: str, definition: str, evaluations: Items[Evaluation]) -> Dict[str, Any]:
    """Everything in the tables and plots, JSON-serialisable; metrics are shares of 1, not percent."""
    return {
        "dataset": dataset,
        "definition": definition,
        "trackers": [
            {
                "tracker": e.tracker,
                "identity": e.identity,
                "metrics": _plain(e.summary.metrics) if e.summary else None,
                "curves": {
                    name: {"thresholds": _plain(x), "values": _plain(y)}
                    for name, (x, y) in (e.summary.curves.items() if e.summary else ())
                },
                "sequences": {
                    s.name: {"frames": s.counted, **_plain(s.metrics)}
                    for s in (e.summary.sequences if e.summary else ())
                },
                "attributes": {
                    tag: {"sequences": len(s.sequences), **_plain(s.metrics)} for tag, s in e.attributes.items()
                },
                "speed": {
                    "protocol": "P7",
                    "frames": e.speed.frames,
                    "frames_over_total_time": _plain(e.speed.total),
                    "mean_of_rates": _plain(e.speed.mean_of_rates),
                },
                "failures": e.failures,
                "submission": e.submission,
            }
            for e in evaluations
        ],
    }
