"""Where a figure was measured: hardware, system, versions, power mode, clocks, temperatures.

Everything is asked of the running system; nothing can be passed in by hand. A figure from hardware
that was not there cannot come about: what the system does not report is ``None``.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import asymtrack_edge
from asymtrack_edge.benchmarks.speed.jetson import (
    jetpack_of,
    parse_jetson_clocks,
    parse_nvpmodel,
    parse_release,
)
from asymtrack_edge.runtime.backends.threads import processors

#: Runs a command and returns what it prints; None if it is absent or fails.
Runner = Callable[[Sequence[str]], Optional[str]]

_PACKAGES = ("numpy", "opencv-python", "opencv-contrib-python", "opencv-python-headless", "onnxruntime",
             "onnxruntime-gpu", "openvino", "onnx", "torch", "tensorrt", "tensorrt-rtx", "pycuda")  # fmt: skip


def run_command(command: Sequence[str], timeout: float = 10.0) -> Optional[str]:
    """See ``Runner``; a command that takes longer than ``timeout`` seconds has failed."""
    try:
        done = subprocess.run(
            list(command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Facts:
    """What does not change during a run. ``None``: not known, or not there.

    Attributes:
        cpu: model name; ``cores`` that this process may use.
        board: of an embedded device, for example ``"NVIDIA Jetson AGX Orin Developer Kit"``.
        gpu: name; ``compute_capability`` for example ``"8.7"``; ``driver`` version.
        l4t, jetpack: releases on a Jetson.
        power_mode: nvpmodel's name and number; on a PC the CPU's frequency governor.
        clocks_locked: whether jetson_clocks (or ``nvidia-smi -lgc``, which nobody can see) fixed them.
        versions: of the packages that take part.
    """

    cpu: Optional[str]
    cores: int
    ram_mb: Optional[int]
    board: Optional[str]
    virtual_machine: Optional[bool]
    gpu: Optional[str]
    compute_capability: Optional[str]
    driver: Optional[str]
    os: str
    kernel: str
    l4t: Optional[str]
    jetpack: Optional[str]
    power_mode: Optional[str]
    clocks_locked: Optional[bool]
    asymtrack_edge: str
    python: str
    versions: Dict[str, str]

    def to_dict(self) -> Dict[str, Any]:
        """As plain data, for the report."""
        return asdict(self)

    @property
    def title(self) -> str:
        """The device in a few words."""
        parts = [self.board or self.cpu or "unknown machine"]
        if self.cores and not self.board:
            parts.append(f"{self.cores} cores")
        if self.gpu:
            parts.append(self.gpu)
        if self.power_mode:
            parts.append(self.power_mode)
        return ", ".join(parts)


@dataclass(frozen=True)
class Conditions:
    """What changes during a run.

    Attributes:
        temperatures: degrees Celsius by sensor.
        cpu_mhz: mean clock of the cores now.
        gpu_mhz: clock of the GPU now.
        load: processes that ran or waited on average over the last minute.
    """

    temperatures: Dict[str, float]
    cpu_mhz: Optional[float]
    gpu_mhz: Optional[float]
    load: Optional[float]

    def to_dict(self) -> Dict[str, Any]:
        """As plain data, for the report."""
        return asdict(self)


def collect(root: Path = Path("/"), run: Runner = run_command, device: int = 0) -> Facts:
    """Asks the system for ``Facts``.

    Args:
        root: of the file system (tests use another).
        run: runs a command.
        device: CUDA device that is used, if any.
    """
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    board = _read(root / "proc/device-tree/model")
    board = board.strip("\0\n ") if board else None
    release = parse_release(_read(root / "etc/nv_tegra_release") or "")
    memory = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    gpu = gpu_facts(run, device=device)
    return Facts(
        cpu=_cpu_name(cpuinfo, board),
        cores=processors(),
        ram_mb=int(memory.group(1)) // 1024 if memory else None,
        board=board,
        virtual_machine="hypervisor" in flags.group(1).split() if flags else None,
        gpu=gpu.get("name"),
        compute_capability=gpu.get("compute_capability"),
        driver=gpu.get("driver"),
        os=_os_name(_read(root / "etc/os-release") or ""),
        kernel=platform.release(),
        l4t=release,
        jetpack=_jetpack(run, release),
        power_mode=_power_mode(root, run),
        clocks_locked=_clocks_locked(run) if release else None,
        asymtrack_edge=asymtrack_edge.__version__,
        python=platform.python_version(),
        versions={name: v for name in _PACKAGES for v in [package_version(name)] if v},
    )


def conditions(root: Path = Path("/"), run: Runner = run_command, gpu: Optional[str] = None) -> Conditions:
    """Asks the system for ``Conditions``; takes a few milliseconds.

    Args:
        root: of the file system.
        run: runs a command.
        gpu: PCI address of the graphics card; None for the first.
    """
    temperatures = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        kind, value = _read(zone / "type"), _read(zone / "temp")
        if kind and value and re.fullmatch(r"\s*-?\d+\s*", value) and int(value) > -256000:
            temperatures[kind.strip()] = int(value) / 1000
    for hwmon in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        # CPUs of PCs report here rather than as thermal zones.
        name = (_read(hwmon / "name") or "").strip()
        value = _read(hwmon / "temp1_input")
        if name in ("coretemp", "k10temp", "zenpower") and value and value.strip().isdigit():
            temperatures.setdefault(name, int(value) / 1000)
    scaling = [
        int(text)
        for path in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        for text in [(_read(path) or "").strip()]
        if text.isdigit()
    ]
    mhz: Optional[float] = sum(scaling) / len(scaling) / 1000 if scaling else None
    if mhz is None:
        listed = [float(v) for v in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(root / "proc/cpuinfo") or "", re.M)]
        mhz = sum(listed) / len(listed) if listed else None
    loads = (_read(root / "proc/loadavg") or "").split()
    gpu_mhz = None
    for pattern in ("sys/class/devfreq/*.gpu/cur_freq", "sys/class/devfreq/*.g[pv]*/cur_freq"):
        for path in sorted(root.glob(pattern)):
            text = (_read(path) or "").strip()
            gpu_mhz = int(text) / 1e6 if text.isdigit() else gpu_mhz
    match = re.match(r"\s*(\d+)\s*,\s*(\d+)", ask_nvidia_smi("temperature.gpu,clocks.sm", gpu, run) or "")
    if match:
        temperatures["GPU"] = float(match.group(1))
        gpu_mhz = float(match.group(2))
    return Conditions(temperatures, mhz, gpu_mhz, float(loads[0]) if loads else None)


def probe(device: int = 0) -> Callable[[], Conditions]:
    """A function that reads the conditions of this machine and of one of its CUDA devices."""
    return partial(conditions, gpu=gpu_facts(device=device).get("pci"))


def ask_nvidia_smi(fields: str, gpu: Optional[str] = None, run: Runner = run_command) -> Optional[str]:
    """What nvidia-smi knows of a graphics card, as one line of comma-separated values; None without it.

    Args:
        fields: as ``--query-gpu`` takes them.
        gpu: PCI address, because CUDA numbers the cards in another order; None for the first.
        run: runs a command.
    """
    which = ["-i", gpu] if gpu else []
    return run(["nvidia-smi", *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"])


def gpu_facts(run: Runner = run_command, library: Any = None, device: int = 0) -> Dict[str, str]:
    """Name, compute capability, driver and PCI address of a CUDA device; empty if there is none.

    Asks the CUDA driver itself, which exists on PCs and Jetsons alike.

    Args:
        run: for ``nvidia-smi``, which knows the driver's version.
        library: stands in for libcuda in tests.
        device: CUDA's number of it.
    """
    if library is None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return {}
    count = ctypes.c_int()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or count.value <= device:
        return {}
    handle = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if library.cuDeviceGet(ctypes.byref(handle), device) or library.cuDeviceGetName(name, 256, handle):
        return {}
    facts = {"name": name.value.decode("utf-8", "replace")}
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR (cuda.h).
    numbers: List[int] = []
    for attribute in (75, 76):
        value = ctypes.c_int()
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) == 0:
            numbers.append(value.value)
    if len(numbers) == 2:
        facts["compute_capability"] = f"{numbers[0]}.{numbers[1]}"
    address = ctypes.create_string_buffer(32)
    if library.cuDeviceGetPCIBusId(address, 32, handle) == 0:
        facts["pci"] = address.value.decode("ascii", "replace")
    driver = ask_nvidia_smi("driver_version", facts.get("pci"), run)
    if driver and driver.strip():
        facts["driver"] = driver.split()[0]
    return facts


def package_version(name: str) -> Optional[str]:
    """Version of an installed package, without importing it; None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpu_name(cpuinfo: str, board: Optional[str]) -> Optional[str]:
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if match:
        return match.group(1).strip()
    return f"{platform.machine()} of {board}" if board else platform.machine() or None


def _os_name(text: str) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', text, re.MULTILINE)
    return match.group(1) if match else platform.system()


def _jetpack(run: Runner, l4t: Optional[str]) -> Optional[str]:
    if l4t is None:
        return None
    package = run(["dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack"])
    return package.strip() if package and package.strip() else jetpack_of(l4t)


def _power_mode(root: Path, run: Runner) -> Optional[str]:
    mode = parse_nvpmodel(run(["nvpmodel", "-q"]) or "")
    if mode:
        return f"nvpmodel {mode[0]}" + ("" if mode[1] is None else f" ({mode[1]})")
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return f"governor {governor.strip()}" if governor else None


def _clocks_locked(run: Runner) -> Optional[bool]:
    # Reading the clocks needs root on some releases; without it the answer is "not known".
    clocks = parse_jetson_clocks(run(["jetson_clocks", "--show"]) or "")
    return clocks.locked if clocks else None
