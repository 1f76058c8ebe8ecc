"""A tracker as teacher: FEAR-XS (Borsuk et al., ECCV 2022), as two ONNX graphs run in torch.

The teacher sees the views that it was trained on: 1.4 and 5 times the box's width and height, resized to squares. Both
are cut out of the network's own crops. The teacher's response map shows what else in the search region looks like the
template, which no box can show; its template features show what it recognises the template by. Small layers that exist
only in training predict both from stage 3 of the network. If a pair has no label, the teacher's box is used, if sure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.errors import DatasetError, require
from asymtrack_edge.network import AsymTrack, Prediction
from asymtrack_edge.training.crops import mean_and_std
from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.variants import Variant

TEMPLATE_GRAPH, SEARCH_GRAPH = "fear_xs_init.onnx", "fear_xs_track.onnx"
#: Crops of the teacher in pixels, the stride of its maps, channels of its template features.
TEMPLATE, SEARCH, STRIDE, WIDTH = 128, 256, 16, 256
#: Sides of the teacher's views, divided by those of the box.
TEMPLATE_VIEW, SEARCH_VIEW = 1.4, 5.0
#: Peak of the response (0..1) from which the target counts as seen, and below which it counts as absent. Of 363
#: undeformed pairs of annotated clips, 85 % reached the first, 99 of 100 of these with a box of IoU above 0.5. Of 149
#: pairs with another target's template, 5 % reached the first, and 13 % were below the second.
SURE, ABSENT = 0.98, 0.05


def _conv(attributes: Dict[str, Any], x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    return F.conv2d(x, weight, bias, strides, (top, left), dilations, attributes.get("group", 1))


#: The operators by name: each computes its output from its attributes and its inputs.
OPERATORS: Dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "Concat": lambda attributes, *inputs: torch.cat(inputs, attributes["axis"]),
    "Conv": _conv,
    "Exp": lambda _, x: x.exp(),
    "MatMul": lambda _, a, b: a @ b,
    "Mul": lambda _, a, b: a * b,
    "Relu": lambda _, x: x.relu(),
    # A graph for one image has a fixed batch size, which is replaced by the real one.
    "Reshape": lambda _, x, shape: x.reshape(len(x), *shape[1:]),
    "Transpose": lambda attributes, x: x.permute(attributes["perm"]),
}


class OnnxGraph:
    """An ONNX graph of convolutions and simple arithmetic, run in torch on ``device`` for any batch.

    Raises ``DatasetError`` if the file is missing, damaged, or has an operator that is not supported here.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        onnx = require("onnx", "train", "a teacher")
        to_array = onnx.numpy_helper.to_array
        if not path.is_file():
            raise DatasetError(f"{path.parent} holds no {path.name}: --teacher names the folder of both graphs")
        try:
            graph = onnx.load(str(path)).graph
            graph.output[0]  # fails on an empty file, which loads as a graph
            values = {constant.name: torch.from_numpy(to_array(constant).copy()) for constant in graph.initializer}
        except Exception as error:  # protobuf's own; the type depends on its version
            raise DatasetError(f"{path} is not an ONNX file: {error}") from None
        if missing := {value.name for value in graph.input} - {"image", "template_features", *values}:
            raise DatasetError(f"{path} has inputs that a teacher does not have: {', '.join(sorted(missing))}")
        if unknown := {node.op_type for node in graph.node} - set(OPERATORS):
            raise DatasetError(f"{path} has operators that are not supported: {', '.join(sorted(unknown))}")
        self.outputs = [output.name for output in graph.output]
        self.constants: Dict[str, Any] = {}
        for name, value in values.items():
            if value.ndim == 4 and device.type == "cpu":
                # In this layout, convolutions on a CPU are twice as fast; their results keep it.
                value = value.contiguous(memory_format=torch.channels_last)
            self.constants[name] = value.to(device) if value.is_floating_point() else value.tolist()
        value_of = onnx.helper.get_attribute_value
        self.nodes = [
            (OPERATORS[node.op_type], list(node.input), node.output[0], {a.name: value_of(a) for a in node.attribute})
            for node in graph.node
        ]

    def __call__(self, **images: Tensor) -> List[Tensor]:
        """Takes the graph's inputs by name, each ``(B, ...)``, and returns its outputs in order."""
        values: Dict[str, Any] = {**images, **self.constants}
        for operator, inputs, output, attributes in self.nodes:
            values[output] = operator(attributes, *(values[name] for name in inputs if name))
        return [values[name] for name in self.outputs]


class Opinion(NamedTuple):
    """The teacher's output for a batch."""

    response: Tensor  #: ``(B, X/16, X/16)`` in 0..1, how much each position of the search crop looks like the template
    peak: Tensor  #: ``(B,)``, its maximum
    corners: Tensor  #: ``(B, 4)``, the box at the maximum, as in ``Pairs``
    features: Tensor  #: ``(B, 256, 8, 8)`` of the template
    view: Tensor  #: ``(B, 2)``, the part of the template crop that ``features`` cover: its sides over the crop's


class Teacher:
    """The graphs in ``folder`` (see ``OnnxGraph``) on the training device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.template, self.search = (OnnxGraph(folder / name, device) for name in (TEMPLATE_GRAPH, SEARCH_GRAPH))
        self.mean, self.std = (value[:, :, None] for value in mean_and_std(device))

    @torch.no_grad()
    def __call__(self, pairs: Pairs) -> Opinion:
        """Runs the teacher on the crops of a batch."""
        shape = torch.stack([pairs.aspect.sqrt(), pairs.aspect.rsqrt()], 1)
        view, around = shape * TEMPLATE_VIEW / Variant.template_factor, shape * SEARCH_VIEW / Variant.search_factor
        features = self.template(image=self._image(pairs.template, view, TEMPLATE))[0]
        box, logits = self.search(image=self._image(pairs.search, around, SEARCH), template_features=features)
        response = logits.float().sigmoid()
        peak, place = response.flatten(1).max(1)
        side = response.shape[-1]
        middle = torch.stack([place % side, place // side], 1) * STRIDE
        reach = box.float().flatten(2).gather(2, place[:, None, None].expand(-1, 4, 1))[..., 0]
        corners = torch.cat([middle - reach[:, :2], middle + reach[:, 2:]], 1) / SEARCH
        # In pairs, the centre of the crop is at pixel (S - 1) / 2.
        corners = (corners - 0.5) * around.repeat(1, 2) + 0.5 - 0.5 / pairs.search.shape[-1]
        response = _cells(response, 1 / around, pairs.search.shape[-1] // STRIDE)[:, 0]
        return Opinion(response, peak, corners, features.float(), view)

    def _image(self, crop: Tensor, view: Tensor, size: int) -> Tensor:
        """A view of normalised crops as RGB 0..255, filled with their mean colour where it leaves them."""
        image = crop.float() * self.std + self.mean
        mean = image.mean((2, 3), keepdim=True)
        return F.grid_sample(image - mean, _grid(size, 1.0, view), align_corners=False) + mean


def relabel(pairs: Pairs, opinion: Opinion) -> Pairs:
    """Labels the pairs that have no label, and removes the label of false negatives.

    A target that the teacher surely sees is present, at the teacher's box; one that it does not see is absent;
    anything between stays unknown. A negative whose template the teacher surely sees becomes unknown.
    """
    found, lost = opinion.peak >= SURE, opinion.peak < ABSENT
    unlabelled = ~pairs.known
    false = pairs.known & ~pairs.present & found
    return pairs._replace(
        corners=torch.where(unlabelled[:, None], opinion.corners, pairs.corners),
        present=torch.where(unlabelled, found, pairs.present),
        known=torch.where(unlabelled, found | lost, pairs.known) & ~false,
    )


class Student(nn.Module):
    """The network (shared, not copied), with the layers that predict the teacher's output from its stage 3."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.model = model
        width = model.variant.widths[2]
        self.readouts = nn.ModuleDict(
            {
                "response": nn.Sequential(nn.Conv2d(width, 64, 1), nn.ReLU(), nn.Conv2d(64, 1, 1)),
                "features": nn.Conv2d(width, WIDTH, 1),
            }
        )
        # Hardly any position shows the target.
        nn.init.constant_(self.readouts["response"][2].bias, -3.0)  # type: ignore[index, arg-type]

    def forward(self, template: Tensor, search: Tensor) -> Tuple[Prediction, Tensor, Tensor]:
        """Returns the prediction, response logits ``(B, X/16, X/16)``, template features ``(B, 256, Z/16, Z/16)``."""
        state, z = self.model.template_and_features(template)
        maps, x = self.model.score_maps(search, state)
        response = self.readouts["response"](x.permute(0, 3, 1, 2))[:, 0]
        return Prediction.of(maps), response, self.readouts["features"](z.permute(0, 3, 1, 2))


def teacher_loss(response: Tensor, features: Tensor, opinion: Opinion) -> Dict[str, Tensor]:
    """The losses of the read-outs against the teacher's output: ``response`` and ``features``; see ``Recipe``."""
    seen = _cells(features.float(), opinion.view, opinion.features.shape[-1])
    similar = F.cosine_similarity(seen, opinion.features, dim=1)
    entropy = F.binary_cross_entropy_with_logits(response.float(), opinion.response)
    return {"response": entropy, "features": 1 - similar.mean()}


def _grid(side: int, pixel: float, view: Tensor) -> Tensor:
    """Positions of view cells in their crops ``(B, side, side, 2)``, -1..1: where the first pixel of each cell lies."""
    place = (2 * torch.arange(side, device=view.device) + pixel) / side - 1  # F.affine_grid would be bfloat16 here
    x, y = (view[:, axis, None] * place for axis in (0, 1))
    return torch.stack([x[:, None].expand(-1, side, -1), y[..., None].expand(-1, -1, side)], -1)


def _cells(maps: Tensor, view: Tensor, side: int) -> Tensor:
    """Samples maps ``(B, C, N, N)`` of crops at the cells ``(B, C, side, side)`` of views ``(B, 2)`` of these crops."""
    grid = _grid(side, 1 / STRIDE, view) + (1 - 1 / STRIDE) / maps.shape[-1]  # grid_sample counts from a cell's centre
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
