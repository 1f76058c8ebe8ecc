"""Values that fp16 cannot hold.

A CPU computes an fp16 graph in fp32 and rounds where somebody looks, so that tracks which agree on a CPU
say nothing about overflow on a GPU. Here somebody looks everywhere: every fp16 tensor of the model becomes
an output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterable, Tuple

import numpy as np
import onnxruntime as ort

from asymtrack_edge.errors import MissingDependencyError


def largest_half_value(model: Path, feeds: Iterable[Dict[str, np.ndarray]]) -> Tuple[float, str]:
    """The largest magnitude that an fp16 tensor of a model takes, and the tensor's name.

    Args:
        model: ONNX file.
        feeds: its inputs, once or several times.

    Returns:
        Infinity where a value does not fit or is no number; 0 and an empty name if nothing is fp16.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError("onnx", "export", "looking for overflow") from None
    opened = onnx.shape_inference.infer_shapes(onnx.load(str(model)))
    already = {value.name for value in opened.graph.output}
    inside = [v for v in opened.graph.value_info if v.name not in already]
    half = onnx.TensorProto.FLOAT16
    opened.graph.output.extend(v for v in inside if v.type.tensor_type.elem_type == half)
    names = [v.name for v in opened.graph.output if v.type.tensor_type.elem_type == half]
    if not names:
        return 0.0, ""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    largest = (0.0, "")
    for feed in feeds:
        for name, values in zip(names, session.run(names, feed)):
            magnitude = float(np.abs(values.astype(np.float32)).max(initial=0))
            largest = max(largest, (magnitude if np.isfinite(magnitude) else np.inf, name))
    return largest
