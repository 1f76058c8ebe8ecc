"""What TensorRT 8.5 cannot read is found by node, and the exports for Xavier pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.lint import lint, require_readable
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.variants import VARIANTS
from tests.helpers import filled_model


def one_node(
    operator: str,
    inputs: Sequence[str] = ("x",),
    opset: int = 16,
    dtype: int = TensorProto.FLOAT,
    domain: str = "",
    constants: Optional[Dict[str, np.ndarray]] = None,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node called ``culprit``."""
    values = constants or {}
    node = helper.make_node(operator, list(inputs), ["y"], "culprit", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, dtype, [1, 4, 4]) for name in inputs if name not in values],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (one_node("LayerNormalization", ("x", "s"), 17), "use --opset 16"),
        (one_node("Gelu", opset=20), "use --opset 16"),
        (one_node("Einsum", ("x", "z"), equation="...ij,...jk->...ik"), "not known that TensorRT 8.5 reads it"),
        (one_node("Cast", to=TensorProto.DOUBLE), "casts to DOUBLE"),
        (one_node("FusedThing", domain="com.example"), "domain 'com.example'"),
    ],
)
def test_what_cannot_be_read_is_named(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    findings = [finding for finding in lint(model) if finding.node.startswith("culprit")]
    assert len(findings) == 1 and words in findings[0].reason
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="culprit") as caught:
        require_readable(tmp_path / "model.onnx")
    assert words in str(caught.value)


def test_opset_and_inputs() -> None:
    """From opset 18 on, reductions have their axes as an input, which TensorRT 8.5 does not read."""
    axes = {"axes": np.array([1], np.int64)}
    assert "opset 18" in lint(one_node("ReduceMean", ("x", "axes"), 18, constants=axes))[0].reason
    assert lint(one_node("Relu", opset=17)) == lint(one_node("ReduceMean", axes=[1])) == []
    for dtype, name in ((TensorProto.UINT8, "UINT8"), (TensorProto.DOUBLE, "DOUBLE")):
        (finding,) = lint(one_node("Relu", dtype=dtype))
        assert finding.node == "x" and name in finding.reason


def test_nodes_of_subgraphs_are_read() -> None:
    inner = one_node("Gelu", opset=20).graph
    del inner.input[:]
    findings = lint(one_node("If", then_branch=inner, else_branch=inner))
    assert sum("(Gelu)" in finding.node for finding in findings) == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_exports_for_xavier_pass(variant: str, precision: str, tmp_path: Path) -> None:
    Export(filled_model(VARIANTS[variant]), ExportOptions(precision, "xavier", max_batch=8)).write(tmp_path)
    for name in ("template.onnx", "search.onnx"):
        assert lint(onnx.load(str(tmp_path / name))) == []


def test_a_newer_opset_is_refused_for_xavier(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="LayerNormalization"):
        Export(filled_model(VARIANTS["T"]), ExportOptions(platform="xavier", opset=17)).write(tmp_path)
