"""What a run reports: a progress bar, a JSON-lines log and its plot."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.files import OutputFile

LOG = "log.jsonl"
PLOT = "plot.png"


class Log:
    """Averages the steps' values; with a folder, it also writes and shows them every ``every`` seconds."""

    def __init__(self, folder: Optional[Path], every: float) -> None:
        self.folder = folder
        self.every = every
        self.began, self.written = time.monotonic(), -math.inf
        self.pairs = 0
        self.values: Dict[str, float] = {}
        self._row: Dict[str, Any] = {}  # not written yet
        form = "{percentage:5.1f} % [{elapsed}<{remaining}]{postfix}"
        #: The caller closes it at the end.
        self.bar = cli.progress(total=1.0, bar_format=form, leave=True, disable=folder is None or None)

    def add(self, step: int, pairs: int, count: int, progress: float, values: Dict[str, float]) -> None:
        """Adds a step of ``count`` pairs; ``step``, ``pairs`` and ``progress`` (0..1) say how far the run has come.

        ``values`` are averaged, except ``lr``.
        """
        self.pairs += count
        for name, value in values.items():
            self.values[name] = 0.98 * self.values.get(name, value) + 0.02 * value
        self.values["lr"] = values["lr"]
        self._row, self._progress = {"step": step, "pairs": pairs}, progress
        if time.monotonic() - self.written >= self.every:
            self.write()

    def write(self) -> None:
        """Writes and shows the latest values, unless they are written already."""
        if self.folder is None or not self._row:
            return
        self.written = time.monotonic()
        speed = self.pairs / max(1e-9, self.written - self.began)
        try:
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps({**self._row, "pairs_per_s": speed, **self.values}) + "\n")
        except OSError as error:  # on a full disk, the error names no file
            error.filename = str(self.folder / LOG)
            raise
        text = f"{self._row['pairs']:,} pairs, {speed:.1f} pairs/s"
        text += f", loss {self.values['loss']:.3f}, IoU {self.values['iou']:.3f}"
        self._row = {}
        if self.bar.disable:
            cli.say(f"{100 * self._progress:5.1f} %  {text}")
        else:
            self.bar.n = min(1.0, self._progress)
            self.bar.set_postfix_str(text)


def read_log(folder: Path) -> List[Dict[str, Any]]:
    """The rows of a run's log, without a line cut short by a kill; raises ``UsageError`` if there is no log."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        raise UsageError(f"{folder} holds no {LOG}: name the folder of a run") from None
    rows = []
    for line in lines:
        with suppress(RecursionError, TypeError, ValueError):
            rows.append(dict(json.loads(line)))
    return rows


def plot_run(folder: Path) -> Path:
    """Draws loss, IoU and learning rate of a run over the number of pairs; returns the image's path.

    Raises ``UsageError`` if there is no log, or if it is still empty.
    """
    from matplotlib.figure import Figure

    rows = [row for row in read_log(folder) if {"pairs", "loss", "iou", "lr"} <= row.keys()]
    if not rows:
        raise UsageError(f"the log of {folder} is still empty: plot it after the first seconds of training")
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    for panel, name, label in zip(panels, ("loss", "iou", "lr"), ("loss", "IoU", "learning rate")):
        panel.plot([row["pairs"] / 1000 for row in rows], [row[name] for row in rows], linewidth=1)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("thousand pairs")
    path = folder / PLOT
    with OutputFile(path) as file:
        figure.savefig(file.place, dpi=120, format="png")
    return path
