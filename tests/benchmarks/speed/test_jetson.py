"""Parsers of Jetson's tools on recorded layouts."""

from __future__ import annotations

import pytest

from asymtrack_edge.benchmarks.speed import jetson
from asymtrack_edge.benchmarks.speed.profile import by_operator, parse_trtexec_profile
from asymtrack_edge.benchmarks.speed.trtexec import parse_summary, run_trtexec
from asymtrack_edge.errors import BackendError, UsageError
from tests.benchmarks.speed import recorded


def test_tegrastats_of_agx_xavier() -> None:
    old, new = jetson.parse_tegrastats(recorded.XAVIER_4), jetson.parse_tegrastats(recorded.XAVIER_5)
    assert old is not None and new is not None
    rails = ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"]
    assert list(old.milliwatts) == rails and list(new.milliwatts) == rails
    assert old.milliwatts["GPU"] == 4310 and new.milliwatts["GPU"] == 9184
    assert old.cpu[0] == (3, 1190) and old.cpu[2] is None and len(old.cpu) == 8
    assert (old.gpu_load, old.gpu_mhz) == (45, (1377,))
    assert (new.gpu_load, new.gpu_mhz) == (97, (1377,))
    assert old.ram_mb == (2594, 31920)
    assert old.temperatures["GPU"] == 35.5 and old.temperatures["AO"] == 33


def test_tegrastats_of_orin() -> None:
    agx, nano = jetson.parse_tegrastats(recorded.ORIN), jetson.parse_tegrastats(recorded.ORIN_NANO)
    assert agx is not None and nano is not None
    # NC rails are not connected; sensors at -256 are off.
    assert agx.milliwatts == {"VDD_GPU_SOC": 5199, "VDD_CPU_CV": 799, "VIN_SYS_5V0": 3035, "VDDQ_VDD2_1V8AO": 403}
    assert "CV0" not in agx.temperatures and agx.temperatures["tj"] == 45.968
    assert agx.gpu_mhz == (1300, 1300)
    assert nano.milliwatts == {"VDD_IN": 4567, "VDD_CPU_GPU_CV": 1200, "VDD_SOC": 1400}
    assert nano.temperatures["gpu"] == 48.7


@pytest.mark.parametrize("line", ["", "tegrastats: permission denied", "RAM 12", recorded.NVPMODEL_ORIN])
def test_other_lines_are_no_readings(line: str) -> None:
    assert jetson.parse_tegrastats(line) is None


def test_power_mode() -> None:
    assert jetson.parse_nvpmodel(recorded.NVPMODEL_XAVIER) == ("MAXN", 0)
    assert jetson.parse_nvpmodel(recorded.NVPMODEL_ORIN) == ("MODE_30W", 2)
    assert jetson.parse_nvpmodel("error: not found") is None


def test_clocks() -> None:
    xavier, orin = jetson.parse_jetson_clocks(recorded.CLOCKS_XAVIER), jetson.parse_jetson_clocks(recorded.CLOCKS_ORIN)
    assert xavier is not None and orin is not None
    assert xavier.locked and not orin.locked
    assert xavier.units["GPU"] == (1377, 1377, 1377) and xavier.units["cpu0"][2] == pytest.approx(2265.6)
    assert orin.online_cpus == 1 and orin.units["EMC"] == (204, 3199, 2133)
    assert jetson.parse_jetson_clocks("Error: must be root") is None


def test_releases() -> None:
    assert jetson.parse_release(recorded.RELEASE_XAVIER) == "35.4.1"
    assert jetson.jetpack_of("35.4.1") == "5.1.2"
    assert jetson.jetpack_of(jetson.parse_release(recorded.RELEASE_ORIN)) == "6.1 or newer"
    assert jetson.jetpack_of("99.9") is None and jetson.jetpack_of(None) is None
    assert jetson.parse_release("Ubuntu") is None


def test_jtop() -> None:
    # A total that software adds up is left out; a rail that measures the module is kept.
    assert jetson.parse_jtop_power(recorded.JTOP_4_XAVIER) == {"GPU": 9184, "SYS5V": 2640}
    assert jetson.parse_jtop_power(recorded.JTOP_4_ORIN_NANO)["VDD_IN"] == 4567
    assert jetson.parse_jtop_power(recorded.JTOP_3) == {"CPU": 466, "GPU": 310}  # type: ignore[arg-type]


def test_trtexec_summary() -> None:
    seen = parse_summary(recorded.TRTEXEC)
    assert seen.throughput == 312.345
    assert seen.parts["Latency"].p99 == 3.6 and seen.parts["H2D Latency"].p90 is None
    assert seen.stages() == {"copy in": 0.055, "infer": 3.12, "copy out": 0.0041}
    with pytest.raises(BackendError, match="Engine could not be deserialized"):
        parse_summary("[E] Engine could not be deserialized\n&&&& FAILED")


def test_trtexec_is_told_shapes_of_free_axes(tmp_path) -> None:
    commands = []

    def run(command):
        commands.append(command)
        return recorded.TRTEXEC

    run_trtexec(tmp_path / "trtexec", tmp_path / "e", {"image": (4, 3, 256, 256), "keys": (4, 8, 64, 32)}, run)
    assert commands[0][-1] == "--shapes=image:4x3x256x256,keys:4x8x64x32"


def test_trtexec_profile() -> None:
    text = (
        '[{"count": 900}, {"name": "/stem/Conv", "timeMs": 90, "averageMs": 0.1, "medianMs": 0.09, "percentage": 40},'
        ' {"name": "{ForeignNode[a...b]}", "timeMs": 100, "averageMs": 0.2, "percentage": 60}]'
    )
    layers = parse_trtexec_profile(text)
    assert [layer.milliseconds for layer in layers] == [0.09, 0.2]
    assert by_operator(layers)[0] == ("fused (Myelin)", 1, 0.2)
    with pytest.raises(UsageError, match="exportProfile"):
        parse_trtexec_profile("{}[")
