"""Whole exports: what they contain, that they equal the model, that they replace nothing when they fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch

from asymtrack_edge.errors import ExportError, ManifestError
from asymtrack_edge.export import pipeline
from asymtrack_edge.export.command import main as export_command
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.export.verify import TorchBackend, require_passed, verify
from asymtrack_edge.manifest import FLOAT_RGB, load_manifest
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.runtime import Tracker
from asymtrack_edge.runtime.agreement import Limits
from asymtrack_edge.runtime.backends.tensorrt import build
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.variants import VARIANTS
from tests.export.test_graph import predict
from tests.helpers import GOLDEN, filled_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "t"
    Export(filled_model(VARIANTS["T"]), ExportOptions()).run(folder)
    return folder


def _golden_frames() -> np.ndarray:
    return np.ascontiguousarray(np.load(GOLDEN / "frames.npz")["frames"][..., ::-1])


@pytest.mark.parametrize("name", list(VARIANTS))
def test_torch_tracks_as_published(name: str) -> None:
    tracker = Tracker(TorchBackend(filled_model(VARIANTS[name])), recover=False)
    assert _track_difference(tracker, name) < 0.05


def test_exported_model_tracks_as_published(exported: Path) -> None:
    assert _track_difference(Tracker.load(exported, threads=1, recover=False), "T") < 0.05


def _track_difference(tracker: Tracker, name: str) -> float:
    frames = _golden_frames()
    worst = 0.0
    for wanted in np.load(GOLDEN / f"official_{name}_seed0.npz")["tracked_xywh"]:
        # One tracker for all six starts: init() must forget the last target.
        tracker.init(frames[0], wanted[0])
        for frame, box in zip(frames[1:], wanted[1:]):
            worst = max(worst, float(np.abs(np.array(tracker.update(frame).box) - box).max()))
    return worst


@pytest.mark.parametrize("name", list(VARIANTS))
def test_onnx_answers_as_published(name: str, tmp_path: Path) -> None:
    options = ExportOptions(input_format=FLOAT_RGB)
    manifest = Export(filled_model(VARIANTS[name]), options).write(tmp_path)
    random, variant = np.random.RandomState(7), VARIANTS[name]
    template = random.normal(0, 1, (1, 3, variant.template_size, variant.template_size)).astype(np.float32)
    search = random.normal(0, 1, (1, 3, variant.search_size, variant.search_size)).astype(np.float32)
    prediction = predict(tmp_path, manifest, template, search)
    wanted = np.load(GOLDEN / f"official_{name}_seed0.npz")["box_cxcywh"]
    assert np.abs(prediction[0, :4] - wanted).max() < 1e-4
    assert 0 <= prediction[0, 4] <= 1


def test_the_page_shows_how_to_do_without_this_package(exported: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("DIR", str(exported))
    names: Dict[str, Any] = {}
    exec(code, names)
    assert names["prediction"].shape == (1, 5)
    fields = json.loads((exported / "manifest.json").read_text())
    for line in page[page.index("| field | is |") :].split("\n\n")[0].splitlines()[2:]:
        for field in line.split("|")[1].replace("`", "").split(","):
            assert field.strip() in fields


def test_the_manifest_says_what_was_verified_and_how_large_the_model_is(exported: Path) -> None:
    manifest = load_manifest(exported)
    assert manifest.verification["passed"]
    assert manifest.provenance["parameters"] == pytest.approx(3.05e6, rel=2e-3)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_sizes_are_the_papers(name: str) -> None:
    size = pipeline.model_size(filled_model(VARIANTS[name]))
    published = VARIANTS[name].published
    assert round(size["parameters"] / 1e6, 2) == published.params_m
    macs = {"T": 0.617, "S": 0.696, "B": 1.683}[name]
    assert size["search_multiply_adds"] / 1e9 == pytest.approx(macs, rel=0.01)


def test_half_precision_stays_close_and_small(exported: Path, tmp_path: Path) -> None:
    # Ordinary weights: the filled ones have corner maps of several hundreds, which no trained model has.
    torch.manual_seed(0)
    model = AsymTrack(VARIANTS["T"]).eval()
    manifest = Export(model, ExportOptions(precision="fp16")).run(tmp_path / "half")
    assert manifest.verification["box_difference"] < 2e-3
    assert manifest.verification["track_iou_mean"] > 0.98
    assert 0 < manifest.verification["largest_half"] < 32752
    assert manifest.files["search.onnx"].bytes < 0.55 * load_manifest(exported).files["search.onnx"].bytes


def test_numbers_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    """A CPU computes the fp16 graph in fp32: boxes and tracks agree, on a GPU they would be nan."""
    torch.manual_seed(0)
    model = AsymTrack(VARIANTS["T"]).eval()
    with torch.no_grad():
        # The norm of the head's first layer makes its features larger, the next layer undoes that.
        first, second = model.box_head.conv1_tl, model.box_head.conv2_tl
        for parameter in (first[1].weight, first[1].bias):
            parameter *= 1e5
        second[0].weight /= 1e5
    Export(model, ExportOptions()).run(tmp_path / "single")
    with pytest.raises(ExportError, match="fp16 cannot hold this model's numbers"):
        Export(model, ExportOptions(precision="fp16")).run(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_scores_are_verified_too(tmp_path: Path) -> None:
    manifest = Export(filled_model(VARIANTS["T"]), ExportOptions()).write(tmp_path)
    clip = list(synthetic_clip(frames=6))
    frames, box = [frame for frame, _ in clip], clip[0][1]
    other = filled_model(VARIANTS["T"])
    report = verify(tmp_path, manifest, other, frames, box, Limits(1e-4, 1e-12, 0.99))
    assert not report["passed"] and report["score_difference"] > 1e-12
    with pytest.raises(ExportError, match="scores by"):
        require_passed(report)


def test_failed_verification_leaves_the_old_export(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    fold = pipeline.fold

    def wrong_fold(model: torch.nn.Module) -> torch.nn.Module:
        folded = fold(model)  # type: ignore[arg-type]
        folded.bottleneck.bias.data.add_(1.0)
        return folded

    monkeypatch.setattr(pipeline, "fold", wrong_fold)
    with pytest.raises(ExportError, match="does not equal the trained one"):
        Export(filled_model(VARIANTS["T"]), ExportOptions()).run(exported)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_a_failing_builder_leaves_the_verified_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ExportError("the builder ran out of memory")

    monkeypatch.setattr(build, "build_engines", fails)
    monkeypatch.setattr(build, "load_tensorrt", lambda flavour: None)
    arguments = ["--random-weights", "0", "--target", "rtx", "--output", str(tmp_path / "out")]
    assert export_command(arguments) == 0
    assert "no engines built: the builder ran out of memory; on the device, build them" in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest.verification["passed"] and set(manifest.files) == {"template.onnx", "search.onnx"}


def test_a_changed_byte_is_refused(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    data = bytearray((copy / "search.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "search.onnx").write_bytes(bytes(data))
    with pytest.raises(ManifestError, match="is not the file"):
        Tracker.load(copy)
    (copy / "search.onnx").unlink()
    with pytest.raises(ManifestError, match="missing"):
        Tracker.load(copy)


def test_manifest_round_trip(exported: Path, tmp_path: Path) -> None:
    manifest = replace(load_manifest(exported), target="orin")
    manifest.save(tmp_path)
    assert load_manifest(tmp_path, verify=False) == manifest


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "other"}, "not an asymtrack-edge-export"),
        ({"version": 99}, "version 99"),
        ({"input_format": "jpeg"}, "damaged"),
        ({"max_batch": 10**9}, "damaged"),
        ({"state": None}, "damaged"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0"}}}, "damaged"),
    ],
)
def test_damaged_manifests_are_refused(exported: Path, tmp_path: Path, change: dict, word: str) -> None:
    content = json.loads((exported / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ManifestError, match=word):
        load_manifest(tmp_path)


def test_the_weights_taken_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, averaged = filled_model(VARIANTS["T"], 1).state_dict(), filled_model(VARIANTS["T"], 2).state_dict()
    torch.save({"model": raw, "model_ema": averaged}, tmp_path / "run.pth")
    taken = {}
    for flags in ([], ["--weights", "raw"]):
        arguments = ["--checkpoint", str(tmp_path / "run.pth"), *flags, "--output", str(tmp_path / "out")]
        assert export_command(arguments) == 0
        taken[len(flags)] = load_manifest(tmp_path / "out").provenance["weights_taken"]
        assert f"run.pth holds two sets of weights: takes the {taken[len(flags)]};" in capsys.readouterr().out
    assert taken == {0: "averaged (model_ema)", 2: "raw (model)"}


def test_command_exports_and_prints_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert export_command(["--variant", "t", "--random-weights", "0", "--fp16", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "track IoU" in printed and str(output / "search.onnx") in printed
    assert load_manifest(output).precision == "fp16"


@pytest.mark.parametrize(("variant", "target"), [("T", "onnx"), ("T", "xavier")])
def test_bundled_weights_can_be_exported_in_fp16(variant: str, target: str, tmp_path: Path) -> None:
    """The README's first export. Tracks on the synthetic clip amplify what fp16 rounds."""
    output = tmp_path / "out"
    arguments = ["--variant", variant, "--fp16", "--target", target, "--no-engine", "--output", str(output)]
    assert export_command(arguments) == 0
    assert load_manifest(output).verification["passed"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--variant", "X"], "unknown variant 'X'"),
        (["--variant", "T", "--checkpoint", "/nonexistent"], "/nonexistent"),
        (["--random-weights", "0", "--batch", "65"], "1..64"),
        (["--random-weights", "0", "--opset", "3"], "13..20"),
        (["--clip", "a.mp4"], "--box"),
        (["--weights", "raw"], "give one with --checkpoint"),
        (["--random-weights", "0", "--clip", "/nonexistent.mp4", "--box", "1,2,3,4"], "there is no file"),
    ],
)
def test_command_names_the_mistake(arguments: list, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_command(arguments) == 2
    error = capsys.readouterr().err
    assert word in error and len(error.splitlines()) == 1


def test_command_does_not_replace_a_folder_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert export_command(["--random-weights", "0", "--output", str(tmp_path)]) == 2
    assert "is no model directory" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
