"""Protocol P8: joules per frame, rail by rail, camera-paced and flat out.

Power comes from the board's own sensors: the INA3221 monitors of a Jetson, the RAPL counters of a PC,
NVML for a graphics card. Every figure carries the name of its rail; rails are not added up, because on
most boards some contain others.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.machine import gpu_milliwatts, read
from asymtrack_edge.errors import BackendError, UsageError

#: Gives milliwatts by rail now; rails that have nothing to say yet are left out.
Sensor = Callable[[], Dict[str, float]]
#: The clock in seconds, and a reading of all rails.
Sample = Tuple[float, Dict[str, float]]
#: The machine is watched for so long before anything runs.
IDLE_SECONDS = 5.0


@contextmanager
def sampling(sensors: Mapping[str, Sensor], interval: float = 0.1) -> Iterator[List[Sample]]:
    """Reads sensors at an interval, from a thread of its own, into the list that it yields.

    Args:
        sensors: by name of the source.
        interval: seconds between readings.
    """
    samples: List[Sample] = []
    ended = threading.Event()

    def poll() -> None:
        while True:
            now = monotonic()
            samples.append((now, {rail: mw for sensor in sensors.values() for rail, mw in sensor().items()}))
            if ended.wait(interval):
                return

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def find_sensors(gpu: int = 0) -> Dict[str, Sensor]:
    """All power sensors of this machine, by name of the source.

    Args:
        gpu: index of the CUDA device.

    Raises:
        BackendError: it has none that can be read.
    """
    monitors, counters = Ina3221(), Rapl()
    sensors: Dict[str, Sensor] = {}
    if monitors.rails:
        sensors["INA3221"] = monitors.read
    if counters.files:
        sensors["RAPL"] = counters.read
    if gpu_milliwatts(gpu):
        sensors["NVML"] = partial(gpu_milliwatts, gpu)
    if not sensors:
        raise BackendError(
            "this machine has no power sensor that can be read: energy needs a Jetson's INA3221 monitors "
            "(/sys/class/hwmon), RAPL counters (/sys/class/powercap, usually for root) or an NVIDIA graphics card "
            "with nvidia-ml-py"
        )
    return sensors


class Ina3221:
    """The power monitors of a Jetson (JetPack 5 and 6), which every user may read.

    Attributes:
        rails: files of voltage and current by rail.
    """

    def __init__(self, root: Path = Path("/sys/class/hwmon")) -> None:
        self.rails: Dict[str, Tuple[Path, Path]] = {}
        for monitor in sorted(root.glob("hwmon*")):
            for label in sorted(monitor.glob("in[1-3]_label")) if "ina3221" in read(monitor / "name") else ():
                rail, number = read(label), label.name[2]
                if rail and rail != "NC":  # not connected
                    self.rails[rail] = (monitor / f"in{number}_input", monitor / f"curr{number}_input")

    def read(self) -> Dict[str, float]:
        """Milliwatts by rail, from millivolts and milliamperes."""
        texts = {rail: (read(volts), read(amperes)) for rail, (volts, amperes) in self.rails.items()}
        return {rail: int(v) * int(a) / 1000 for rail, (v, a) in texts.items() if v and a}


class Rapl:
    """Intel's and AMD's energy counters; milliwatts come from the difference between two readings.

    Attributes:
        files: by rail, of those counters that this user may read.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap"), clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._last: Dict[str, Tuple[float, int]] = {}
        zones = {f"{read(zone / 'name')} (RAPL)": zone / "energy_uj" for zone in sorted(root.glob("intel-rapl:*"))}
        self.files = {rail: file for rail, file in zones.items() if read(file).isdigit()}

    def read(self) -> Dict[str, float]:
        """Mean milliwatts since the last reading; without a rail the first time and where its counter wrapped."""
        found = {}
        for rail, file in self.files.items():
            now, energy = self._clock(), int(read(file))
            before = self._last.get(rail)
            self._last[rail] = (now, energy)
            if before is not None and energy >= before[1] and now > before[0]:
                found[rail] = (energy - before[1]) / 1000 / (now - before[0])
        return found


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


def measure(
    step: Callable[[], Any],
    meter: ContextManager[List[Sample]],
    seconds: float,
    paced: Optional[float],
    idle_seconds: float,
    clock: Callable[[], float] = monotonic,
    wait: Callable[[float], Any] = sleep,
) -> Dict[str, float]:
    """Runs ``step`` once per frame while power is sampled.

    Args:
        step: tracks one frame.
        meter: of ``sampling``.
        seconds: of tracking.
        paced: frames per second of the imitated camera; None to go on without a pause.
        idle_seconds: the machine is watched for so long before.
        clock: in seconds, that of the samples.
        wait: sleeps for some seconds.

    Returns:
        ``fps`` and, by rail, joules per frame (everything the rail fed, and less what the idle machine
        draws in the same time), mean watts and idle watts; for a paced run the share of late frames,
        which were not done when the next one was due.

    Raises:
        UsageError: times that cannot be.
        BackendError: the sensors gave no readings.
    """
    if seconds <= 0 or (paced is not None and paced <= 0):
        raise UsageError("--seconds and --fps must be positive")
    step()
    with meter as samples:
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
    idle, used = joules(samples, idle_start, start), joules(samples, start, end)
    found = {"fps": frames / (end - start)}
    for rail, energy in used.items():
        idle_watts = idle.get(rail, 0.0) / (start - idle_start)
        found[f"{rail} (J/frame)"] = energy / frames
        found[f"{rail} above idle (J/frame)"] = (energy - idle_watts * (end - start)) / frames
        found[f"{rail} (W)"] = energy / (end - start)
        found[f"{rail} idle (W)"] = idle_watts
    if paced is not None:
        found["late frames (%)"] = 100.0 * late / frames
    return found
