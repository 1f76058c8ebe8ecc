"""``asymtrack-check`` compares a backend with ONNX Runtime on the CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asymtrack_edge.runtime.commands import check
from asymtrack_edge.runtime.commands.check import limits_of, main
from asymtrack_edge.runtime.comparison import HALF_ARITHMETIC, LIMITS, OTHER_CROPS, within
from asymtrack_edge.runtime.sources.clip import default_clip
from tests.datasets.miniature import write_images
from tests.runtime.simulated import as_argument


def test_agreement_is_printed_for_any_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    assert main(["T", "--backend", "onnxruntime"]) == 2 and "with itself" in capsys.readouterr().err
    assert main(["T", "--backend", "openvino", "--threads", "1"]) == 0
    line = capsys.readouterr().out
    assert "agrees with onnxruntime CPU over 36 frames" in line and "track IoU 1.000 (limit 0.99)" in line
    frames, box = default_clip(5)
    write_images(tmp_path, frames)
    assert main(["T", "--backend", "openvino", "--clip", str(tmp_path), "--box", as_argument(box), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["frames"] == 5 and report["precision"] == "fp32"
    assert report["box_difference"] <= report["limits"]["box_difference"] == LIMITS["fp32"].box_difference
    assert not within({**report, "track_iou_mean": 0.5}, LIMITS["fp32"])


@pytest.mark.parametrize(
    ("first", "column", "by", "words"),
    [
        (0, 0, 0.001, "boxes differ by 0.001"),
        (0, 3, 0.001, "boxes differ by 0.001"),
        (0, 4, 0.01, "scores differ by 0.01"),
        (0, 2, np.nan, "inf"),
        (1, 0, 0.001, "several targets at once differ by 0.001"),
    ],
)
def test_a_difference_is_an_error(first: int, column: int, by: Any, words: str, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("openvino")
    from asymtrack_edge.runtime.backends.openvino import OpenVinoBackend

    real = OpenVinoBackend._run_searches

    def off(self: Any, count: int) -> None:
        real(self, count)
        self._predictions[first:count, column] += by

    monkeypatch.setattr(OpenVinoBackend, "_run_searches", off)
    monkeypatch.setattr(check, "default_clip", partial(default_clip, 6))
    assert main(["T", "--backend", "openvino", "--threads", "1", "--json"]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and "does not compute the same as the model" in printed.err
    assert words in printed.err
    assert not json.loads(printed.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["passed"]


@pytest.mark.parametrize(
    ("name", "precision", "processor", "limits"),
    [
        ("tensorrt", "fp16", "x86_64", HALF_ARITHMETIC),
        ("onnxruntime-cuda", "fp32", "x86_64", LIMITS["fp32"]),
        ("onnxruntime-tensorrt", "fp32", "x86_64", HALF_ARITHMETIC),  # it computes in TF32
        ("onnxruntime-tensorrt", "int8", "x86_64", LIMITS["int8"]),
        ("tensorrt", "fp32", "aarch64", OTHER_CROPS),  # on arm64, OpenCV's crops differ from the kernel's
        ("openvino", "fp32", "aarch64", LIMITS["fp32"]),  # both crop with the same OpenCV
        ("openvino", "fp16", "aarch64", LIMITS["fp16"]),
        ("openvino", "bf16", "x86_64", HALF_ARITHMETIC),
    ],
)
def test_limits_follow_the_arithmetic(name: str, precision: str, processor: str, limits: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("platform.machine", lambda: processor)
    assert limits_of(SimpleNamespace(name=name, on_cpu=name == "openvino", precision=precision)) == limits
