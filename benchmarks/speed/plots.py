"""The paper's Fig. 1 (d, e) with what was measured here. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

from asymtrack_edge.benchmarks.paper import TABLE_2, column_for
from asymtrack_edge.benchmarks.speed.report import NETWORK
from asymtrack_edge.errors import MissingDependencyError

CAPTION = (
    "Speed against accuracy, as the paper's Fig. 1. Grey: the paper's figures on its own machine. Stars: speed "
    "measured here, at the accuracy the paper publishes for the model (which this run did not measure)"
)


def draw_speed_accuracy(rows: List[Dict[str, Any]], path: Path) -> bool:
    """Draws LaSOT AUC over frames per second, as SVG.

    Args:
        rows: of a report.
        path: of the picture.

    Returns:
        Whether the rows have the speed of a published variant.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    published = {t.tracker: t for t in TABLE_2}
    measured = [r for r in rows if r["protocol"] == NETWORK and r["case"]["tracker"] in published]
    measured = [r for r in measured if r["case"]["batch"] == 1]
    if not measured:
        return False
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "drawing a plot") from None
    # A figure of its own, not pyplot's: nothing global, and no display is looked for.
    figure: Any = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    column, _ = column_for(measured[0]["machine"], measured[0]["case"]["device"])
    for tracker in TABLE_2:
        fps, auc = getattr(tracker.speeds, column), tracker.lasot[0]
        if fps is not None and auc is not None:
            axes.plot(fps, auc, "o", color="#aaaaaa", ms=5)
            place = {"xytext": (4, 3), "textcoords": "offset points"}
            axes.annotate(tracker.tracker, (fps, auc), fontsize=7, color="#666666", **place)
    for row in measured:
        case = row["case"]
        label = f"{case['tracker']}, {case['name']}, measured here"
        axes.plot(row["fps"], published[case["tracker"]].lasot[0], "*", ms=13, label=label)
    axes.set(xscale="log", xlabel="frames per second, network alone", ylabel="LaSOT AUC as published [%]")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path)
    return True
