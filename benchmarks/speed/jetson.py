"""Reading what Jetson's own tools print: nvpmodel, jetson_clocks, tegrastats, /etc/nv_tegra_release.

Formats differ between boards (AGX Xavier, AGX Orin, Orin NX and Nano) and releases; the parsers take
what is there and leave out what is not. Rails are reported by their own names: which of them add up to
the module's power differs from board to board, so nothing is summed here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

#: JetPack by L4T release (NVIDIA's JetPack archive).
_JETPACK = (
    ((35, 1), "5.0.2"),
    ((35, 2), "5.1"),
    ((35, 3), "5.1.1"),
    ((35, 4), "5.1.2"),
    ((35, 5), "5.1.3"),
    ((35, 6), "5.1.4 or newer"),
    ((36, 2), "6.0 DP"),
    ((36, 3), "6.0"),
    ((36, 4), "6.1 or newer"),
)

#: A sensor that is switched off reports this temperature.
_OFF = -256.0


def parse_release(text: str) -> Optional[str]:
    """L4T version, for example ``"35.4.1"``, from ``/etc/nv_tegra_release``; None if it is no such text."""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{match.group(1)}.{match.group(2)}" if match else None


def jetpack_of(l4t: Optional[str]) -> Optional[str]:
    """JetPack version of an L4T release; None if this table does not have it."""
    if not l4t:
        return None
    numbers = tuple(int(n) for n in l4t.split(".")[:2])
    return next((version for release, version in _JETPACK if release == numbers), None)


def parse_nvpmodel(text: str) -> Optional[Tuple[str, Optional[int]]]:
    """Name and number of the power mode from ``nvpmodel -q``; None if the text has none."""
    name = re.search(r"NV Power Mode:\s*(\S+)", text)
    if not name:
        return None
    number = re.search(r"^\s*(\d+)\s*$", text, re.MULTILINE)
    return name.group(1), int(number.group(1)) if number else None


@dataclass(frozen=True)
class Clocks:
    """What ``jetson_clocks --show`` says, in MHz.

    Attributes:
        units: unit (``"cpu0"``, ``"GPU"``, ``"EMC"``) -> lowest, highest and current clock.
        online_cpus: cores that are switched on.
    """

    units: Dict[str, Tuple[float, float, float]]
    online_cpus: int

    @property
    def locked(self) -> bool:
        """Whether every clock of CPU and GPU is fixed (its lowest is its highest), as jetson_clocks does."""
        ranges = [u for n, u in self.units.items() if n == "GPU" or n.startswith("cpu")]
        return bool(ranges) and all(low == high for low, high, _ in ranges)


def parse_jetson_clocks(text: str) -> Optional[Clocks]:
    """Parses ``jetson_clocks --show``; None if the text names no clocks."""
    units: Dict[str, Tuple[float, float, float]] = {}
    online = 0
    for line in text.splitlines():
        match = re.match(r"\s*(cpu\d+|GPU|EMC)\b:?(.*)MinFreq=(\d+)\s+MaxFreq=(\d+)\s+CurrentFreq=(\d+)", line)
        if not match:
            continue
        name, before = match.group(1), match.group(2)
        if name.startswith("cpu"):
            if "Online=0" in before:
                continue
            online += 1
        # CPU clocks are printed in kHz, the others in Hz.
        unit = 1e3 if name.startswith("cpu") else 1e6
        low, high, now = (int(match.group(i)) / unit for i in (3, 4, 5))
        units[name] = (low, high, now)
    return Clocks(units, online) if units else None


@dataclass(frozen=True)
class Reading:
    """One line of tegrastats.

    Attributes:
        ram_mb: used and total.
        cpu: per core load in percent and clock in MHz; None for a core that is off.
        gpu_load: percent; None if not printed.
        gpu_mhz: clock of each GPC, or of the GPU; empty if not printed.
        temperatures: degrees Celsius by sensor; sensors that are off are left out.
        milliwatts: by rail, at this moment; a rail called NC (not connected) is left out.
    """

    ram_mb: Optional[Tuple[int, int]] = None
    cpu: Tuple[Optional[Tuple[int, int]], ...] = ()
    gpu_load: Optional[int] = None
    gpu_mhz: Tuple[int, ...] = ()
    temperatures: Dict[str, float] = field(default_factory=dict)
    milliwatts: Dict[str, float] = field(default_factory=dict)


def parse_tegrastats(line: str) -> Optional[Reading]:
    """Parses one line of tegrastats of JetPack 4 to 6; None if it is no such line."""
    ram = re.search(r"\bRAM (\d{1,9})/(\d{1,9})MB", line)
    cpu = re.search(r"\bCPU \[([^\]]*)\]", line)
    if not ram or not cpu:
        return None
    gpu = re.search(r"\bGR3D_FREQ (\d{1,9})%(?:@\[?(\d{1,9}(?:,\d{1,9})*)\]?)?", line)
    temperatures = {
        name: float(value)
        for name, value in re.findall(r"(?<!\S)([A-Za-z][\w.]*)@(-?\d+(?:\.\d+)?)C\b", line)
        if float(value) != _OFF
    }
    milliwatts = {
        name: float(now)
        # Before JetPack 5 the unit is left out; "RAM 1/2MB" and the like have another one.
        for name, now in re.findall(r"(?<!\S)([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?!\S)", line)
        if name != "NC"
    }
    return Reading(
        ram_mb=(int(ram.group(1)), int(ram.group(2))),
        cpu=tuple(_core(core) for core in cpu.group(1).split(",")),
        gpu_load=int(gpu.group(1)) if gpu else None,
        gpu_mhz=tuple(int(n) for n in gpu.group(2).split(",")) if gpu and gpu.group(2) else (),
        temperatures=temperatures,
        milliwatts=milliwatts,
    )


def _core(text: str) -> Optional[Tuple[int, int]]:
    match = re.match(r"\s*(\d+)%@(\d+)", text)
    return (int(match.group(1)), int(match.group(2))) if match else None


def parse_jtop_power(power: Mapping[str, Any]) -> Dict[str, float]:
    """Milliwatts by rail from jetson-stats' ``jtop.power``, of version 4 or 3.

    Version 4: ``{"rail": {"GPU": {"power": 1234, ...}}, "tot": {"name": "ALL", "power": ...}}``.
    Version 3: ``({"ALL": {"cur": ...}}, {"GPU": {"cur": 1234, "avg": ...}})`` reached as a pair, or the
    rails alone. The total is kept only where the board has a rail for it (its name is not ``ALL``): a
    sum made by software counts rails twice on some boards.
    """
    rails: Any = power
    total: Dict[str, float] = {}
    if isinstance(power, (tuple, list)):
        rails = power[-1]
    elif "rail" in power:
        rails = power["rail"]
        tot = power.get("tot", {})
        name = str(tot.get("name", "ALL"))
        if name != "ALL" and "power" in tot:
            total[name] = float(tot["power"])
    found: Dict[str, float] = {}
    for name, rail in rails.items():
        value = rail.get("power", rail.get("cur")) if isinstance(rail, Mapping) else None
        if value is not None and name != "NC":
            found[str(name)] = float(value)
    return {**found, **total}


def readings(lines: List[str]) -> List[Reading]:
    """All lines of a recorded tegrastats output that are readings."""
    return [r for r in map(parse_tegrastats, lines) if r is not None]
