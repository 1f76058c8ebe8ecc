"""Protocol P8: joules per frame by power rail, at camera rate and at full speed.

Power is read from the machine's own sensors: the INA3221 monitors of a Jetson, the RAPL counters of a PC,
NVML for a graphics card. Every figure carries the name of its rail; rails are not added up, because on
most boards some rails contain others.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from time import monotonic, sleep
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from asymtrack_edge.benchmarks.speed.machine import gpu_milliwatts
from asymtrack_edge.errors import BackendError
from asymtrack_edge.files import system_text

#: Returns the present power by rail, in milliwatts; rails without a reading yet are left out.
Sensor = Callable[[], Dict[str, float]]
#: The time in seconds, and a reading of all rails.
Sample = Tuple[float, Dict[str, float]]
#: Idle power is measured for this long before anything runs.
IDLE_SECONDS = 5.0
#: Seconds between readings.
INTERVAL = 0.1


@contextmanager
def sampling(sensors: Mapping[str, Sensor]) -> Iterator[List[Sample]]:
    """Reads sensors every ``INTERVAL``, in a background thread, into the list that it yields."""

    def read() -> Sample:
        return monotonic(), {rail: mw for sensor in sensors.values() for rail, mw in sensor().items()}

    # A counter's first reading is empty, or the mean since an earlier measurement: it is from before any start.
    samples, ended = [read()], threading.Event()

    def poll() -> None:
        while not ended.wait(INTERVAL):
            samples.append(read())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def find_sensors(gpu: int) -> Dict[str, Sensor]:
    """All readable power sensors of this machine, by source; raises BackendError if there is none."""
    nvml = partial(gpu_milliwatts, gpu) if gpu_milliwatts(gpu) else None
    sensors = {name: s for name, s in (("INA3221", ina3221()), ("RAPL", rapl()), ("NVML", nvml)) if s}
    if not sensors:
        raise BackendError(
            "this machine has no readable power sensor: energy needs a Jetson's INA3221 monitors "
            "(/sys/class/hwmon), RAPL counters (/sys/class/powercap, usually readable by root only) or an NVIDIA "
            "graphics card with nvidia-ml-py"
        )
    return sensors


def ina3221(root: Path = Path("/sys/class/hwmon")) -> Optional[Sensor]:
    """The power monitors of a Jetson (JetPack 5 and 6), which every user may read; None if there are none."""
    rails: Dict[str, Tuple[Path, Path]] = {}
    for label in sorted(root.glob("hwmon*/in[1-3]_label")):
        rail, number = system_text(label), label.name[2]
        if rail not in ("", "NC") and "ina3221" in system_text(label.with_name("name")):  # NC: not connected
            rails[rail] = (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))

    def milliwatts() -> Dict[str, float]:
        texts = {rail: (system_text(volts), system_text(amperes)) for rail, (volts, amperes) in rails.items()}
        return {rail: int(v) * int(a) / 1000 for rail, (v, a) in texts.items() if v and a}

    return milliwatts if rails else None


def rapl(root: Path = Path("/sys/class/powercap"), clock: Callable[[], float] = monotonic) -> Optional[Sensor]:
    """The energy counters of Intel and AMD that this user may read; None if there are none.

    A reading is the mean power since the last one. It lacks a rail at first, and when the rail's counter has wrapped.
    """
    zones = {}
    for zone in sorted(root.glob("intel-rapl:*")):  # intel-rapl:0:1 is a part of intel-rapl:0
        names = (system_text(path / "name") for path in (root / zone.name.rpartition(":")[0], zone))
        zones[f"{' '.join(filter(None, names))} (RAPL)"] = zone / "energy_uj"
    files = {rail: file for rail, file in zones.items() if system_text(file).isdigit()}
    last: Dict[str, Tuple[float, int]] = {}

    def milliwatts() -> Dict[str, float]:
        found = {}
        for rail, file in files.items():
            now, text = clock(), system_text(file)
            if text.isdigit():
                since, before = last.get(rail, (now, int(text)))
                last[rail] = (now, int(text))
                if int(text) >= before and now > since:
                    found[rail] = (int(text) - before) / 1000 / (now - since)
        return found

    return milliwatts if files else None


def _watts(samples: Sequence[Sample], start: float, end: float) -> Dict[str, float]:
    """Mean power by rail between two times; raises BackendError if fewer than two samples lie between them."""
    inside = [reading for now, reading in samples if start <= now <= end and reading]
    if len(inside) < 2:
        raise BackendError("the power sensor gave fewer than two readings: measure for longer")
    rails = dict.fromkeys(rail for reading in inside for rail in reading)
    return {rail: mean(reading[rail] for reading in inside if rail in reading) / 1000 for rail in rails}


def measure(
    step: Callable[[], object], sensors: Mapping[str, Sensor], seconds: float, paced: Optional[float]
) -> Dict[str, float]:
    """Runs ``step`` once per frame while power is sampled, after ``IDLE_SECONDS`` of rest.

    ``paced`` is the frame rate of an imitated camera, or None to run without pauses. Returns ``fps`` and, by rail,
    joules per frame (the total, and the total minus what the idle machine draws in the same time), mean watts and
    idle watts; for a paced run also the share of late frames, those not finished when the next one was due.
    """
    step()
    with sampling(sensors) as samples:
        idle_start = monotonic()
        sleep(IDLE_SECONDS)
        start = monotonic()
        frames = late = 0
        while monotonic() - start < seconds:
            step()
            frames += 1
            if paced is not None:
                rest = start + frames / paced - monotonic()
                late += rest <= 0
                sleep(max(0.0, rest))
        end = monotonic()
    idle, fps = _watts(samples, idle_start, start), frames / (end - start)
    found = {"fps": fps}
    for rail, watts in _watts(samples, start, end).items():
        found[f"{rail} (J/frame)"] = watts / fps
        found[f"{rail} above idle (J/frame)"] = (watts - idle.get(rail, 0.0)) / fps
        found[f"{rail} (W)"] = watts
        found[f"{rail} idle (W)"] = idle.get(rail, 0.0)
    if paced is not None:
        found["late frames (%)"] = 100.0 * late / frames
    return found
