"""Success and precision plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

from asymtrack_edge.benchmarks.accuracy.metrics import Summary
from asymtrack_edge.errors import MissingDependencyError, UsageError

#: Image formats that plots can be written in.
FORMATS = ("png", "svg")

#: Curve -> (axis label, its number in the legend: the first of these metrics that was computed).
_CURVES: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "success": ("overlap threshold", ("auc", "success", "ao")),
    "precision": ("centre error threshold [px]", ("precision",)),
    "norm_precision": ("normalised centre error threshold", ("norm_precision",)),
}


def draw_plots(
    title: str, summaries: Dict[str, Summary], folder: Path, formats: Tuple[str, ...] = FORMATS
) -> List[Path]:
    """Draws one plot per curve with a line per tracker, best first in the legend.

    Args:
        title: the data set.
        summaries: tracker -> its scores on the same data set.
        folder: where ``success.png`` and so on go; made if need be.
        formats: of ``FORMATS``.

    Returns:
        The files written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError: an unknown format.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise UsageError(f"plots are {' or '.join(FORMATS)}, not {', '.join(unknown)}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "drawing plots") from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for curve, (label, metrics) in _CURVES.items():
        lines = [(_legend(name, s, metrics), *s.curves[curve]) for name, s in summaries.items() if curve in s.curves]
        if not lines:
            continue
        # A figure of its own, not pyplot's: nothing global, and no display is looked for.
        figure: Any = Figure(figsize=(6, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for (_, name), thresholds, values in sorted(lines, key=lambda line: -line[0][0]):
            axes.plot(thresholds, values, label=name)
        axes.set(xlabel=label, ylabel=f"share of frames ({curve.replace('_', ' ')})", title=title, ylim=(0, 1))
        axes.set_xlim(0, lines[0][1][-1])
        axes.grid(True, alpha=0.3)
        axes.legend()
        for suffix in formats:
            path = folder / f"{curve}.{suffix}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _legend(name: str, summary: Summary, metrics: Tuple[str, ...]) -> Tuple[float, str]:
    value = next(summary.metrics[m] for m in metrics if m in summary.metrics)
    return value, f"{name} [{100 * value:.1f}]"
