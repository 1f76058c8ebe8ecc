"""Tables, plots and JSON of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from typing import Sequence as Items

from asymtrack_edge.benchmarks.accuracy.metrics import Summary
from asymtrack_edge.benchmarks.tables import markdown_table
from asymtrack_edge.errors import require
from asymtrack_edge.files import OutputFile, printable

#: Column headings of metrics, in the order of the columns.
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
#: Curve -> its axis label.
_CURVES = {
    "success": "overlap threshold",
    "precision": "centre error threshold [px]",
    "norm_precision": "normalised centre error threshold",
}


@dataclass
class Evaluation:
    """One tracker on one data set."""

    tracker: str
    identity: Optional[Dict[str, Any]]  # what made the results; None for result files of unknown origin
    summary: Optional[Summary]  # None if nothing could be scored
    attributes: Dict[str, Summary]  # attribute -> summary of the sequences that have it
    speed: Dict[str, Any]  # the result of ``results.speed``
    failures: Dict[str, str] = field(default_factory=dict)  # sequence without a score -> why, in one line
    notes: Dict[str, str] = field(default_factory=dict)  # sequence with a score -> what was done to its results
    submission: Optional[str] = None  # zip file for the data set's server


def _table(heading: str, first: str, rows: Items[Tuple[str, Optional[int], Dict[str, float]]]) -> str:
    """Metrics in percent, one row for each name, with its number of sequences."""
    lines = [
        {first: name, "n": count, **{text: 100 * metrics.get(metric, math.nan) for metric, text in HEADINGS.items()}}
        for name, count, metrics in rows
    ]
    return markdown_table(heading, lines, form=".2f")


def text_report(evaluations: Items[Evaluation], per_sequence: bool) -> str:
    """The tables of a run: for each tracker its sequences, if asked for, and attributes; then all trackers."""

    def over(scores: Dict[str, Summary]) -> List[Tuple[str, Optional[int], Dict[str, float]]]:
        return [(name, len(summary.sequences), summary.metrics) for name, summary in scores.items()]

    parts: List[str] = []
    for e in evaluations:
        if e.summary is not None and per_sequence:
            rows = [(s.name, None, s.metrics) for s in e.summary.sequences]
            parts.append(_table(f"{e.tracker} by sequence", "sequence", rows))
        parts.append(_table(f"{e.tracker} by attribute", "attribute", over(e.attributes)))
    scored = {e.tracker: e.summary for e in evaluations if e.summary is not None}
    parts.append(_table("Scores in percent", "tracker", over(scored)))
    speeds = [{"tracker": e.tracker, **e.speed} for e in evaluations if e.speed["frames"]]
    parts.append(markdown_table("Speed in frames per second", speeds, form=".1f"))
    return "\n\n".join(part for part in parts if part)


def plain(e: Evaluation) -> Dict[str, Any]:
    """Everything in the tables and plots, as JSON-serialisable data; metrics are from 0 to 1, not percent."""
    scores = e.summary or Summary({}, {}, ())
    return {
        "tracker": e.tracker,
        "identity": e.identity,
        "metrics": scores.metrics if e.summary else None,
        "curves": {name: {"thresholds": x.tolist(), "values": y.tolist()} for name, (x, y) in scores.curves.items()},
        "sequences": {s.name: {"frames": s.counted, **s.metrics} for s in scores.sequences},
        "attributes": {tag: {"sequences": len(s.sequences), **s.metrics} for tag, s in e.attributes.items()},
        "speed": e.speed,
        "failures": e.failures,
        "notes": e.notes,
        "submission": e.submission,
    }


def figure(width: float, height: float) -> Any:
    """A figure without pyplot, so that there is no global state and no display is needed."""
    return require("matplotlib.figure", "bench", "drawing plots").Figure(figsize=(width, height), layout="constrained")


def draw_curves(title: str, summaries: Dict[str, Summary], folder: Path) -> List[Path]:
    """Draws ``success.png``, ``success.svg`` and so on with a line per tracker, best first; returns the files."""
    written: List[Path] = []
    for curve, label in _CURVES.items():
        lines = [
            (next(s.metrics[metric] for metric in (curve, "auc", "ao") if metric in s.metrics), name, *s.curves[curve])
            for name, s in summaries.items()
            if curve in s.curves
        ]
        if not lines:
            continue
        drawn = figure(6, 4.5)
        axes = drawn.add_subplot()
        lines.sort(key=lambda line: -line[0])
        for *_, thresholds, shares in lines:
            axes.plot(thresholds, shares)
        axes.set(xlabel=label, ylabel=f"share of frames ({curve.replace('_', ' ')})", ylim=(0, 1))
        axes.set_xlim(0, lines[0][2][-1])
        axes.grid(True, alpha=0.3)
        # Matplotlib before 3.10 leaves out labels that begin with "_"; without math parsing they may contain "$".
        legend = axes.legend(axes.lines, [f"[{100 * value:.1f}] {printable(name)}" for value, name, *_ in lines])
        for text in [axes.set_title(printable(title)), *legend.get_texts()]:
            text.set_parse_math(False)
        for kind in ("png", "svg"):
            written.append(folder / f"{curve}.{kind}")
            with OutputFile(written[-1]) as file:
                drawn.savefig(file.place, dpi=150, format=kind)
    return written
