"""Weights stored as fp16 in a model that computes in fp32: half the bytes, the same arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List

#: Smaller tensors are left alone: they hold constants and biases, and little room.
_WORTH_IT = 1024


def store_weights_as_half(path: Path) -> None:
    """Rewrites an ONNX file so that its large fp32 weights are stored as fp16, each cast back on loading.

    Runtimes fold the casts when they load the model. The weights are rounded to fp16, so this is for
    weights that came as fp16 or bear it.
    """
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    casts: List[Any] = []
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.raw_data) >= 4 * _WORTH_IT:
            name = weight.name
            half = numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(numpy_helper.from_array(half, name + "_half"))
            casts.append(helper.make_node("Cast", [name + "_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
