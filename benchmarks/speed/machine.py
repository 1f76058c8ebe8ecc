"""The machine that a figure was measured on: hardware, system, versions, power mode, clocks, temperatures, memory.

Everything is read from the running system; what it does not report is None. psutil, py-cpuinfo and
nvidia-ml-py (extra ``bench``) are used if they are installed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from contextlib import suppress
from functools import lru_cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import asymtrack_edge
from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.files import system_text
from asymtrack_edge.runtime.backends.cuda.driver import find_gpu, load_driver
from asymtrack_edge.runtime.backends.threads import processors

_PACKAGES = ("numpy", "opencv-python", "opencv-contrib-python", "opencv-python-headless", "onnxruntime",
             "onnxruntime-gpu", "openvino", "onnx", "torch", "tensorrt", "tensorrt-rtx", "pycuda")  # fmt: skip


def package(name: str) -> Any:
    """An optional module; None if it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def output_of(*command: str) -> str:
    """What a command prints; empty if it is missing, fails or takes longer than ten seconds."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, timeout=10, check=True).stdout.decode("utf-8", "replace")
    return ""


@lru_cache(maxsize=None)
def facts(gpu: int = 0) -> Dict[str, Any]:
    """Facts that do not change during a run; None for what is unknown or absent.

    ``board`` names an embedded device, ``cores`` counts those that this process may use, ``power_mode`` is nvpmodel's
    (on a PC the frequency governor), ``versions`` has the versions of the relevant packages.
    """
    cpuinfo, nvml = package("cpuinfo"), _nvml(gpu)
    cpu = cpuinfo.get_cpu_info() if cpuinfo else {}
    pretty = re.search(r'^PRETTY_NAME="?([^"\n]+)', system_text(Path("/etc/os-release")), re.MULTILINE)
    l4t = system_text(Path("/etc/nv_tegra_release")).partition(", GCID")[0].lstrip("# ") or None
    # Name and number. To a user other than root, nvpmodel then prints its errors, too.
    mode = " ".join(output_of("nvpmodel", "-q").partition("NV Power Mode:")[2].split()[:2])
    governor = system_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    found: Dict[str, Any] = {
        "cpu": cpu.get("brand_raw") or platform.machine() or None,
        "cores": processors(),
        # Docker hides the device tree.
        "board": system_text(Path("/proc/device-tree/model")) or ("Jetson" if l4t else None),
        "virtual_machine": "hypervisor" in cpu.get("flags", ()) if "X86" in cpu.get("arch", "") else None,
        "gpu": None,
        "compute_capability": None,
        "driver": str(nvml[0].nvmlSystemGetDriverVersion()) if nvml else None,
        "os": pretty.group(1) if pretty else platform.system(),
        "l4t": l4t,
        "power_mode": mode or (f"governor {governor}" if governor else None),
        "asymtrack_edge": asymtrack_edge.__version__,
        "python": platform.python_version(),
        "versions": {},
    }
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found["versions"][name] = metadata.version(name)
    with suppress(AsymTrackError):
        card = find_gpu(gpu)
        found.update(gpu=card.name, compute_capability="{}.{}".format(*card.compute_capability))
    return found


def title(machine: Dict[str, Any]) -> str:
    """A short description of a machine from its ``facts``."""
    parts = [machine["board"]] if machine["board"] else [machine["cpu"] or "unknown", f"{machine['cores']} cores"]
    parts += [machine[key] for key in ("gpu", "power_mode") if machine[key]]
    return ", ".join([*parts, *(["virtual machine"] if machine["virtual_machine"] else [])])


def conditions(gpu: int = 0, root: Path = Path("/sys/class")) -> Dict[str, Any]:
    """Values that change during a run: degrees Celsius by sensor, clocks, and the load over the last minute."""
    psutil, nvml = package("psutil"), _nvml(gpu)
    temperatures: Dict[str, float] = {}
    mhz = gpu_mhz = None
    if psutil:
        for name, sensors in psutil.sensors_temperatures().items():
            temperatures.update({s.label or name: s.current for s in sensors})
        with suppress(NotImplementedError):  # before psutil 6, if a core is switched off; its clock is 0
            clocks = [clock.current for clock in psutil.cpu_freq(percpu=True) if clock.current]
            mhz = sum(clocks) / len(clocks) if clocks else None
    for zone in root.glob("thermal/thermal_zone*"):  # psutil leaves them out if it finds another sensor, as on a Jetson
        with suppress(ValueError):  # not readable
            temperatures[system_text(zone / "type")] = int(system_text(zone / "temp")) / 1000
    for path in root.glob("devfreq/*/cur_freq"):  # Jetson: 17000000.gpu; JetPack 5: .gv11b or .ga10b
        if re.search("gpu|gv11b|ga10b", path.parent.name):
            with suppress(ValueError):  # not readable
                gpu_mhz = int(system_text(path)) / 1e6
    if nvml:
        with suppress(nvml[0].NVMLError):
            temperatures["GPU"] = float(nvml[0].nvmlDeviceGetTemperature(nvml[1], 0))
            gpu_mhz = float(nvml[0].nvmlDeviceGetClockInfo(nvml[1], nvml[0].NVML_CLOCK_SM))
    # On a Jetson, a sensor that is switched off reports -256, and the PMIC always 50 or 100.
    temperatures = {name: value for name, value in temperatures.items() if value > -200 and "PMIC" not in name}
    return {"temperatures": temperatures, "cpu_mhz": mhz, "gpu_mhz": gpu_mhz, "load": os.getloadavg()[0]}


@lru_cache(maxsize=None)
def _nvml(gpu: int) -> Optional[Tuple[Any, Any]]:
    """nvidia-ml-py, and its handle of the card that CUDA numbers ``gpu``; None if either is missing.

    CUDA and NVML number the cards in different orders, so the card is found by its PCI address.
    """
    module = package("pynvml")
    if module is None:
        return None
    try:
        driver, number, address = load_driver(), ctypes.c_int(), ctypes.create_string_buffer(32)
        if driver.cuDeviceGet(ctypes.byref(number), gpu) or driver.cuDeviceGetPCIBusId(address, 32, number):
            return None
        module.nvmlInit()
        return module, module.nvmlDeviceGetHandleByPciBusId(address.value)
    except (AsymTrackError, module.NVMLError):
        return None


def gpu_milliwatts(gpu: int) -> Dict[str, float]:
    """The present power of the whole graphics card; empty if it is not reported."""
    if nvml := _nvml(gpu):
        with suppress(nvml[0].NVMLError):
            return {"GPU board (NVML)": float(nvml[0].nvmlDeviceGetPowerUsage(nvml[1]))}
    return {}


def process_memory(gpu: int = 0) -> Dict[str, float]:
    """Memory of this process in MB (10^6 bytes): its peak, and its use of GPU memory, if known."""
    found, nvml = {}, _nvml(gpu)
    if peak := re.search(r"^VmHWM:\s+(\d+) kB", system_text(Path("/proc/self/status")), re.MULTILINE):
        found["peak RSS (MB)"] = int(peak.group(1)) * 1024 / 1e6
    if nvml:
        with suppress(Exception):  # for a driver older than 510, nvidia-ml-py raises one that is no NVMLError
            for process in nvml[0].nvmlDeviceGetComputeRunningProcesses(nvml[1]):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    found["GPU (MB)"] = process.usedGpuMemory / 1e6
    return found
