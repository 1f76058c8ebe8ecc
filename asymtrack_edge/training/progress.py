"""What a run tells while it goes on: a live line, a JSONL log, and its plot."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Dict, List, Optional, Type

from asymtrack_edge.errors import MissingDependencyError, UsageError
from asymtrack_edge.training.state import RunState

LOG = "log.jsonl"
PLOT = "plot.png"


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish to stop; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: Dict[int, Any] = {}

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = 1

    def __enter__(self) -> StopSignals:
        # Only the main thread may install handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Log:
    """Averages what each step gives and, every few seconds, writes and shows it.

    Args:
        folder: of the run; None writes and shows nothing.
        every: seconds between lines.
        pairs: how many had been seen when this call of the run began.
    """

    def __init__(self, folder: Optional[Path], every: float, pairs: int) -> None:
        self.folder = folder
        self.every = every
        self.began = self.written = time.monotonic()
        self.pairs = pairs
        self.values: Dict[str, float] = {}
        self.file: Optional[IO[str]] = None

    def __enter__(self) -> Log:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / LOG, "a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        if self.file is not None:
            self.file.close()
            if sys.stderr.isatty() and self.values:
                print(file=sys.stderr)

    def add(self, state: RunState, progress: float, values: Dict[str, float]) -> None:
        """Takes in the values of a step."""
        for name, value in values.items():
            self.values[name] = 0.98 * self.values.get(name, value) + 0.02 * value
        self.values["lr"] = values["lr"]
        now = time.monotonic()
        if self.file is None or (now - self.written < self.every and state.step > 1):
            return
        self.written = now
        row = {
            "step": state.step,
            "pairs": state.pairs,
            "seconds": round(state.seconds, 1),
            "pairs_per_s": (state.pairs - self.pairs) / max(1e-9, now - self.began),
            **self.values,
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        _show(row, progress)


def _show(row: Dict[str, Any], progress: float) -> None:
    line = (
        f"{100 * min(1.0, progress):5.1f} %  {row['pairs']:>9,} pairs  {row['pairs_per_s']:6.1f} pairs/s  "
        f"loss {row['loss']:.3f}  IoU {row['iou']:.3f}"
    )
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def read_log(folder: Path) -> List[Dict[str, Any]]:
    """The rows of a run's log; a last line cut short by a kill is left out.

    Raises:
        UsageError: there is no log.
    """
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UsageError(f"{folder} holds no {LOG}: name the folder of a run") from None
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def plot_run(folder: Path) -> Path:
    """Draws loss, IoU and learning rate of a run over its pairs; returns the image's path.

    Raises:
        MissingDependencyError: matplotlib is absent.
        UsageError: there is no log, or nothing in it yet.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "train", "plotting a run") from None
    rows = [row for row in read_log(folder) if "loss" in row]
    if not rows:
        raise UsageError(f"the log of {folder} is still empty: plot it after the first seconds of training")
    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    pairs = [row["pairs"] / 1000 for row in rows]
    for panel, name, label in zip(panels, ("loss", "iou", "lr"), ("loss", "IoU", "learning rate")):
        panel.plot(pairs, [row[name] for row in rows], linewidth=1)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    held = [(row["pairs"] / 1000, row["held_out_iou"]) for row in read_log(folder) if "held_out_iou" in row]
    if held:
        panels[1].plot(*zip(*held), "o", label="held out, averaged weights")
        panels[1].legend()
    panels[-1].set_xlabel("thousand pairs")
    path = folder / PLOT
    figure.savefig(path.with_suffix(".part.png"), dpi=120)
    path.with_suffix(".part.png").replace(path)
    return path
