"""What TensorRT 8.5 (JetPack 5) cannot read in an ONNX model, or reads wrongly, found without a Jetson.

Its parser refuses operators that it does not know; worse, from opset 18 on it reads some differently from what they
say (reductions whose axes are an input reduce everything). Admitted is what these networks are made of, in the forms
of which its source says that it reads them as they are meant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, List, NamedTuple

from asymtrack_edge.errors import ExportError

NEWEST_OPSET = 17

#: Operators of these networks, as opsets up to 17 define them.
_READ = (
    "Add AveragePool Cast Concat Constant Conv Div Erf Flatten Gather Gemm Identity MatMul Mul Pad Pow ReduceMax "
    "ReduceMean ReduceSum Relu Reshape Shape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Transpose Unsqueeze"
)
_TYPES = ("FLOAT", "FLOAT16", "INT32", "INT64", "BOOL")


class Finding(NamedTuple):
    """Something that TensorRT 8.5 cannot read: the node, input or model, and the reason."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} {self.reason}"


def lint(model: Any) -> List[Finding]:
    """Checks an ``onnx.ModelProto``, its subgraphs included; returns what TensorRT 8.5 cannot read."""
    return [*_of_model(model), *(finding for node in _nodes(model.graph) for finding in _of_node(node))]


def require_readable(path: Path) -> None:
    """Checks an ONNX file for TensorRT 8.5.

    Raises:
        ExportError: it cannot be read there; names nodes and reasons.
    """
    import onnx

    findings = lint(onnx.load(str(path), load_external_data=False))
    if findings:
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        shown = "; ".join(map(str, findings[:5]))
        raise ExportError(f"TensorRT 8.5 (JetPack 5) cannot read {path.name}: {shown}{more}")


def _of_model(model: Any) -> Iterator[Finding]:
    import onnx

    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > NEWEST_OPSET:
            yield Finding("the model", f"is in opset {entry.version}, of {NEWEST_OPSET} at most: use --opset 16")
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dtype = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if value.name not in constants and dtype not in _TYPES:
            yield Finding(value.name, f"is an input of type {dtype}, not of float, half, int or bool")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _of_node(node: Any) -> Iterator[Finding]:
    import onnx

    # The exporter leaves some nodes nameless: their first output identifies them as well.
    name = f"{node.name or f'-> {node.output[0]}'} ({node.op_type})"
    if node.domain not in ("", "ai.onnx"):
        yield Finding(name, f"is of the domain {node.domain!r}, which it does not know")
    elif node.op_type in ("LayerNormalization", "Gelu", "GroupNormalization"):
        yield Finding(name, "is an operator it does not have: use --opset 16, which spells it out")
    elif node.op_type not in _READ.split():
        yield Finding(name, "is an operator of which it is not known that TensorRT 8.5 reads it as it is meant")
    elif node.op_type == "Cast":
        to = onnx.TensorProto.DataType.Name(next(a.i for a in node.attribute if a.name == "to"))
        if to not in _TYPES:
            yield Finding(name, f"casts to {to}, not to float, half, int or bool")
