"""Tables and plots for people, JSON for machines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.benchmarks.accuracy.metrics import Summary
from asymtrack_edge.errors import MissingDependencyError

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
#: Curve -> its axis label.
_CURVES = {
    "success": "overlap threshold",
    "precision": "centre error threshold [px]",
    "norm_precision": "normalised centre error threshold",
}

#: Tracker -> attribute -> scores of the sequences that have it.
ByAttribute = Dict[str, Dict[str, Summary]]


@dataclass
class Evaluation:
    """One tracker on one data set."""

    tracker: str
    identity: Optional[Dict[str, Any]]  # what made the results; None for result files of unknown origin
    summary: Optional[Summary]  # None where nothing could be scored
    attributes: Dict[str, Summary]  # of the sequences that share an attribute
    speed: Dict[str, Any]  # as ``results.speed`` gives it
    failures: Dict[str, str] = field(default_factory=dict)  # sequence without a score -> why, in one line
    notes: Dict[str, str] = field(default_factory=dict)  # sequence with a score -> what was done to its results
    submission: Optional[str] = None  # zip file for the data set's server


def main_metric(summary: Summary) -> float:
    """The metric that stands for the data set: success AUC, or AO."""
    return next(summary.metrics[name] for name in MAIN if name in summary.metrics)


def table(rows: Items[Tuple[str, Summary]], first: str, counted: bool = True) -> str:
    """Aligned text table of metrics in percent; ``counted`` adds how many sequences a row is over."""
    names = [m for m in HEADINGS if any(m in scores.metrics for _, scores in rows)]
    width = max(len(name) for name in (first, *(name for name, _ in rows)))
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
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def plain(e: Evaluation) -> Dict[str, Any]:
    """Everything in the tables and plots, JSON-serialisable; metrics are shares of 1, not percent."""
    scores = e.summary or Summary({}, {}, ())
    document: Dict[str, Any] = _plain(
        {
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
    )
    return document


def figure(width: float, height: float) -> Any:
    """A figure of its own, not pyplot's: nothing global, and no display is looked for."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "drawing plots") from None
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def _save(drawn: Any, folder: Path, name: str) -> List[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        drawn.savefig(path, dpi=150)
    return paths


def draw_curves(title: str, summaries: Dict[str, Summary], folder: Path) -> List[Path]:
    """Draws ``success.png``, ``success.svg`` and so on with a line per tracker, best first; returns the files."""
    written: List[Path] = []
    for curve, label in _CURVES.items():
        lines = [
            (s.metrics.get(curve, main_metric(s)), name, *s.curves[curve])
            for name, s in summaries.items()
            if curve in s.curves
        ]
        if not lines:
            continue
        drawn = figure(6, 4.5)
        axes = drawn.add_subplot()
        for value, name, thresholds, shares in sorted(lines, key=lambda line: -line[0]):
            axes.plot(thresholds, shares, label=f"{name} [{100 * value:.1f}]")
        axes.set(xlabel=label, ylabel=f"share of frames ({curve.replace('_', ' ')})", title=title, ylim=(0, 1))
        axes.set_xlim(0, lines[0][2][-1])
        axes.grid(True, alpha=0.3)
        axes.legend()
        written += _save(drawn, folder, curve)
    return written


def gaps(scores: ByAttribute) -> Tuple[List[str], Dict[str, List[float]]]:
    """How far each tracker is from the first, attribute by attribute.

    Returns attributes that all have, the largest mean gap first; tracker -> its score minus the first's in percent.
    """
    first, *others = scores
    shared = [tag for tag in scores[first] if all(tag in scores[name] for name in others)]
    own = {tag: main_metric(scores[first][tag]) for tag in shared}
    found = {name: {tag: 100 * (main_metric(scores[name][tag]) - own[tag]) for tag in shared} for name in others}
    shared.sort(key=lambda tag: -float(np.mean([gap[tag] for gap in found.values()] or [0])))
    return shared, {name: [gap[tag] for tag in shared] for name, gap in found.items()}


def draw_attributes(title: str, scores: ByAttribute, folder: Path) -> List[Path]:
    """Draws ``attributes.png`` and ``.svg``: a radar of scores, bars of the gaps to the first (the paper's Fig. 6)."""
    tags, found = gaps(scores)
    drawn = figure(12, 5.5)
    radar, bars = drawn.add_subplot(1, 2, 1, projection="polar"), drawn.add_subplot(1, 2, 2)
    order = sorted(tags)
    angles = np.arange(len(order)) * 2 * np.pi / max(len(order), 1)
    for name, by_tag in scores.items():
        values = [100 * main_metric(by_tag[tag]) for tag in order]
        radar.plot([*angles, *angles[:1]], [*values, *values[:1]], marker=".", label=name)
    radar.set_xticks(angles, order)
    radar.set_ylim(bottom=0)
    radar.set_title(f"{title}: score by attribute [%]")
    radar.legend(loc="upper left", bbox_to_anchor=(-0.25, 1.1))
    height = 0.8 / max(len(found), 1)
    for i, (name, values) in enumerate(found.items()):
        label = f"{name} (mean {np.mean(values or [0]):+.1f})"
        bars.barh(np.arange(len(tags)) + i * height, values, height, label=label, color=f"C{i + 1}")
    bars.set_yticks(np.arange(len(tags)) + 0.4 - height / 2, tags)
    bars.invert_yaxis()
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set(xlabel="points", title=f"gap to {next(iter(scores))}")
    bars.grid(True, axis="x", alpha=0.3)
    if found:
        bars.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncol=2)
    return _save(drawn, folder, "attributes")
