"""What TensorRT 8.5 cannot read in an ONNX model, or reads wrongly, found without a Jetson.

Its parser refuses operators that it does not know; worse, it reads some forms of known ones
differently from what they say (reductions whose axes are an input reduce everything). Both are
found here by looking at the graph, and reported by node.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

from asymtrack_edge.errors import ExportError, MissingDependencyError
from asymtrack_edge.export.importers import TENSORRT_8_5

NEWEST_OPSET = 17

#: Targets whose TensorRT is 8.5.
LINTED_TARGETS = ("xavier",)


class Finding(NamedTuple):
    """Something that TensorRT 8.5 cannot read.

    Attributes:
        node: name of the node, input or model it is about.
        operator: type of the node; empty if it is no node.
        reason: why, and what to do instead.
    """

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.reason}" if self.operator else f"{self.node}: {self.reason}"


def lint(model: Union[Path, Any]) -> List[Finding]:
    """Checks a model, its subgraphs included, against TensorRT 8.5's parser.

    Args:
        model: an ONNX file, or an ``onnx.ModelProto``.

    Returns:
        What it cannot read, in the order of the graph; empty if nothing was found.

    Raises:
        MissingDependencyError: onnx is absent.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError("onnx", "export", "checking a model for TensorRT 8.5") from None
    if isinstance(model, Path):
        model = onnx.load(str(model), load_external_data=False)
    findings = list(_model_findings(model))
    for value in _inputs(model.graph):
        dtype = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if dtype not in ("FLOAT", "FLOAT16", "INT32", "INT64", "BOOL"):
            findings.append(
                Finding(
                    value.name,
                    "",
                    f"is an input of type {dtype}: TensorRT 8.5 takes float, half, int and bool",
                )
            )
    for node in _nodes(model.graph):
        findings.extend(_node_findings(node))
    return findings


def require_readable(model: Path) -> None:
    """Checks an ONNX file for TensorRT 8.5.

    Raises:
        ExportError: it cannot be read there; names nodes and reasons.
        MissingDependencyError: onnx is absent.
    """
    findings = lint(model)
    if findings:
        shown = "; ".join(str(finding) for finding in findings[:5])
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        raise ExportError(f"TensorRT 8.5 (JetPack 5) cannot read {model.name}: {shown}{more}")


def _model_findings(model: Any) -> Iterator[Finding]:
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if opsets.get("ai.onnx", 1) > NEWEST_OPSET:
        yield Finding("the model", "", f"is written in opset {opsets['ai.onnx']}, TensorRT 8.5 reads up to "
                                       f"{NEWEST_OPSET}: use --opset 16")  # fmt: skip
    for function in model.functions:
        yield Finding(function.name, "", "is a function of the model, which TensorRT 8.5 does not expand")


def _inputs(graph: Any) -> Iterator[Any]:
    constants = {tensor.name for tensor in graph.initializer}
    return (value for value in graph.input if value.name not in constants)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _nodes(subgraph)


def _node_findings(node: Any) -> Iterator[Finding]:
    # The exporter leaves some nodes nameless: their first output identifies them as well.
    name = node.name or f"-> {node.output[0]}"
    if node.domain not in ("", "ai.onnx"):
        yield Finding(name, node.op_type, f"is of the domain {node.domain!r}, which TensorRT 8.5 does not know")
    elif node.op_type not in TENSORRT_8_5:
        advice = ": use --opset 16, which spells it out" if node.op_type in _SPELLED_OUT else ""
        yield Finding(name, node.op_type, f"TensorRT 8.5 has no such operator{advice}")
    else:
        check = _TRAPS.get(node.op_type)
        reason = check(node) if check else None
        if reason:
            yield Finding(name, node.op_type, reason)


_SPELLED_OUT = ("LayerNormalization", "Gelu", "GroupNormalization")


def _attributes(node: Any) -> Dict[str, Any]:
    import onnx

    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _inputs_given(node: Any) -> int:
    return sum(1 for name in node.input if name)


def _axes_as_input(node: Any) -> Optional[str]:
    if _inputs_given(node) > 1:
        return "its axes are an input; TensorRT 8.5 reads them as an attribute only and would reduce everything"
    return None


def _einsum(node: Any) -> Optional[str]:
    equation = _attributes(node)["equation"].decode()
    if "..." in equation:
        return f"TensorRT 8.5 reads no ellipsis in an equation ({equation}): spell the axes out"
    if _inputs_given(node) > 2:
        return f"TensorRT 8.5 takes at most two inputs, here are {_inputs_given(node)}"
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return f"TensorRT 8.5 takes no diagonals ({equation})"
    return None


def _cast(node: Any) -> Optional[str]:
    import onnx

    to = onnx.TensorProto.DataType.Name(_attributes(node)["to"])
    if to not in ("FLOAT", "FLOAT16", "INT32", "INT64", "BOOL", "INT8"):
        return f"TensorRT 8.5 casts to float, half, int and bool, not to {to}"
    return None


def _without(names: Tuple[str, ...], since: int) -> Callable[[Any], Optional[str]]:
    """A check for attributes that came with a newer opset than TensorRT 8.5 knows."""

    def check(node: Any) -> Optional[str]:
        used: Set[str] = {name for name, value in _attributes(node).items() if value not in (0, b"", b"none")}
        for name in names:
            if name in used:
                return f"TensorRT 8.5 ignores its attribute {name!r} (opset {since})"
        return None

    return check


def _pad(node: Any) -> Optional[str]:
    if _inputs_given(node) > 3:
        return "its axes are an input (opset 18), which TensorRT 8.5 ignores"
    mode = _attributes(node).get("mode", b"constant").decode()
    return f"TensorRT 8.5 has no mode {mode!r}" if mode == "wrap" else None


def _training(node: Any) -> Optional[str]:
    training = _attributes(node).get("training_mode", 0)
    return "is in training mode: export the model in evaluation mode" if training else None


_TRAPS: Dict[str, Callable[[Any], Optional[str]]] = {
    **{
        f"Reduce{kind}": _axes_as_input
        for kind in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    },
    "Einsum": _einsum,
    "Cast": _cast,
    "Pad": _pad,
    "BatchNormalization": _training,
    "Split": _without(("num_outputs",), 18),
    "Resize": _without(("antialias", "axes", "keep_aspect_ratio_policy"), 18),
    "ScatterND": _without(("reduction",), 16),
    "ScatterElements": _without(("reduction",), 16),
    "AveragePool": _without(("dilations",), 19),
}
