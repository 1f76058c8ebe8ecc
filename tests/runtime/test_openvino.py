"""Tests of OpenVINO alone: precisions and versions. ``test_multi`` compares its tracks with the others'."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from asymtrack_edge.errors import AsymTrackError, BackendError, MissingDependencyError
from asymtrack_edge.geometry import crop_window
from asymtrack_edge.manifest import file_entry, load_manifest
from asymtrack_edge.runtime import open_backend
from asymtrack_edge.runtime.commands.track import main as track
from asymtrack_edge.runtime.comparison import HALF_ARITHMETIC, compare, within
from asymtrack_edge.runtime.sources.clip import default_clip
from tests.helpers import export_small, refusal

pytest.importorskip("openvino")
from asymtrack_edge.runtime.backends import openvino as backend

CLIP = default_clip(12)
CAPABILITIES = backend._import().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_exports_with_a_fixed_batch_agree(precision: str, tmp_path: Path) -> None:
    export_small(tmp_path, precision)
    reference, engine = (open_backend(tmp_path, name) for name in ("onnxruntime", "openvino"))
    report = compare(reference, engine, *CLIP)
    # ONNX Runtime rounds to fp16 between operators, OpenVINO need not; made-up weights amplify the difference.
    limit = 0.05 if precision == "fp16" else 1e-4
    assert report["box_difference"] < limit and report["score_difference"] < limit


@pytest.mark.skipif("BF16" not in CAPABILITIES, reason="this CPU has no bf16")
def test_bf16_is_close_and_reported() -> None:
    reference, whole = (open_backend("T", name) for name in ("onnxruntime", "openvino"))
    half = open_backend("T", "openvino", precision="bf16")
    assert (whole.precision, half.precision, half.name) == ("fp32", "bf16", "openvino")
    report = compare(reference, half, *CLIP)
    assert within(report, HALF_ARITHMETIC)
    assert report["box_difference"] > 1e-6, "it was not computed in bf16"
    # The template network runs only once per target, so it stays in fp32.
    for engine in (whole, half):
        engine.template(CLIP[0][0], crop_window(CLIP[1], 2.0))
    for name, values in whole.state.items():
        np.testing.assert_array_equal(half.state[name], values)


def test_a_cpu_without_bf16_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(backend, "_import", MagicMock)  # its CPU has no capabilities
    arguments = ["0", "--backend", "openvino", "--precision", "bf16", "--box", "1,2,3,4"]
    assert "has no bf16" in refusal(track, arguments, capsys)


def test_a_version_that_computes_wrongly_is_refused(batch_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(run=lambda *_: [np.full((1, 5), np.nan, np.float32)])
    real = backend.OpenVinoBackend._open_session
    fake = lambda self, name, threads: other if name == "search" else real(self, name, threads)  # noqa: E731
    monkeypatch.setattr(backend.OpenVinoBackend, "_open_session", fake)
    with pytest.raises(BackendError, match="does not compute the same as the model"):
        backend.OpenVinoBackend(batch_model, load_manifest(batch_model))


def test_missing_and_broken_installations_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"asymtrack-edge\[openvino\]"):
        backend._import()
    monkeypatch.delitem(sys.modules, "openvino")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "openvino.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    with pytest.raises(AsymTrackError, match="needs openvino, which does not load: libtbb"):
        backend._import()


def test_an_unreadable_model_is_reported_in_one_line(batch_model: Path, tmp_path: Path) -> None:
    shutil.copy(batch_model / "template.onnx", tmp_path)
    (tmp_path / "search.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match="OpenVINO cannot load") as caught:
        files = {path.name: file_entry(path) for path in tmp_path.iterdir()}
        backend.OpenVinoBackend(tmp_path, replace(load_manifest(batch_model), files=files))
    assert len(str(caught.value).splitlines()) == 1
