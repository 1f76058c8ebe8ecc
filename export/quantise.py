"""8-bit integers for the search network's costly 3x3 convolutions, for CPUs with integer dot products.

Weights are quantised per channel, activations per tensor, with ranges measured on crops of a clip.
Everything else stays in fp32: on a CPU a linear layer gains nothing once its input is quantised and its
output converted back, and the rest (stem, LayerNorm, softmax, ETM, the last layers of the head) is cheap
and sensitive to rounding. The template network runs once per target and stays in fp32 as well.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, List, Sequence

import numpy as np
import onnx

from asymtrack_edge.export.verify import search_inputs
from asymtrack_edge.geometry import Box
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

#: A convolution with fewer multiply-adds stays in fp32: it would save little, and it is near the output.
MIN_MULTIPLY_ADDS = 10_000_000
#: Crops taken, evenly spread over a clip that is long enough: at least this many, and fewer than twice as many.
LEAST_CROPS = 32


def quantise(folder: Path, manifest: Manifest, frames: Sequence[np.ndarray], box: Box) -> None:
    """Replaces ``search.onnx`` in ``folder`` by its int8 form.

    The folder holds fp32 models with byte input, as ``manifest`` says. ``frames`` (BGR uint8) are the clip to
    calibrate on, and ``box`` is the target in the first frame.
    """
    from onnxruntime import quantization

    every = max(1, (len(frames) - 1) // LEAST_CROPS)
    feeds = search_inputs(OnnxRuntimeBackend(folder, manifest), frames, box, every)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(feeds, None)

    path = folder / "search.onnx"
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))  # the tools recommend pre-processing that is done already
    try:
        quantization.quantize_static(
            str(path),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=costly_convolutions(onnx.load(str(path))),
            op_types_to_quantize=["Conv", "Softmax"],  # ONNX Runtime 1.23 needs the ranges of Softmax
        )
    finally:
        logging.disable(disabled)


def costly_convolutions(model: Any) -> List[str]:
    """Names of the ungrouped 3x3 convolutions with at least ``MIN_MULTIPLY_ADDS`` per crop."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    weights = {i.name: list(i.dims) for i in inferred.initializer}
    chosen = []
    for node in inferred.node:
        if node.op_type == "Conv" and weights.get(node.input[1], [])[2:] == [3, 3]:
            multiply_adds = np.prod(weights[node.input[1]]) * np.prod(shapes[node.output[0]][2:])
            if multiply_adds >= MIN_MULTIPLY_ADDS:
                chosen.append(node.name)
    return chosen
