"""Writing the two networks as ONNX."""

from __future__ import annotations

import inspect
import io
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from asymtrack_edge.cli import handled_signals
from asymtrack_edge.errors import ExportError, require
from asymtrack_edge.manifest import BATCH_AXIS

#: TensorRT 8.5's parser reads this IR version.
IR_VERSION = 8
#: Tensors with fewer elements are not stored in fp16: they are constants and biases, and take little space.
_WORTH_HALF = 1024


def write_onnx(
    network: nn.Module,
    inputs: Dict[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    opset: int,
    dynamic_batch: bool,
    half_storage: bool,
    spell_out: bool,
) -> None:
    """Traces ``network``, in eval mode, on ``inputs`` by name, and writes a simplified, checked ONNX model to ``path``.

    The tracing exporter is used on purpose: at opset 16 it writes LayerNorm and GELU with operators that every runtime
    has, and it keeps the opset it was asked for. ``dynamic_batch`` leaves the first axis of all tensors free.
    ``half_storage`` stores large fp32 weights as fp16, each cast back where it is used; runtimes fold the casts when
    they load the model. This rounds the weights, so use it only for weights that were fp16 or bear it. ``spell_out``
    writes fp32 matrix products as multiplications and sums (see ``SpelledOutProducts``).

    Raises:
        ExportError: the exported model is not what was asked for.
        MissingDependencyError: onnxsim is missing.
    """
    # Before PyTorch 2.5 there is no other exporter, and the argument does not exist.
    tracing: Any = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    exported: Any = io.BytesIO()  # a file name that is not UTF-8 would fail
    axes = {name: {0: BATCH_AXIS} for name in [*inputs, *outputs]} if dynamic_batch else None
    with warnings.catch_warnings(), SpelledOutProducts() if spell_out else nullcontext():
        # The exporter warns about its successor and about traced constants: both are expected here.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            tuple(inputs.values()),
            exported,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamic_axes=axes,
            **tracing,
        )
    model = _simplified(onnx.load_from_string(exported.getvalue()))
    # Shapes recorded while tracing may differ from those of the simplified graph: let them be inferred anew. Those of
    # the outputs are stored: PyTorch 2.3 leaves all axes free.
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    del model.graph.value_info[:]
    model.ir_version = IR_VERSION
    model.producer_name = "asymtrack-edge"
    written = {entry.domain: entry.version for entry in model.opset_import}
    if written.get("", written.get("ai.onnx")) != opset:
        raise ExportError(f"asked for opset {opset}, the exporter wrote {written}: use another torch or --opset")
    if half_storage:
        _store_as_half(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _simplified(model: Any) -> Any:
    """Folds constants and removes operators that have no effect."""
    signals: List[int] = []  # onnxsim swallows what a signal handler raises within it
    with handled_signals(lambda number, _: signals.append(number)):
        simplified, same = require("onnxsim", "export", "an export").simplify(model)
    if signals:
        raise KeyboardInterrupt(signals[0])
    if not same:
        raise ExportError("onnxsim changed the model's predictions: try another onnxsim version")
    return simplified


def _store_as_half(model: Any) -> None:
    """See ``write_onnx``; changes ``model``."""
    for weight in reversed(model.graph.initializer):
        if weight.data_type == TensorProto.FLOAT and len(weight.raw_data) >= 4 * _WORTH_HALF:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype("float16"), name + "_half"))
            model.graph.node.insert(0, helper.make_node("Cast", [name + "_half"], [name], to=TensorProto.FLOAT))


class SpelledOutProducts(TorchFunctionMode):
    """Computes fp32 matrix products as multiplications and sums, for TensorRT-RTX on Turing GPUs (RTX 2080 Ti).

    There TensorRT-RTX refuses fp32 matrix products ("FP32 GEMM is not supported"). The fp16 export has ten of them,
    all tiny: the prototypes of ETM, which are summed in fp32 because the sums exceed fp16's range.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        """Replaces ``a (.., M, K) @ b (.., K, N)`` by the sum over K of ``a (.., M, K, 1) * b (.., 1, K, N)``."""
        products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if (func in products or func is F.linear) and args[0].dtype == torch.float32:
            right = args[1] if func in products else args[1].t()
            product = (args[0].unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)
            bias = args[2] if len(args) > 2 else None
            return product if bias is None else product + bias
        return func(*args, **(kwargs or {}))
