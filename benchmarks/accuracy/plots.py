"""Success and precision plots, and the gap between trackers by attribute."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from asymtrack_edge.benchmarks.accuracy.metrics import Summary
from asymtrack_edge.benchmarks.accuracy.report import main_metric
from asymtrack_edge.errors import MissingDependencyError

#: Curve -> its axis label.
_CURVES = {
    "success": "overlap threshold",
    "precision": "centre error threshold [px]",
    "norm_precision": "normalised centre error threshold",
}

#: Tracker -> attribute -> scores of the sequences that have it.
ByAttribute = Dict[str, Dict[str, Summary]]


def figure(width: float, height: float) -> Any:
    """A figure of its own, not pyplot's: nothing global, and no display is looked for.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
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

    Returns:
        attributes that all trackers have, the largest mean gap first;
        tracker -> its score minus the first's, in percent, in that order.
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
