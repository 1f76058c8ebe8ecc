"""Complete exports: their content, their agreement with the model, and that a failed one replaces nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from asymtrack_edge.errors import ExportError, ManifestError, UsageError
from asymtrack_edge.export import pipeline
from asymtrack_edge.export.command import main as export_command
from asymtrack_edge.export.fold import fold
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.export.verify import TorchBackend
from asymtrack_edge.manifest import FLOAT_RGB, file_entry, load_manifest
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime import Tracker
from asymtrack_edge.runtime.backends.tensorrt import build
from asymtrack_edge.runtime.sources.clip import default_clip
from asymtrack_edge.variants import VARIANTS
from tests.export.test_graph import predict
from tests.helpers import GOLDEN, filled_model, golden_answers, random_inputs, refusal

T = VARIANTS["T"]
SHORT = default_clip(8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "t"
    Export(filled_model(T), clip=SHORT).run(folder)
    return folder


def test_an_export_that_fails_to_publish_replaces_nothing(tmp_path: Path) -> None:
    def publish(folder: Path, manifest: Any) -> None:
        assert load_manifest(folder) == manifest
        raise ExportError("refused")

    with pytest.raises(ExportError, match="refused"):
        Export(filled_model(T), clip=SHORT).run(tmp_path / "t", publish=publish)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["T", "B"])
def test_tracks_are_the_published_ones(name: str, exported: Path) -> None:
    """T as exported, B in PyTorch."""
    backend = TorchBackend(filled_model(VARIANTS[name])) if name == "B" else None
    tracker = Tracker(backend, recover=False) if backend else Tracker.load(exported, threads=1, recover=False)
    frames = np.ascontiguousarray(np.load(GOLDEN / "frames.npz")["frames"][..., ::-1])
    for wanted in golden_answers(name)["tracked_xywh"]:
        # One tracker for all six starts: init() must forget the previous target.
        tracker.init(frames[0], wanted[0])
        for frame, box in zip(frames[1:], wanted[1:]):
            assert np.abs(np.array(tracker.update(frame).box) - box).max() < 0.05


@pytest.mark.parametrize("name", list(VARIANTS))
def test_predictions_and_sizes_are_the_published_ones(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    manifest = Export(filled_model(variant), ExportOptions(input_format=FLOAT_RGB)).write(tmp_path)
    template, search = (crop.numpy() for crop in random_inputs(variant))
    prediction = predict(tmp_path, manifest, template, search)
    assert np.abs(prediction[0, :4] - golden_answers(name)["box_cxcywh"]).max() < 1e-4
    assert 0 <= prediction[0, 4] <= 1
    parameters, multiply_adds = {"T": (3.05, 0.617), "S": (3.36, 0.696), "B": (3.36, 1.683)}[name]
    assert round(manifest.provenance["parameters"] / 1e6, 2) == parameters
    assert manifest.provenance["search_multiply_adds"] / 1e9 == pytest.approx(multiply_adds, rel=0.01)


def test_half_precision_stays_close_and_small_or_is_refused(exported: Path, tmp_path: Path) -> None:
    # Default weights: with the made-up ones, corner maps reach several hundred, unlike those of any trained model.
    torch.manual_seed(0)
    model = AsymTrack(T).eval()
    manifest = Export(model, ExportOptions("fp16"), clip=SHORT).run(tmp_path / "half")
    assert manifest.verification["box_difference"] < 2e-3 and manifest.verification["track_iou_mean"] > 0.98
    assert 0 < manifest.verification["largest_half"] < 32752
    assert manifest.files["search.onnx"].bytes < 0.55 * load_manifest(exported).files["search.onnx"].bytes
    with torch.no_grad():
        # The norm of the head's first layer enlarges the features, and the next layer undoes that. A CPU computes the
        # fp16 graph in fp32, so boxes and tracks agree; on a GPU they would be NaN.
        for parameter in (model.box_head.conv1_tl[1].weight, model.box_head.conv1_tl[1].bias):
            parameter *= 1e5
        model.box_head.conv2_tl[0].weight /= 1e5
    with pytest.raises(ExportError, match="fp16 cannot hold this model's numbers"):
        Export(model, ExportOptions("fp16"), clip=SHORT).run(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for unknown in ({"precision": "bf16"}, {"platform": "jetson"}):
        with pytest.raises(UsageError, match="choose precision among fp32, fp16, int8, and platform among onnx"):
            ExportOptions(**unknown)


def test_failed_verification_leaves_the_old_export(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    monkeypatch.setattr(pipeline, "fold", lambda model: fold(filled_model(model.variant, seed=1)))
    with pytest.raises(ExportError, match="differs from the trained one"):
        Export(filled_model(T), clip=SHORT).run(exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_manifests_are_read_or_refused(exported: Path, tmp_path: Path) -> None:
    manifest = replace(load_manifest(exported), platform="orin")
    manifest.save(tmp_path)
    assert load_manifest(tmp_path) == manifest
    content = json.loads((tmp_path / "manifest.json").read_text())
    for change, words in (
        ({"format": "other"}, "not an asymtrack-edge-export"),
        ({"version": 99}, "version 99"),
        ({"max_batch": 10**9}, "damaged"),
        ({"search_factor": float("nan")}, "damaged"),
        ({"std": [1, 1, 0]}, "damaged"),
        ({"search": {**content["search"], "dtype": "float16"}}, "damaged"),
        ({"template": {**content["template"], "shape": [128, 128, 4]}}, "damaged"),
        ({"output": {**content["output"], "shape": [0]}}, "damaged"),
        ({"files": {}}, "damaged"),
        ({"engines": {"search.onnx": {}}}, "damaged"),
        ({"files": {**content["files"], "../x": {"bytes": 1, "sha256": "0"}}}, "damaged"),
        ({"files": {**content["files"], "a/../x": {"bytes": 1, "sha256": "0"}}}, "damaged"),
        ({"state": []}, "damaged"),
        ({"precision": "fp8"}, "damaged"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ManifestError, match=words):
            load_manifest(tmp_path)


def test_the_chosen_weights_are_reported(tmp_path: Path, monkeypatch: Any) -> None:
    path, said = tmp_path / "run.pth", []
    monkeypatch.setattr(pipeline, "default_clip", lambda: SHORT)
    # The training run goes on, and its next checkpoint is about to replace this one.
    monkeypatch.setattr("asymtrack_edge.cli.say", lambda line: said.append(line) or ("holds" in line and path.unlink()))
    torch.save({"model": filled_model(T, 1).state_dict(), "model_ema": filled_model(T, 2).state_dict()}, path)
    digest = file_entry(path).sha256
    assert export_command([f"--checkpoint={path}", "--weights=raw", f"--output={tmp_path / 'out'}", "--json"]) == 0
    provenance = load_manifest(tmp_path / "out").provenance
    assert (provenance["weights_taken"], provenance["weights_sha256"]) == ("raw (model)", digest)
    assert "run.pth holds 2 sets of weights: using the raw (model);" in said[1]


@pytest.mark.parametrize("target", ["onnx", "xavier"])
def test_bundled_weights_can_be_exported_in_fp16_even_if_no_engine_can_be_built(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's first export. Tracks on the synthetic clip amplify the rounding of fp16."""
    monkeypatch.setattr(build, "load_tensorrt", MagicMock(side_effect=AttributeError("there is no TensorRT")))
    output = tmp_path / "out"
    assert export_command(["--variant", "t", "--fp16", "--target", target, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "track IoU" in printed and str(output / "search.onnx") in printed
    assert ("no engines built: there is no TensorRT; on the device, build them" in printed) == (target == "xavier")
    manifest = load_manifest(output)
    assert manifest.verification["passed"] and manifest.precision == "fp16"
    assert set(manifest.files) == {"template.onnx", "search.onnx"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--variant", "T", "--checkpoint", "/nonexistent"], "/nonexistent"),
        (["--random-weights", "0", "--batch", "65"], "1..64"),
        (["--random-weights", "0", "--opset", "3"], "13..20"),
        (["--target", "xavier", "--opset", "17"], "up to 16"),
        (["--target", "orin", "--opset", "18"], "up to 17"),
        (["--target", "orin", "--input", "uint8-bgr-hwc"], "leave out --input"),
        (["--int8", "--target", "orin"], "int8 is for CPUs"),
        (["--int8", "--input", FLOAT_RGB], "int8 is for CPUs"),
        (["--clip", "a.mp4"], "--box"),
        (["--output", "models", "--triton", "models/triton"], "--triton lies in --output"),
        (["--random-weights", "0", "--triton", "/dev/null/models"], "/dev/null"),
        (["--weights", "raw"], "give one with --checkpoint"),
        (["--random-weights", "0", "--clip", "/nonexistent.mp4", "--box", "1,2,3,4"], "there is no file"),
        (["--random-weights", "0", "--output", "/etc"], "is not a model directory"),
    ],
)
def test_command_names_the_mistake(arguments: list, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in refusal(export_command, arguments, capsys)
