"""Facts about a device, from a made-up file system and made-up commands; memory and energy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence

import pytest

from asymtrack_edge.benchmarks.speed import energy, facts, memory
from asymtrack_edge.errors import BackendError, UsageError
from tests.benchmarks.speed import recorded


def commands(answers: Dict[str, str]) -> facts.Runner:
    def run(command: Sequence[str]) -> Optional[str]:
        return answers.get(" ".join(command[:2]), answers.get(command[0]))

    return run


def write(root: Path, files: Dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_jetson(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x4e\n",
            "proc/meminfo": "MemTotal:       31734604 kB\n",
            "proc/device-tree/model": "Jetson-AGX Xavier\0",
            "etc/nv_tegra_release": recorded.RELEASE_XAVIER,
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 20.04.6 LTS"\n',
        },
    )
    run = commands({"nvpmodel": recorded.NVPMODEL_XAVIER, "jetson_clocks": recorded.CLOCKS_XAVIER})
    seen = facts.collect(root, run)
    assert (seen.l4t, seen.jetpack) == ("35.4.1", "5.1.2")
    assert seen.power_mode == "nvpmodel MAXN (0)" and seen.clocks_locked is True
    assert seen.board == "Jetson-AGX Xavier" and "Jetson-AGX Xavier" in (seen.cpu or "")
    assert seen.os == "Ubuntu 20.04.6 LTS" and seen.ram_mb == 30990
    assert "Jetson-AGX Xavier" in seen.title and "MAXN" in seen.title


def test_the_installed_jetpack_package_wins_over_the_table(tmp_path: Path) -> None:
    root = write(tmp_path, {"etc/nv_tegra_release": recorded.RELEASE_ORIN})
    assert facts.collect(root, commands({"dpkg-query": "6.2.1+b38"})).jetpack == "6.2.1+b38"
    assert facts.collect(root, commands({})).jetpack == "6.1 or newer"


def test_a_pc(tmp_path: Path) -> None:
    cpuinfo = "model name\t: Some CPU @ 3.60GHz\ncpu MHz\t: 3600.0\nflags\t: fpu hypervisor sse\ncpu MHz\t: 3400.0\n"
    root = write(
        tmp_path,
        {
            "proc/cpuinfo": cpuinfo,
            "proc/loadavg": "1.25 0.50 0.10 2/345 6789\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
            "sys/class/thermal/thermal_zone0/temp": "54000\n",
            "sys/class/hwmon/hwmon0/name": "k10temp\n",
            "sys/class/hwmon/hwmon0/temp1_input": "61250\n",
        },
    )
    seen = facts.collect(root, commands({}))
    assert seen.cpu == "Some CPU @ 3.60GHz" and seen.virtual_machine is True
    assert seen.power_mode == "governor powersave"
    assert (seen.board, seen.l4t, seen.jetpack, seen.clocks_locked) == (None, None, None, None)
    now = facts.conditions(root, commands({"nvidia-smi": "65, 1545\n"}))
    assert now.temperatures == {"x86_pkg_temp": 54.0, "k10temp": 61.25, "GPU": 65.0}
    assert now.cpu_mhz == 3500 and now.gpu_mhz == 1545 and now.load == 1.25


def test_nothing_is_invented_where_nothing_is_reported(tmp_path: Path) -> None:
    now = facts.conditions(tmp_path, commands({}))
    assert (now.temperatures, now.cpu_mhz, now.gpu_mhz, now.load) == ({}, None, None, None)
    seen = facts.collect(tmp_path, commands({}))
    assert (seen.l4t, seen.power_mode, seen.ram_mb, seen.virtual_machine) == (None, None, None, None)


class FakeCuda:
    """As much of libcuda as is asked."""

    def __init__(self, devices: int) -> None:
        self.devices = devices

    def cuInit(self, flags: int) -> int:
        return 0 if self.devices else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetPCIBusId(self, address: Any, size: int, device: Any) -> int:
        ctypes.memmove(address, b"0000:%02d:00.0\0" % (10 - device.value), 13)
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        ctypes.memmove(name, b"Orin\0", 5)
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0


def test_gpu_facts_come_from_the_driver() -> None:
    asked: List[Any] = []

    def run(command: Any) -> str:
        asked.append(command)
        return "535.104.05\n"

    seen = facts.gpu_facts(run, FakeCuda(2), device=1)
    assert seen == {"name": "Orin", "compute_capability": "8.7", "driver": "535.104.05", "pci": "0000:09:00.0"}
    # nvidia-smi and CUDA number the cards differently: the address tells which one is meant.
    assert asked[0][:3] == ["nvidia-smi", "-i", "0000:09:00.0"]
    assert facts.gpu_facts(run, FakeCuda(0)) == facts.gpu_facts(run, FakeCuda(1), device=1) == {}


def test_run_command_survives_what_is_not_there() -> None:
    assert facts.run_command(["no-such-command-anywhere"]) is None
    assert facts.run_command(["false"]) is None
    assert facts.run_command(["echo", "yes"]) == "yes\n"


def test_memory() -> None:
    assert memory.parse_status("VmHWM:\t  200000 kB\nVmRSS:\t  100000 kB\n") == {"peak_rss": 204.8, "rss": 102.4}
    own = memory.process_memory()
    assert 10 < own["rss"] <= own["peak_rss"] * 1.01
    assert memory.parse_compute_apps("123, 400\n77, 512\n", 77) == pytest.approx(536.870912)
    assert memory.parse_compute_apps("", 77) is None


def test_the_graphics_card_that_is_used_is_asked(tmp_path: Path) -> None:
    asked: List[Any] = []

    def run(command: Any) -> Any:
        asked.append(list(command))
        return "61, 1200\n" if command[0] == "nvidia-smi" else None

    assert facts.conditions(tmp_path, run, "0000:09:00.0").temperatures == {"GPU": 61}
    assert [c[1:3] for c in asked if c[0] == "nvidia-smi"] == [["-i", "0000:09:00.0"]]


def test_processor_and_graphics_card_are_metered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "run_command", lambda command: None)
    monkeypatch.setattr(energy, "ask_nvidia_smi", lambda fields, gpu: "70.5\n" if gpu == "0000:09:00.0" else None)
    readings = iter([{}, {"package-0 (RAPL)": 9000.0}, {"package-0 (RAPL)": 9000.0}])
    counters = SimpleNamespace(available=True, read=lambda: next(readings, {}))
    monkeypatch.setattr(energy, "RaplCounters", lambda: counters)
    meter = energy.find_meter("0000:09:00.0")
    assert meter.name == "RAPL, nvidia-smi"
    meter.start()
    sleep(0.35)
    samples = meter.stop()
    used = energy.joules(samples, samples[0][0], samples[2][0])
    assert set(used) == {"GPU board (nvidia-smi)", "package-0 (RAPL)"}


def test_joules_by_the_trapezium_rule() -> None:
    samples = [(0.0, {"A": 1000.0}), (1.0, {"A": 2000.0}), (2.0, {"A": 4000.0}), (3.0, {"A": 9000.0})]
    # 1 to 2 s: mean of 2 and 4 W; the half second before takes its nearest sample.
    assert energy.joules(samples, 0.5, 2.0) == {"A": pytest.approx(0.5 * 2 + 3)}
    with pytest.raises(BackendError, match="fewer than two"):
        energy.joules(samples, 2.5, 3.5)


class FakeMeter(energy.PowerMeter):
    """2 W while idle, 6 W while tracking, sampled every 0.1 s of an obedient clock."""

    name = "fake"

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

    def start(self) -> None:
        self.samples.clear()

    def stop(self) -> List[energy.Sample]:
        return self.samples


def test_energy_flat_out_and_paced() -> None:
    meter = FakeMeter()
    seen = energy.measure(meter.step, meter, 4.0, None, 2.0, lambda: meter.now, meter.wait)
    assert seen.frames in (200, 201) and seen.late == 0
    # The sample at the very end of the idle time is a busy one.
    assert seen.idle_watts["VDD"] == pytest.approx(2, rel=0.06)
    assert seen.joules_per_frame["VDD"] == pytest.approx(6 * 0.02, rel=0.02)
    assert seen.joules_above_idle["VDD"] == pytest.approx(4 * 0.02, rel=0.06)
    paced = energy.measure(meter.step, meter, 4.0, 10.0, 2.0, lambda: meter.now, meter.wait)
    assert paced.frames == 40 and paced.late == 0
    assert paced.joules_per_frame["VDD"] > seen.joules_per_frame["VDD"]
    too_fast = energy.measure(meter.step, meter, 1.0, 100.0, 2.0, lambda: meter.now, meter.wait)
    assert too_fast.late == too_fast.frames
    assert set(energy.values(seen)) == {
        "VDD (J/frame)", "VDD above idle (J/frame)", "VDD (W)", "VDD idle (W)"
    }  # fmt: skip
    with pytest.raises(UsageError):
        energy.measure(meter.step, meter, 0.0)


def test_rapl_counters(tmp_path: Path) -> None:
    write(tmp_path, {"intel-rapl:0/name": "package-0\n", "intel-rapl:0/energy_uj": "1000000\n"})
    times = iter([0.0, 2.0, 3.0])
    counters = energy.RaplCounters(tmp_path, lambda: next(times))
    assert counters.available and counters.read() == {}
    (tmp_path / "intel-rapl:0/energy_uj").write_text("9000000\n")
    assert counters.read() == {"package-0 (RAPL)": pytest.approx(4000)}
    (tmp_path / "intel-rapl:0/energy_uj").write_text("5\n")  # the counter has wrapped
    assert counters.read() == {}
    assert not energy.RaplCounters(tmp_path / "none").available


def test_tegrastats_meter_reads_a_running_program(tmp_path: Path) -> None:
    script = tmp_path / "tegrastats"
    script.write_text(f"#!/bin/sh\nwhile :; do echo '{recorded.ORIN}'; sleep 0.02; done\n")
    script.chmod(0o755)
    meter = energy.TegrastatsMeter([str(script)])
    seen = energy.measure(lambda: None, meter, 0.4, 20.0, 0.4)
    assert seen.watts["VDD_GPU_SOC"] == pytest.approx(5.199)
    assert 6 <= seen.frames <= 9
    with pytest.raises(BackendError, match="cannot run"):
        energy.TegrastatsMeter([str(tmp_path / "none")]).start()


def test_polling_meter_samples_until_it_is_stopped() -> None:
    closed: List[bool] = []
    meter = energy.PollingMeter("x", lambda: {"A": 1.0}, 0.01, lambda: closed.append(True))
    seen = energy.measure(lambda: None, meter, 0.15, 50.0, 0.1)
    assert seen.watts["A"] == pytest.approx(0.001) and closed == [True]
