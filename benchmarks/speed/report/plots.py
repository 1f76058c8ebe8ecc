"""Plots of a document. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

from asymtrack_edge.benchmarks.paper import TABLE_2, column_for
from asymtrack_edge.benchmarks.speed.report.document import Document
from asymtrack_edge.errors import MissingDependencyError

#: Colours that people with colour-blindness tell apart too (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#444444")

Row = Dict[str, Any]


def draw_plots(document: Document, folder: Path) -> Dict[str, Path]:
    """Draws what a document has data for, as SVG.

    Returns:
        Caption -> file, in the order of a report.

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
    for name, caption, size, draw in _PLOTS:
        # A figure of its own, not pyplot's: nothing global, and no display is looked for.
        figure: Any = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        if not draw(axes, document["rows"]):
            continue
        path = folder / f"{name}.svg"
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(path, metadata={"Date": None})
        written[caption] = path
    return written


def _named(rows: List[Row], *protocols: str) -> List[Row]:
    return [r for r in rows if r["protocol"] in protocols]


def _label(row: Row) -> str:
    subject = row["subject"]
    name = str(subject["name"])
    return name if subject["tracker"] in name else f"{subject['tracker']}, {name}"


def _stage_order(stage: str) -> int:
    known = ("decode", "crop", "copy", "copy in", "infer", "copy out", "decode box", "other")
    return known.index(stage) if stage in known else len(known) - 1


def _speed_accuracy(axes: Any, rows: List[Row]) -> bool:
    """The paper's Fig. 1 (d, e): LaSOT AUC over speed; the paper's points grey, measured ones coloured."""
    published = {t.tracker: t for t in TABLE_2}
    measured = [r for r in _named(rows, "P1") if r["subject"]["tracker"] in published and r["subject"]["batch"] == 1]
    if not measured:
        return False
    device = measured[0]["device"]
    on_gpu = measured[0]["subject"]["device"].startswith("cuda")
    column, _ = column_for(device["cpu"], device["gpu"], device["board"], on_gpu)
    for tracker in TABLE_2:
        fps, auc = tracker.speeds.on(column), tracker.lasot[0]
        if fps is None or auc is None:
            continue
        axes.plot(fps, auc, "o", color="#aaaaaa", ms=5)
        place = {"xytext": (4, 3), "textcoords": "offset points"}
        axes.annotate(tracker.tracker, (fps, auc), fontsize=7, color="#666666", **place)
    names = list(dict.fromkeys(str(r["subject"]["name"]).partition(" (")[0] for r in measured))
    for i, name in enumerate(names):
        own = [r for r in measured if str(r["subject"]["name"]).partition(" (")[0] == name]
        points = [(r["fps"], published[r["subject"]["tracker"]].lasot[0]) for r in own]
        axes.plot(*zip(*points), "*", ms=13, color=COLOURS[i % len(COLOURS)], label=f"{name}, measured here")
    axes.set_xscale("log")
    ticks = [5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in ticks if low <= t <= high], [str(t) for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.set(xlabel="frames per second, network alone", ylabel="LaSOT AUC as published [%]")
    axes.grid(True, alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    return True


def _latency(axes: Any, rows: List[Row]) -> bool:
    chosen = [r for r in _named(rows, "P2", "P3", "P5") if r["samples"]][:8]
    if not chosen:
        return False
    for i, row in enumerate(chosen):
        values = np.sort(row["samples"])
        share = np.arange(1, len(values) + 1) / len(values) * 100
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(values, share, color=colour, drawstyle="steps-post", label=f"{row['protocol']} {_label(row)}")
        axes.plot(row["latency"]["median"], 50, "o", color=colour, ms=5)
    axes.set_xscale("log")
    axes.set(xlabel="milliseconds per call", ylabel="calls that took no longer [%]", ylim=(0, 100))
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    return True


def _stages(axes: Any, rows: List[Row]) -> bool:
    chosen = [r for r in _named(rows, "P6", "P5") if r["stages"]][:8]
    if not chosen:
        return False
    names = sorted(dict.fromkeys(s for r in chosen for s in r["stages"]), key=_stage_order)
    left = np.zeros(len(chosen))
    places = np.arange(len(chosen))
    for i, name in enumerate(names):
        widths = np.array([r["stages"].get(name, 0.0) for r in chosen])
        axes.barh(places, widths, left=left, height=0.6, color=COLOURS[i % len(COLOURS)], label=name)
        for place, start, width in zip(places, left, widths):
            if width > 0.08 * max(sum(r["stages"].values()) for r in chosen):
                axes.text(start + width / 2, place, f"{width:.1f}", ha="center", va="center", color="w", fontsize=8)
        left += widths
    axes.set_yticks(places, [f"{r['protocol']} {_label(r)}" for r in chosen], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per frame")
    axes.legend(ncols=min(5, len(names)), fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    return True


def _targets(axes: Any, rows: List[Row]) -> bool:
    groups: Dict[str, List[Row]] = {}
    for row in _named(rows, "P2"):
        key = str(row["subject"]["name"]).partition(" (")[0]
        groups.setdefault(key, []).append(row)
    lines = {k: sorted(v, key=lambda r: r["subject"]["batch"]) for k, v in groups.items()}
    lines = {k: v for k, v in lines.items() if len({r["subject"]["batch"] for r in v}) > 1}
    for i, (name, own) in enumerate(lines.items()):
        batches = [r["subject"]["batch"] for r in own]
        axes.plot(batches, [r["latency"]["median"] for r in own], "o-", color=COLOURS[i % len(COLOURS)], label=name)
        axes.set_xticks(batches)
    axes.set(xlabel="targets", ylabel="milliseconds per frame, all targets")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    if lines:
        axes.legend(fontsize=8)
    return bool(lines)


def _threads(axes: Any, rows: List[Row]) -> bool:
    groups: Dict[str, List[Row]] = {}
    for row in _named(rows, "P2"):
        if row["subject"]["threads"] and row["subject"]["batch"] == 1:
            key = f"{row['subject']['tracker']}, {str(row['subject']['name']).partition(' (')[0]}"
            groups.setdefault(key, []).append(row)
    lines = {k: sorted(v, key=lambda r: r["subject"]["threads"]) for k, v in groups.items()}
    lines = {k: v for k, v in lines.items() if len({r["subject"]["threads"] for r in v}) > 1}
    for i, (name, own) in enumerate(lines.items()):
        threads = [r["subject"]["threads"] for r in own]
        axes.plot(threads, [r["fps"] for r in own], "o-", color=COLOURS[i % len(COLOURS)], label=name)
        axes.set_xticks(threads)
    axes.set(xlabel="threads", ylabel="frames per second")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.3)
    if lines:
        axes.legend(fontsize=8)
    return bool(lines)


_PLOTS: Tuple[Tuple[str, str, Tuple[float, float], Callable[[Any, List[Row]], bool]], ...] = (
    (
        "speed-accuracy",
        "Speed against accuracy, as the paper's Fig. 1. Grey: the paper's figures on its own device. Stars: speed "
        "measured here, at the accuracy the paper publishes for the model (which this run did not measure)",
        (7, 4.2),
        _speed_accuracy,
    ),
    ("latency", "Distribution of single calls; the dot is the median", (7, 4.0), _latency),
    ("stages", "Where the time of a frame goes", (7, 2.6), _stages),
    ("targets", "Several targets in one frame", (6, 3.4), _targets),
    ("threads", "Threads", (6, 3.4), _threads),
)
