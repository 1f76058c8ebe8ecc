"""Protocol P8: joules per frame, rail by rail, camera-paced and flat out.

Power comes from the board's own sensors: jetson-stats or tegrastats on a Jetson, RAPL counters on a PC,
nvidia-smi for a graphics card. Every figure carries the name of its rail; rails are not added up, because
on most boards some contain others.
"""

from __future__ import annotations

import re
import subprocess
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.facts import ask_nvidia_smi, run_command
from asymtrack_edge.benchmarks.speed.jetson import parse_jtop_power, parse_tegrastats
from asymtrack_edge.errors import BackendError, UsageError

#: A reading of all rails: the clock in seconds, and milliwatts by rail.
Sample = Tuple[float, Dict[str, float]]

INTERVAL = 0.1


class PowerMeter(ABC):
    """Samples power between ``start`` and ``stop``.

    Attributes:
        name: of the source, for the report.
    """

    name = ""

    @abstractmethod
    def start(self) -> None:
        """Begins sampling."""

    @abstractmethod
    def stop(self) -> List[Sample]:
        """Ends sampling; the samples in order."""


class PollingMeter(PowerMeter):
    """Calls a function at an interval from a thread of its own."""

    def __init__(
        self,
        name: str,
        read: Callable[[], Dict[str, float]],
        interval: float = INTERVAL,
        close: Callable[[], Any] = lambda: None,
    ) -> None:
        self.name = name
        self._read = read
        self._interval = interval
        self._close = close
        self._samples: List[Sample] = []
        self._ended = threading.Event()
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """See ``PowerMeter.start``."""
        self._samples = []
        self._ended.clear()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._ended.is_set():
            self._samples.append((monotonic(), self._read()))
            self._ended.wait(self._interval)

    def stop(self) -> List[Sample]:
        """See ``PowerMeter.stop``."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._close()
        return self._samples


class TegrastatsMeter(PowerMeter):
    """Reads the lines of a running ``tegrastats``."""

    name = "tegrastats"

    def __init__(self, command: Sequence[str] = ("tegrastats", "--interval", "100")) -> None:
        self._command = list(command)
        self._process: Optional[subprocess.Popen[str]] = None
        self._samples: List[Sample] = []
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """See ``PowerMeter.start``."""
        self._samples = []
        try:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise BackendError(f"cannot run {self._command[0]}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            reading = parse_tegrastats(line)
            if reading is not None and reading.milliwatts:
                self._samples.append((monotonic(), reading.milliwatts))

    def stop(self) -> List[Sample]:
        """See ``PowerMeter.stop``."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        if self._thread is not None:
            self._thread.join(timeout=2)
        return self._samples


class RaplCounters:
    """Intel's and AMD's energy counters; milliwatts come from the difference between two readings."""

    def __init__(self, root: Path = Path("/sys/class/powercap"), clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._last: Dict[str, Tuple[float, int]] = {}
        self._files: Dict[str, Path] = {}
        for zone in sorted(root.glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text().strip()
                int((zone / "energy_uj").read_text())
            except (OSError, ValueError):
                continue  # readable only by root on most systems
            self._files[f"{name} (RAPL)"] = zone / "energy_uj"

    @property
    def available(self) -> bool:
        """Whether there is a counter that this user may read."""
        return bool(self._files)

    def read(self) -> Dict[str, float]:
        """Mean milliwatts since the last reading; empty the first time and where a counter wrapped."""
        found = {}
        for rail, path in self._files.items():
            now, energy = self._clock(), int(path.read_text())
            before = self._last.get(rail)
            self._last[rail] = (now, energy)
            if before is not None and energy >= before[1] and now > before[0]:
                found[rail] = (energy - before[1]) / 1000 / (now - before[0])
        return found


def find_meter(gpu: Optional[str] = None) -> PowerMeter:
    """The best power sensor of this machine; on a PC those of processor and graphics card together.

    Args:
        gpu: PCI address of the graphics card; None for the first.

    Raises:
        BackendError: it has none that can be read.
    """
    try:
        from jtop import jtop
    except ImportError:
        pass
    else:
        board = jtop(interval=INTERVAL)
        try:
            board.start()
        except Exception as error:  # jetson-stats raises its own and many others
            raise BackendError(
                f"jetson-stats is installed but does not answer ({error}): is its service running? In a container, "
                "mount /run/jtop.sock"
            ) from None
        return PollingMeter("jetson-stats", lambda: parse_jtop_power(board.power), close=board.close)
    if run_command(["which", "tegrastats"]):
        return TegrastatsMeter()
    counters = RaplCounters()
    sensors = {"RAPL": counters.read} if counters.available else {}
    if _graphics_card(gpu):
        sensors["nvidia-smi"] = lambda: _graphics_card(gpu)
    if sensors:
        return PollingMeter(", ".join(sensors), lambda: {k: v for read in sensors.values() for k, v in read().items()})
    raise BackendError(
        "this machine has no power sensor that can be read: energy needs tegrastats or jetson-stats (Jetson), "
        "readable RAPL counters (/sys/class/powercap, usually root) or nvidia-smi"
    )


def find_meter_or_fail() -> None:
    """Finds out whether there is a power sensor, before anything slow is done.

    Raises:
        BackendError: there is none.
    """
    meter = find_meter()
    if isinstance(meter, PollingMeter):
        meter.stop()


def values(energy: Energy) -> Dict[str, float]:
    """Figures of a row, named with rail and unit."""
    found: Dict[str, float] = {}
    for rail, joule in energy.joules_per_frame.items():
        found[f"{rail} (J/frame)"] = joule
        found[f"{rail} above idle (J/frame)"] = energy.joules_above_idle[rail]
        found[f"{rail} (W)"] = energy.watts[rail]
        found[f"{rail} idle (W)"] = energy.idle_watts.get(rail, 0.0)
    if energy.paced is not None:
        found["late frames (%)"] = 100.0 * energy.late / energy.frames
    return found


def _graphics_card(gpu: Optional[str]) -> Dict[str, float]:
    match = re.match(r"\s*([\d.]+)", ask_nvidia_smi("power.draw", gpu) or "")
    return {"GPU board (nvidia-smi)": 1000 * float(match.group(1))} if match else {}


def joules(samples: Sequence[Sample], start: float, end: float) -> Dict[str, float]:
    """Energy by rail between two moments, by the trapezium rule; the ends take their nearest sample.

    Raises:
        BackendError: fewer than two samples lie between them.
    """
    inside = [s for s in samples if start <= s[0] <= end and s[1]]
    if len(inside) < 2:
        raise BackendError("the power sensor gave fewer than two readings: measure for longer")
    found = {}
    # Sensors that count energy have nothing to say in their first reading.
    for rail in dict.fromkeys(rail for _, reading in inside for rail in reading):
        points = [(t, p[rail]) for t, p in inside if rail in p]
        points = [(start, points[0][1]), *points, (end, points[-1][1])]
        area = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in zip(points, points[1:]))
        found[rail] = area / 1000
    return found


@dataclass(frozen=True)
class Energy:
    """What one way of running costs.

    Attributes:
        meter: source of the figures.
        paced: frames per second of the camera that was imitated; None for flat out.
        frames: tracked.
        seconds: of it.
        late: frames that were not done when the next one was due.
        joules_per_frame: by rail, everything the rail fed.
        joules_above_idle: by rail, less what the idle machine draws in the same time.
        idle_watts, watts: by rail, mean.
    """

    meter: str
    paced: Optional[float]
    frames: int
    seconds: float
    late: int
    joules_per_frame: Dict[str, float]
    joules_above_idle: Dict[str, float]
    idle_watts: Dict[str, float]
    watts: Dict[str, float]


def measure(
    step: Callable[[], Any],
    meter: PowerMeter,
    seconds: float,
    paced: Optional[float] = 30.0,
    idle_seconds: float = 5.0,
    clock: Callable[[], float] = monotonic,
    wait: Callable[[float], Any] = sleep,
) -> Energy:
    """Runs ``step`` once per frame while the meter runs.

    Args:
        step: tracks one frame.
        meter: see ``find_meter``.
        seconds: of tracking.
        paced: frames per second of the imitated camera; None to go on without a pause.
        idle_seconds: the machine is watched for so long before.
        clock: in seconds, the same that the meter reads.
        wait: sleeps for some seconds.

    Raises:
        UsageError: times that cannot be.
        BackendError: the meter gave no readings.
    """
    if seconds <= 0 or idle_seconds <= 0 or (paced is not None and paced <= 0):
        raise UsageError("durations and the frame rate must be positive")
    step()
    meter.start()
    idle_start = clock()
    wait(idle_seconds)
    start = clock()
    frames = late = 0
    while clock() - start < seconds:
        step()
        frames += 1
        if paced is not None:
            due = start + frames / paced
            if clock() < due:
                wait(due - clock())
            else:
                late += 1
    end = clock()
    samples = meter.stop()
    idle, used = joules(samples, idle_start, start), joules(samples, start, end)
    duration = end - start
    idle_watts = {rail: e / (start - idle_start) for rail, e in idle.items()}
    return Energy(
        meter=meter.name,
        paced=paced,
        frames=frames,
        seconds=duration,
        late=late,
        joules_per_frame={rail: e / frames for rail, e in used.items()},
        joules_above_idle={r: (e - idle_watts.get(r, 0.0) * duration) / frames for r, e in used.items()},
        idle_watts=idle_watts,
        watts={rail: e / duration for rail, e in used.items()},
    )
