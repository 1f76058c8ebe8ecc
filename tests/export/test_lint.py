"""What TensorRT 8.5 cannot read is found by node, and the exports for Xavier pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.lint import lint, require_readable
from asymtrack_edge.export.pipeline import ExportOptions, write_models
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


AXES = {"axes": np.array([1], np.int64)}


@pytest.mark.parametrize(
    "model, words",
    [
        (one_node("LayerNormalization", ("x", "s"), 17), "no such operator: use --opset 16"),
        (one_node("Gelu", opset=20), "no such operator"),
        (one_node("GroupNormalization", ("x", "s", "b"), 18), "no such operator"),
        *(
            (one_node(f"Reduce{kind}", ("x", "axes"), 18, constants=AXES), "axes are an input")
            for kind in ("Mean", "Max", "Min", "Prod", "L2", "SumSquare")
        ),
        (one_node("Einsum", ("x", "z"), equation="...ij,...jk->...ik"), "no ellipsis"),
        (one_node("Einsum", ("x", "z", "w"), equation="aij,ajk,akl->ail"), "at most two inputs"),
        (one_node("Einsum", equation="aii->ai"), "no diagonals"),
        (one_node("Cast", to=TensorProto.DOUBLE), "not to DOUBLE"),
        (one_node("Pad", ("x", "p"), mode="wrap"), "no mode 'wrap'"),
        (one_node("Split", opset=18, num_outputs=2), "num_outputs"),
        (one_node("FusedThing", domain="com.example"), "domain 'com.example'"),
    ],
)
def test_what_cannot_be_read_is_named(model: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    findings = [finding for finding in lint(model) if finding.node == "culprit"]
    assert len(findings) == 1 and words in findings[0].reason
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="culprit") as caught:
        require_readable(tmp_path / "model.onnx")
    assert words in str(caught.value)


def test_opset_and_inputs() -> None:
    assert "opset 18" in lint(one_node("Relu", opset=18))[0].reason
    assert lint(one_node("Relu", opset=17)) == []
    for dtype, name in ((TensorProto.UINT8, "UINT8"), (TensorProto.DOUBLE, "DOUBLE")):
        (finding,) = lint(one_node("Relu", dtype=dtype))
        assert finding.node == "x" and name in finding.reason


def test_harmless_forms_pass() -> None:
    harmless: List[onnx.ModelProto] = [
        one_node("ReduceMean", axes=[1]),
        one_node("ReduceSum", ("x", "axes"), constants=AXES),
        one_node("Einsum", ("x", "z"), equation="aij,ajk->aik"),
        one_node("Cast", to=TensorProto.FLOAT16),
        one_node("Pad", ("x", "p"), constants={"p": np.zeros(6, np.int64)}, mode="constant"),
    ]
    for model in harmless:
        assert lint(model) == []


def test_nodes_of_subgraphs_are_read() -> None:
    inner = one_node("Gelu", opset=20).graph
    del inner.input[:]
    branches = {"then_branch": inner, "else_branch": inner}
    model = one_node("If", **branches)
    assert [finding.operator for finding in lint(model)] == ["Gelu", "Gelu"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_exports_for_xavier_pass(variant: str, precision: str, tmp_path: Path) -> None:
    write_models(filled_model(VARIANTS[variant]), ExportOptions(precision, "xavier", max_batch=8), tmp_path)
    for name in ("template.onnx", "search.onnx"):
        assert lint(tmp_path / name) == []


def test_a_newer_opset_is_refused_for_xavier(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="LayerNormalization"):
        write_models(filled_model(VARIANTS["T"]), ExportOptions(target="xavier", opset=17), tmp_path)
