"""ONNX Runtime's GPU providers, with the CPU's memory and kernels in their place: which buffers are bound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from asymtrack_edge.errors import BackendError
from asymtrack_edge.export.pipeline import ExportOptions, write_models
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime import Tracker
from asymtrack_edge.runtime.backends import onnxruntime as ort
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.helpers import SMALL, filled_model

CLIP = list(synthetic_clip(8))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    write_models(filled_model(SMALL), ExportOptions(), folder).save(folder)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts what is made; everything that asks for ``cuda`` gets the CPU."""
    counts: Counter = Counter()
    provider = "CUDAExecutionProvider"

    class Session:
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            assert providers[0][0] == provider
            self.real = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> Any:
            return [provider]

        def io_binding(self) -> Any:
            counts["binding"] += 1
            return self.real.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            counts["run"] += 1
            self.real.run_with_iobinding(binding)

    class OrtValue:
        @staticmethod
        def ortvalue_from_numpy(array: np.ndarray, kind: str, device: int) -> Any:
            assert kind == "cuda"
            counts["value"] += 1
            return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu", 0)

    class Imitation:
        __version__ = onnxruntime.__version__
        SessionOptions = onnxruntime.SessionOptions
        InferenceSession = Session

        @staticmethod
        def get_available_providers() -> Any:
            return [provider]

    Imitation.OrtValue = OrtValue  # type: ignore[attr-defined]
    monkeypatch.setattr(ort, "ort", Imitation)
    return counts


def test_buffers_are_bound_once_and_stay(made: Counter, exported: Path) -> None:
    manifest = load_manifest(exported)
    tracker = Tracker(ort.OnnxRuntimeDeviceBackend(exported, manifest, "cuda"))
    tracker.init(CLIP[0][0], CLIP[0][1])
    ours = [tracker.update(CLIP[1][0]).box]
    made.clear()
    ours += [tracker.update(frame).box for frame, _ in CLIP[2:]]
    assert made == {"run": len(CLIP) - 2}, "a frame makes no binding and no device tensor"
    tracker.init(CLIP[0][0], CLIP[0][1])
    assert made["value"] == 0, "the template is written where the search network reads it"
    tracker.update(CLIP[1][0])
    assert made["binding"] == 1, "init binds the template network, update nothing"


def test_tracks_as_the_cpu_does(made: Counter, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(exported)
    tracks = []
    for make in (lambda: ort.OnnxRuntimeDeviceBackend(exported, manifest, "cuda"), None):
        if make is None:
            monkeypatch.setattr(ort, "ort", onnxruntime)
        tracker = Tracker(make() if make else ort.OnnxRuntimeBackend(exported, manifest))
        tracker.init(CLIP[0][0], CLIP[0][1])
        tracks.append([tracker.update(frame).box for frame, _ in CLIP[1:]])
    assert tracks[0] == tracks[1]


def test_a_missing_provider_is_named(exported: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime here has CUDA")
    with pytest.raises(BackendError, match="onnxruntime-gpu"):
        ort.OnnxRuntimeDeviceBackend(exported, load_manifest(exported), "cuda")
