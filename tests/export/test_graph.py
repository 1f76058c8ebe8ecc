"""The folded networks and the ONNX files: their format, and predictions that equal the trained model's."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Dict, List

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from asymtrack_edge.export.fold import fold
from asymtrack_edge.export.graph import IR_VERSION
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.export.quantise import costly_convolutions
from asymtrack_edge.export.split import localisation_score
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.sources.clip import default_clip
from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import SMALL, filled_model, random_inputs

#: Operators of opset 16 and types of casts that TensorRT 8.5 (JetPack 5) interprets correctly. It refuses others, and
#: from opset 18 on it misinterprets some (reductions whose axes are an input).
TENSORRT8 = (
    "Add AveragePool Cast Concat Constant Conv Div Erf Flatten Gather Gemm Identity MatMul MaxPool Mul Pad Pow "
    "ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Transpose Unsqueeze"
)
CASTS = {("", getattr(TensorProto, name)) for name in ("FLOAT", "FLOAT16", "INT32", "INT64", "BOOL")}


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def predict(folder: Path, manifest: Manifest, template: np.ndarray, search: np.ndarray) -> np.ndarray:
    """The prediction of ONNX Runtime, run as the manifest says, without this package."""
    names = [spec.name for spec in manifest.state]
    state = session(folder / "template.onnx").run(names, {"image": template})
    feed: Dict[str, np.ndarray] = {"image": search, **dict(zip(names, state))}
    return np.asarray(session(folder / "search.onnx").run(None, feed)[0])


def crops(manifest: Manifest, batch: int) -> List[np.ndarray]:
    r = np.random.RandomState(0)
    return [r.randint(0, 256, (batch, *s.shape)).astype(np.uint8) for s in (manifest.template, manifest.search)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("target", ["onnx", "xavier", "orin"])
def test_versions_and_operators(target: str, precision: str, tmp_path: Path) -> None:
    manifest = Export(filled_model(SMALL), ExportOptions(precision, target, max_batch=8)).write(tmp_path)
    for name in ("template.onnx", "search.onnx"):
        model = onnx.load(str(tmp_path / name))
        assert model.ir_version == IR_VERSION == 8
        assert [(e.domain, e.version) for e in model.opset_import] == [("", manifest.opset)]
        assert manifest.opset == (16 if target == "xavier" else 17)
        if target == "xavier":
            assert {node.op_type for node in model.graph.node} <= set(TENSORRT8.split())
            assert all(all(node.input) for node in model.graph.node), "its parser dereferences inputs left out"
            assert {(node.domain, a.i) for node in model.graph.node for a in node.attribute if a.name == "to"} <= CASTS
    kernels = [list(i.dims) for i in onnx.load(str(tmp_path / "search.onnx")).graph.initializer]
    assert [128, 128, 3, 3] in kernels, "OPE of stage 3 is not one convolution"


def test_items_of_a_batch_do_not_affect_each_other(tmp_path: Path) -> None:
    manifest = Export(filled_model(SMALL), ExportOptions(max_batch=8)).write(tmp_path)
    made = crops(manifest, 3)
    together = predict(tmp_path, manifest, *made)
    for i in range(3):
        alone = predict(tmp_path, manifest, *(crop[i : i + 1] for crop in made))
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_int8_is_close_and_only_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root.manager, "disable", logging.ERROR)
    model = filled_model(VARIANTS["T"])
    manifest = Export(model).write(tmp_path)
    # OPE and downsampling of every stage, and the first two layers of each tower of the head.
    assert len(costly_convolutions(onnx.load(str(tmp_path / "search.onnx")))) == 3 + 3 + 4
    made = crops(manifest, 1)
    wanted = predict(tmp_path, manifest, *made)
    Export(model, ExportOptions("int8"), clip=default_clip(6)).write(tmp_path)
    assert 0 < np.abs(predict(tmp_path, manifest, *made) - wanted).max() < 0.1
    assert logging.root.manager.disable == logging.ERROR, "the program's own setting is lost"
    quantised = onnx.load(str(tmp_path / "search.onnx"))
    assert quantised.ir_version == IR_VERSION and quantised.opset_import[0].version == manifest.opset
    assert sum(i.data_type == TensorProto.INT8 and len(i.dims) == 4 for i in quantised.graph.initializer) == 10


def test_the_rtx_export_avoids_fp32_matrix_products(tmp_path: Path) -> None:
    """In fp16, for Turing, the export for TensorRT-RTX has none, and it predicts the same as the one for Orin."""
    model, predictions = filled_model(SMALL), []
    template, search = (crop.numpy() for crop in random_inputs(SMALL, 2))
    for platform in ("orin", "rtx"):
        manifest = Export(model, ExportOptions("fp16", platform, max_batch=3)).write(tmp_path)
        products = 0
        for name in ("template.onnx", "search.onnx"):
            inferred = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / name))).graph
            types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
            single = [n for n in inferred.node if types.get(n.output[0]) == onnx.TensorProto.FLOAT]
            products += sum(n.op_type in ("MatMul", "Gemm") for n in single)
            islands = [n for n in inferred.node if n.op_type in ("LayerNormalization", "Softmax")]
            assert all(n in single for n in islands), "TensorRT needs casts"
        assert (products > 0) == (platform == "orin")
        predictions.append(predict(tmp_path, manifest, template, search))
    # Later layers round to fp16, so the limits of an fp16 export apply.
    np.testing.assert_allclose(predictions[0], predictions[1], atol=2e-3)


VARIATIONS = [
    *VARIANTS.values(),
    replace(SMALL, etm_stages=(2,), ope_stages=()),
    replace(SMALL, etm_stages=(1, 2, 3), ope_stages=(2, 3)),
]


@pytest.mark.parametrize("variant", VARIATIONS, ids=lambda v: f"{v.name}-{v.etm_stages}-{v.ope_stages}")
def test_folded_equals_trained(variant: Variant) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant)
    with torch.no_grad():
        wanted = model(template, search)
        got = fold(model)(template, search)
        assert torch.equal(model(template, search).box, wanted.box), "folding changed the trained model"
    torch.testing.assert_close(got.box, wanted.box, rtol=0, atol=2e-5)
    for ours, theirs in ((got.score_tl, wanted.score_tl), (got.score_br, wanted.score_br)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()))


def test_the_score_is_the_geometric_mean_of_the_heaviest_cells_of_both_corners() -> None:
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, 1:3, 1:3], maps[0, 1] = 0.25, 1 / 64  # all weight in 2 x 2 cells; uniform
    assert localisation_score(maps).item() == pytest.approx(0.25)
