"""Facts about a machine and its power sensors, from made-up files, text and libraries."""

from __future__ import annotations

import sys
from functools import lru_cache
from time import sleep
from unittest.mock import MagicMock

import pytest

from asymtrack_edge.benchmarks.speed import energy, machine
from tests.datasets.miniature import write_tree


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test has its own cache of facts about the machine."""
    for name in ("facts", "_nvml"):
        monkeypatch.setattr(machine, name, lru_cache(getattr(machine, name).__wrapped__))


def test_facts_of_a_jetson(monkeypatch):
    monkeypatch.setitem(sys.modules, "cpuinfo", MagicMock(get_cpu_info=lambda: {"arch": "ARM_8", "flags": ["fp"]}))
    release = "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64"
    monkeypatch.setattr(machine, "system_text", lambda path: release if path.name == "nv_tegra_release" else "")
    monkeypatch.setattr(machine, "output_of", lambda *_: "NV Fan Mode:quiet\nNV Power Mode: MODE_30W\n2\nNVPM ERROR\n")
    seen = machine.facts()
    assert (seen["l4t"], seen["power_mode"], seen["board"]) == ("R35 (release), REVISION: 4.1", "MODE_30W 2", "Jetson")
    assert seen["virtual_machine"] is None  # only x86 has a flag for it


def test_conditions_of_an_agx_xavier_with_some_cores_off(monkeypatch, tmp_path):
    for n, zone in enumerate([("CPU-therm", "37500"), ("PMIC-Die", "50000"), ("CV0-therm", "")]):
        write_tree(tmp_path / f"thermal/thermal_zone{n}", dict(zip(("type", "temp"), zone)))
    clocks = [[MagicMock(current=mhz) for mhz in (2188.0, 2188.0, 0.0)], NotImplementedError]  # psutil 7, psutil 5.9
    monkeypatch.setitem(sys.modules, "psutil", MagicMock(**{"cpu_freq.side_effect": clocks}))
    seen = machine.conditions(0, write_tree(tmp_path, {"devfreq/17000000.gv11b/cur_freq": "114750000\n"}))
    assert seen["temperatures"] == {"CPU-therm": 37.5}
    assert (seen["cpu_mhz"], seen["gpu_mhz"], machine.conditions()["cpu_mhz"]) == (2188, 114.75, None)


def test_this_machine_with_and_without_the_optional_packages(monkeypatch):
    seen, now = machine.facts(), machine.conditions()
    assert seen["cores"] >= 1 and seen["versions"]["numpy"] and seen["python"] == sys.version.split()[0]
    assert machine.title(seen).startswith(seen["board"] or seen["cpu"])
    assert now["load"] >= 0 and machine.process_memory()["peak RSS (MB)"] > 10
    machine.facts.cache_clear()
    for name in ("psutil", "cpuinfo", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)
    seen, now = machine.facts(), machine.conditions()
    assert seen["virtual_machine"] is seen["driver"] is now["cpu_mhz"] is None
    monkeypatch.setattr(machine, "_nvml", lambda gpu: (type("NVML", (), {"NVMLError": OSError}), 0))  # lacks functions
    assert list(machine.process_memory()) == ["peak RSS (MB)"]
    assert machine.output_of("no-such-command-anywhere") == machine.output_of("false") == ""


def test_rails_of_a_jetson(tmp_path):
    # AGX Orin on JetPack 5: two monitors; unconnected channels (NC) and sums are not rails.
    files = {
        "hwmon3/name": "ina3221\n", "hwmon3/in1_label": "VDD_GPU_SOC\n", "hwmon3/in1_input": "19000\n",
        "hwmon3/curr1_input": "274\n", "hwmon3/in2_label": "NC\n", "hwmon3/in2_input": "0\n",
        "hwmon3/in7_label": "sum of shunt voltages\n", "hwmon4/name": "ina3221\n", "hwmon4/in3_label": "VIN_SYS_5V0\n",
        "hwmon4/in3_input": "5000\n", "hwmon4/curr3_input": "607\n", "hwmon0/name": "nvme\n",
        "hwmon0/in1_label": "other\n",
    }  # fmt: skip
    assert energy.ina3221(write_tree(tmp_path, files))() == {"VDD_GPU_SOC": 5206, "VIN_SYS_5V0": 3035}
    assert energy.ina3221(tmp_path / "none") is None


def test_rapl_counters(tmp_path):
    write_tree(tmp_path, {"intel-rapl:0/name": "package-0\n", "intel-rapl:0/energy_uj": "1000000\n"})
    both = {f"intel-rapl:{n}/{end}": "0" for n in ("0:0", "1", "1:0") for end in ("energy_uj", "name")}
    write_tree(tmp_path / "two", {**both, "intel-rapl:0/name": "a", "intel-rapl:1/name": "b"})
    several = energy.rapl(tmp_path / "two", iter([0.0] * 3 + [1.0] * 3).__next__)
    assert several() == {} and set(several()) == {"a 0 (RAPL)", "b (RAPL)", "b 0 (RAPL)"}
    counters = energy.rapl(tmp_path, iter([0.0, 1.0, 2.0, 3.0]).__next__)
    for text, power in (("1000000\n", {}), ("", {}), ("9000000\n", {"package-0 (RAPL)": 4000}), ("5\n", {})):
        (tmp_path / "intel-rapl:0/energy_uj").write_text(text)  # the second reading fails, the counter wraps at last
        assert counters() == power
    assert energy.rapl(tmp_path / "none") is None


@pytest.mark.parametrize(("paced", "late"), [(None, None), (5.0, 0), (1000.0, 100)])
def test_energy_per_frame_in_total_and_above_idle(monkeypatch, paced, late):
    """2 W until the second frame, 6 W from then on; and a counter whose first reading is of the time before."""
    monkeypatch.setattr(energy, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    frames = []
    counter = iter([{"package": 99000.0}])
    sensors = {
        "monitor": lambda: {"VDD": 6000.0 if len(frames) > 1 else 2000.0},
        "counter": lambda: next(counter, {"package": 9000.0}),
    }
    seen = energy.measure(lambda: frames.append(sleep(0.02)), sensors, 0.6, paced)
    assert seen["fps"] == pytest.approx(paced if late == 0 else 50, rel=0.5)
    assert seen["VDD idle (W)"] == pytest.approx(2, rel=0.2) and seen["VDD (W)"] == pytest.approx(6, rel=0.2)
    assert seen["VDD (J/frame)"] == pytest.approx(seen["VDD (W)"] / seen["fps"])
    assert seen["VDD above idle (J/frame)"] == pytest.approx(4 / seen["fps"], rel=0.3)
    assert seen["package (W)"] == seen["package idle (W)"] == pytest.approx(9) and seen.get("late frames (%)") == late
