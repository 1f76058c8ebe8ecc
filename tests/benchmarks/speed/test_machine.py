"""Facts about a machine and its power sensors, from made-up files, text and libraries."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List

import pytest

from asymtrack_edge.benchmarks.speed import energy, machine
from asymtrack_edge.errors import BackendError, UsageError


def write(root: Path, files: Dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was found out about a machine is kept while a program runs."""
    yield
    machine.facts.cache_clear()
    machine._nvml.cache_clear()


def test_what_jetsons_tools_print() -> None:
    release = "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n"
    assert machine.l4t_release(release) == "35.4.1" and machine.l4t_release("Ubuntu") is None
    assert machine.nvpmodel("NV Fan Mode:quiet\nNV Power Mode: MAXN\n0\n") == "nvpmodel MAXN (0)"
    assert machine.nvpmodel("NV Power Mode: MODE_30W\n2\n") == "nvpmodel MODE_30W (2)"
    assert machine.nvpmodel("error: not found") is None


def test_clocks_are_locked_where_the_lowest_is_the_highest(tmp_path: Path) -> None:
    assert machine.clocks_locked(tmp_path) is None
    cpu, gpu = "devices/system/cpu/cpu0/cpufreq/scaling_", "class/devfreq/17000000.gpu/"
    write(tmp_path, {cpu + "min_freq": "2265600\n", cpu + "max_freq": "2265600\n"})
    write(tmp_path, {gpu + "min_freq": "1377000000", gpu + "max_freq": "1377000000"})
    assert machine.clocks_locked(tmp_path) is True
    write(tmp_path, {gpu + "min_freq": "114750000"})
    assert machine.clocks_locked(tmp_path) is False


def test_this_machine() -> None:
    seen, now = machine.facts(), machine.conditions()
    assert seen["cores"] >= 1 and seen["versions"]["numpy"] and seen["python"] == sys.version.split()[0]
    assert machine.title(seen).startswith(seen["board"] or seen["cpu"])
    assert now["load"] >= 0 and isinstance(now["temperatures"], dict)
    own = machine.process_memory()
    assert 10 < own["RSS (MB)"] <= own["peak RSS (MB)"] * 1.01


def test_nothing_is_invented_without_the_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psutil", "cpuinfo", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)
    seen, now = machine.facts(), machine.conditions()
    assert seen["ram_mb"] is seen["virtual_machine"] is seen["driver"] is now["cpu_mhz"] is None
    assert now["temperatures"] == {}
    lines = machine.missing()
    assert any("psutil is not installed" in x and "asymtrack-edge[bench]" in x for x in lines)
    assert any("py-cpuinfo" in x for x in lines)


def test_commands_that_are_not_there_print_nothing() -> None:
    assert machine.output_of(["no-such-command-anywhere"]) == machine.output_of(["false"]) == ""
    assert machine.output_of(["echo", "yes"]) == "yes\n"


class FakeDriver:
    """As much of libcuda as is asked: the PCI addresses run against CUDA's order."""

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetPCIBusId(self, address: Any, size: int, device: Any) -> int:
        ctypes.memmove(address, b"0000:%02d:00.0\0" % (10 - device.value), 13)
        return 0


def test_the_graphics_card_that_is_used_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: List[Any] = []
    running = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=512 * 10**6), SimpleNamespace(pid=1, usedGpuMemory=1)]
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda address: asked.append(address) or "card",
        nvmlSystemGetDriverVersion=lambda: "535.104.05",
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
        nvmlDeviceGetClockInfo=lambda handle, clock: 1545,
        nvmlDeviceGetPowerUsage=lambda handle: 70500,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: running,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)  # type: ignore[arg-type]
    monkeypatch.setattr(machine, "load_driver", FakeDriver)
    now = machine.conditions(1)
    assert asked == [b"0000:09:00.0"]
    assert now["temperatures"]["GPU"] == 61 and now["gpu_mhz"] == 1545
    assert machine.gpu_milliwatts(1) == {"GPU board (NVML)": 70500}
    assert machine.process_memory(1)["GPU (MB)"] == 512
    assert machine.facts(1)["driver"] == "535.104.05"


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    # AGX Orin on JetPack 5: two monitors; what is not connected is left out, sums are no rails.
    files = {
        "hwmon3/name": "ina3221\n", "hwmon3/in1_label": "VDD_GPU_SOC\n", "hwmon3/in1_input": "19000\n",
        "hwmon3/curr1_input": "274\n", "hwmon3/in2_label": "NC\n", "hwmon3/in2_input": "0\n",
        "hwmon3/in7_label": "sum of shunt voltages\n", "hwmon4/name": "ina3221\n", "hwmon4/in3_label": "VIN_SYS_5V0\n",
        "hwmon4/in3_input": "5000\n", "hwmon4/curr3_input": "607\n", "hwmon0/name": "nvme\n",
        "hwmon0/in1_label": "other\n",
    }  # fmt: skip
    assert energy.Ina3221(write(tmp_path, files)).read() == {"VDD_GPU_SOC": 5206, "VIN_SYS_5V0": 3035}
    assert not energy.Ina3221(tmp_path / "none").rails


def test_rapl_counters(tmp_path: Path) -> None:
    write(tmp_path, {"intel-rapl:0/name": "package-0\n", "intel-rapl:0/energy_uj": "1000000\n"})
    times = iter([0.0, 2.0, 3.0])
    counters = energy.Rapl(tmp_path, lambda: next(times))
    assert counters.files and counters.read() == {}
    (tmp_path / "intel-rapl:0/energy_uj").write_text("9000000\n")
    assert counters.read() == {"package-0 (RAPL)": pytest.approx(4000)}
    (tmp_path / "intel-rapl:0/energy_uj").write_text("5\n")  # the counter has wrapped
    assert counters.read() == {}
    assert not energy.Rapl(tmp_path / "none").files


def test_processor_and_graphics_card_are_metered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([{}, {"package-0 (RAPL)": 9000.0}, {"package-0 (RAPL)": 9000.0}])
    counters = SimpleNamespace(files=["x"], read=lambda: next(readings, {}))
    monkeypatch.setattr(energy, "Rapl", lambda: counters)
    monkeypatch.setattr(energy, "gpu_milliwatts", lambda gpu: {"GPU board (NVML)": 70500.0})
    sensors = energy.find_sensors(1)
    assert list(sensors)[-2:] == ["RAPL", "NVML"]
    seen = energy.measure(lambda: None, energy.sampling(sensors, 0.05), 0.4, 20.0, 0.25)
    assert seen["GPU board (NVML) (W)"] == pytest.approx(70.5)


def test_joules_by_the_trapezium_rule() -> None:
    samples = [(0.0, {"A": 1000.0}), (1.0, {"A": 2000.0}), (2.0, {"A": 4000.0}), (3.0, {"A": 9000.0})]
    # 1 to 2 s: mean of 2 and 4 W; the half second before takes its nearest sample.
    assert energy.joules(samples, 0.5, 2.0) == {"A": pytest.approx(0.5 * 2 + 3)}
    with pytest.raises(BackendError, match="fewer than two"):
        energy.joules(samples, 2.5, 3.5)


class FakeMeter:
    """2 W while idle, 6 W while tracking, sampled every 0.1 s of an obedient clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy = False
        self.samples: List[energy.Sample] = []

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.samples.append((self.now, {"VDD": 6000.0 if self.busy else 2000.0}))
            self.now = min(end, self.now + 0.1)

    def step(self) -> None:
        self.busy = True
        self.wait(0.02)
        self.busy = False

    def __enter__(self) -> List[energy.Sample]:
        self.samples.clear()
        return self.samples

    def __exit__(self, *_: Any) -> None:
        pass


def test_energy_flat_out_and_paced() -> None:
    meter = FakeMeter()

    def measure(seconds: float, paced: Any) -> Dict[str, float]:
        return energy.measure(meter.step, meter, seconds, paced, 2.0, lambda: meter.now, meter.wait)

    seen = measure(4.0, None)
    assert seen["fps"] == pytest.approx(50, rel=0.02)
    # The sample at the very end of the idle time is a busy one.
    assert seen["VDD idle (W)"] == pytest.approx(2, rel=0.06)
    assert seen["VDD (J/frame)"] == pytest.approx(6 * 0.02, rel=0.02)
    assert seen["VDD above idle (J/frame)"] == pytest.approx(4 * 0.02, rel=0.06)
    paced = measure(4.0, 10.0)
    assert paced["fps"] == pytest.approx(10) and paced["late frames (%)"] == 0
    assert paced["VDD (J/frame)"] > seen["VDD (J/frame)"]
    assert measure(1.0, 100.0)["late frames (%)"] == 100
    with pytest.raises(UsageError):
        measure(0.0, None)
