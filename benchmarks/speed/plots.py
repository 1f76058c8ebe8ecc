"""Plots of a report. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

from asymtrack_edge.benchmarks.paper import TABLE_2, column_for
from asymtrack_edge.benchmarks.speed.report import NETWORK
from asymtrack_edge.errors import MissingDependencyError

#: Colours that people with colour-blindness tell apart too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#444444")

Row = Dict[str, Any]


def draw(rows: List[Row], folder: Path) -> Dict[str, Path]:
    """Draws what the rows of a report have data for, as SVG.

    Returns:
        Caption -> file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "drawing plots") from None
    written = {}
    for name, (caption, plot) in _PLOTS.items():
        # A figure of its own, not pyplot's: nothing global, and no display is looked for.
        figure: Any = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if plot(axes, rows):
            axes.grid(True, alpha=0.3)
            with matplotlib.rc_context({"svg.hashsalt": name}):
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            written[caption] = folder / f"{name}.svg"
    return written


def _label(row: Row) -> str:
    return f"{row['protocol']} {row['case']['tracker']}, {row['case']['name']}"


def _speed_accuracy(axes: Any, rows: List[Row]) -> bool:
    published = {t.tracker: t for t in TABLE_2}
    measured = [
        r for r in rows
        if r["protocol"] == NETWORK and r["case"]["tracker"] in published and r["case"]["batch"] == 1
    ]  # fmt: skip
    if not measured:
        return False
    column, _ = column_for(measured[0]["machine"], measured[0]["case"]["device"])
    for tracker in TABLE_2:
        fps, auc = getattr(tracker.speeds, column), tracker.lasot[0]
        if fps is not None and auc is not None:
            axes.plot(fps, auc, "o", color="#aaaaaa", ms=5)
            place = {"xytext": (4, 3), "textcoords": "offset points"}
            axes.annotate(tracker.tracker, (fps, auc), fontsize=7, color="#666666", **place)
    for i, row in enumerate(measured):
        auc = published[row["case"]["tracker"]].lasot[0]
        axes.plot(row["fps"], auc, "*", ms=13, color=COLOURS[i % len(COLOURS)], label=f"{_label(row)}, measured here")
    axes.set(xscale="log", xlabel="frames per second, network alone", ylabel="LaSOT AUC as published [%]")
    axes.legend(loc="lower left", fontsize=8)
    return True


def _latency(axes: Any, rows: List[Row]) -> bool:
    chosen = [r for r in rows if r["protocol"] in (NETWORK, "P5") and r["samples"]][:8]
    for i, row in enumerate(chosen):
        values = np.sort(row["samples"])
        share = np.arange(1, len(values) + 1) / len(values) * 100
        axes.plot(values, share, color=COLOURS[i % len(COLOURS)], drawstyle="steps-post", label=_label(row))
        axes.plot(row["latency"]["median"], 50, "o", color=COLOURS[i % len(COLOURS)], ms=5)
    axes.set(xscale="log", xlabel="milliseconds per call", ylabel="calls that took no longer [%]", ylim=(0, 100))
    if chosen:
        axes.legend(fontsize=7, loc="lower right")
    return bool(chosen)


def _stages(axes: Any, rows: List[Row]) -> bool:
    chosen = [r for r in rows if r["protocol"] in ("P6", "P5") and r["stages"]][:8]
    order = ("decode", "crop", "copy in", "infer", "copy out", "decode box", "other")
    names = sorted({s for r in chosen for s in r["stages"]}, key=lambda s: order.index(s) if s in order else 0)
    left = np.zeros(len(chosen))
    for i, name in enumerate(names):
        widths = np.array([r["stages"].get(name, 0.0) for r in chosen])
        axes.barh(np.arange(len(chosen)), widths, left=left, height=0.6, color=COLOURS[i % len(COLOURS)], label=name)
        left += widths
    if chosen:
        axes.set_yticks(np.arange(len(chosen)), [_label(r) for r in chosen], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds per frame")
        axes.legend(ncols=min(5, len(names)), fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    return bool(chosen)


_PLOTS: Dict[str, Tuple[str, Callable[[Any, List[Row]], bool]]] = {
    "speed-accuracy": (
        "Speed against accuracy, as the paper's Fig. 1. Grey: the paper's figures on its own machine. Stars: speed "
        "measured here, at the accuracy the paper publishes for the model (which this run did not measure)",
        _speed_accuracy,
    ),
    "latency": ("Distribution of single calls; the dot is the median", _latency),
    "stages": ("Where the time of a frame goes", _stages),
}
