"""Spelling out fp32 matrix products, for TensorRT-RTX on Turing GPUs (GeForce RTX 2080 Ti).

There TensorRT-RTX refuses fp32 matrix products ("FP32 GEMM is not supported"). The fp16 export has
six of them, all tiny: the prototypes of ETM, which are summed in fp32 because the sums leave fp16's
range. Written as products and a sum they build for every GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

from asymtrack_edge.errors import ExportError


def spell_out_fp32_products(path: Path) -> int:
    """Replaces every fp32 MatMul and Gemm of an ONNX file by Mul and ReduceSum.

    Returns:
        How many were replaced.

    Raises:
        ExportError: one of them has a form that this does not know.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    types = _element_types(onnx.shape_inference.infer_shapes(model))
    nodes: List[Any] = []
    count = 0
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and types.get(node.output[0]) == onnx.TensorProto.FLOAT:
            nodes.extend(_spelled_out(node, f"spelled_out_{count}"))
            count += 1
        else:
            nodes.append(node)
    if not count:
        return 0
    for name, axis in _AXES.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([axis], np.int64), name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return count


_AXES = {"spelled_out_rows": -1, "spelled_out_columns": -3, "spelled_out_sum": -2}


def _element_types(model: Any) -> Any:
    graph = model.graph
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _spelled_out(node: Any, prefix: str) -> List[Any]:
    """``a (.., M, K) @ b (.., K, N) + c`` as ``sum over K of a (.., M, K, 1) * b (.., 1, K, N) + c``."""
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if any(attributes.get(name, plain) != plain for name, plain in _PLAIN.items()):
        raise ExportError(f"cannot spell out {node.name} ({node.op_type} with {attributes}) for TensorRT-RTX")
    left, right, *bias = node.input
    a, b, product, total = (f"{prefix}_{part}" for part in ("a", "b", "product", "sum"))
    result = node.output[0]
    spelled = [
        helper.make_node("Unsqueeze", [left, "spelled_out_rows"], [a], f"{node.name}/a"),
        helper.make_node("Unsqueeze", [right, "spelled_out_columns"], [b], f"{node.name}/b"),
        helper.make_node("Mul", [a, b], [product], f"{node.name}/product"),
        helper.make_node(
            "ReduceSum",
            [product, "spelled_out_sum"],
            [total if bias else result],
            f"{node.name}/sum",
            keepdims=0,
        ),
    ]
    if bias:
        spelled.append(helper.make_node("Add", [total, *bias], [result], f"{node.name}/bias"))
    return spelled


_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
