"""Writing the two networks as ONNX."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from asymtrack_edge.errors import ExportError, MissingDependencyError
from asymtrack_edge.manifest import BATCH_AXIS

#: Old runtimes (onnxruntime 1.14 to 1.16, TensorRT 8.5's parser) read this IR version.
IR_VERSION = 8


def write_onnx(
    network: nn.Module, inputs: Dict[str, Tensor], outputs: Sequence[str], opset: int, dynamic_batch: bool, path: Path
) -> None:
    """Traces ``network`` on ``inputs`` and writes a simplified, checked ONNX model.

    The tracing exporter is used on purpose: at opset 16 it writes LayerNorm and GELU with operators
    that every runtime has, and it keeps the opset it was asked for.

    Raises:
        ExportError: the model that came out is not what was asked for.
        MissingDependencyError: onnx is absent.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError("onnx", "export", "writing ONNX models") from None
    axes = {name: {0: BATCH_AXIS} for name in [*inputs, *outputs]} if dynamic_batch else None
    with warnings.catch_warnings():
        # The exporter announces its successor and the constants it traced: neither is news here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamic_axes=axes,
            do_constant_folding=True,
            dynamo=False,
        )
    model = simplify(onnx.load(str(path)))
    # Shapes noted while tracing are not always those of the simplified graph: have them inferred anew.
    del model.graph.value_info[:]
    model.ir_version = IR_VERSION
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("", written.get("ai.onnx")) != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {written}: use another torch or --opset")
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    if names != (list(inputs), list(outputs)):
        raise ExportError(f"the exported graph has inputs and outputs {names}, not {list(inputs)} and {list(outputs)}")
    model.producer_name = "asymtrack-edge"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def simplify(model: Any) -> Any:
    """Folds constants and removes what does nothing, by onnxsim, or onnxslim where it is absent.

    Raises:
        MissingDependencyError: neither is installed.
        ExportError: the simplified model differs from the original.
    """
    try:
        import onnxsim
    except ImportError:
        try:
            import onnxslim
        except ImportError:
            raise MissingDependencyError("onnxsim (or onnxslim)", "export", "simplifying ONNX models") from None
        return onnxslim.slim(model)
    simplified, same = onnxsim.simplify(model)
    if not same:
        raise ExportError("onnxsim changed the model's answers: try another onnxsim version")
    return simplified


def operators(path: Path) -> List[Tuple[str, int]]:
    """Operator types of a model and how often each occurs, most frequent first."""
    import onnx

    return Counter(node.op_type for node in onnx.load(str(path)).graph.node).most_common()
