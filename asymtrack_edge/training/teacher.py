"""A tracker as teacher: FEAR-XS (Borsuk et al., ECCV 2022), as two ONNX graphs run in torch.

The teacher sees the same crops as the network. Its response map says what else in the search region
looks like the template, which no box does; its template features say what the template is known by.
Both are read out of stage 3 of the network by small layers that only training has. Where a pair has no
label, the teacher's box is the label, if it is sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.errors import DatasetError, MissingDependencyError, UsageError
from asymtrack_edge.network import AsymTrack, Prediction
from asymtrack_edge.training.augmentation import normalisation
from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.variants import Variant

TEMPLATE_GRAPH, SEARCH_GRAPH = "fear_xs_init.onnx", "fear_xs_track.onnx"
#: Crops of the teacher in pixels, the stride of its maps, channels of its template features.
TEMPLATE, SEARCH, STRIDE, WIDTH = 128, 256, 16, 256
#: Peak of the response (0..1) from which the teacher is believed to see the target, and below which it is
#: believed not to. Of 192 pairs with boxes 93 % of those with the target reached the first, at a box of an IoU
#: above 0.5 in nine cases of ten, and 10 % of those with a stranger's template; only of these some, 4 %, were
#: below the second.
SURE, ABSENT = 0.98, 0.05


@dataclass(frozen=True)
class TeacherWeights:
    """Weights of the teacher's terms in the loss.

    Attributes:
        response: binary cross-entropy of the response map against the teacher's.
        features: cosine distance of the template features to the teacher's.
    """

    response: float = 4.0
    features: float = 1.0


class OnnxGraph(nn.Module):
    """An ONNX graph of convolutions and simple arithmetic as a torch module, for any batch.

    The leading dimension that a graph for one image has written into its Reshape nodes is replaced by the
    batch's.

    Args:
        path: the file.

    Raises:
        MissingDependencyError: onnx is not installed.
        DatasetError: the file is missing, damaged, or has an operator that is not known here.
    """

    OPERATORS = ("Add", "Concat", "Conv", "Exp", "MatMul", "Mul", "Relu", "Reshape", "Transpose")

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnx
            from onnx import numpy_helper
        except ImportError:
            raise MissingDependencyError("onnx", "train", "a teacher") from None
        if not path.is_file():
            raise DatasetError(f"{path.parent} holds no {path.name}: --teacher names the folder of both graphs")
        try:
            graph = onnx.load(str(path)).graph
        except Exception as error:  # protobuf's own, by version
            raise DatasetError(f"{path} is no ONNX file: {error}") from None
        unknown = {node.op_type for node in graph.node} - set(self.OPERATORS)
        if unknown:
            raise DatasetError(f"{path} has operators that a teacher may not have: {', '.join(sorted(unknown))}")
        self.outputs = [output.name for output in graph.output]
        self.shapes: Dict[str, List[int]] = {}
        self.constants: Dict[str, str] = {}
        for i, constant in enumerate(graph.initializer):
            value = torch.from_numpy(numpy_helper.to_array(constant).copy())
            if value.is_floating_point():
                self.constants[constant.name] = f"constant{i}"
                self.register_buffer(f"constant{i}", value)
            else:
                self.shapes[constant.name] = value.tolist()
        self.nodes: List[Tuple[str, List[str], str, Dict[str, Any]]] = [
            (
                node.op_type,
                list(node.input),
                node.output[0],
                {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
            )
            for node in graph.node
        ]

    def forward(self, **values: Tensor) -> List[Tensor]:
        """Takes the graph's inputs by name, each ``(B, ...)``, and returns its outputs in order."""
        batch = len(next(iter(values.values())))
        values.update({name: getattr(self, buffer) for name, buffer in self.constants.items()})
        for operator, names, output, attributes in self.nodes:
            if operator == "Reshape":
                values[output] = values[names[0]].reshape(batch, *self.shapes[names[1]][1:])
            else:
                values[output] = _apply(operator, [values[name] for name in names if name], attributes)
        return [values[name] for name in self.outputs]


def _apply(operator: str, inputs: List[Tensor], attributes: Dict[str, Any]) -> Tensor:
    x = inputs[0]
    if operator == "Conv":
        top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        bias = inputs[2] if len(inputs) > 2 else None
        strides, dilations = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
        return F.conv2d(x, inputs[1], bias, strides, (top, left), dilations, attributes.get("group", 1))
    if operator == "Concat":
        return torch.cat(inputs, attributes["axis"])
    if operator == "Transpose":
        return x.permute(attributes["perm"])
    simple: Dict[str, Any] = {
        "Add": torch.add,
        "Mul": torch.mul,
        "MatMul": torch.matmul,
        "Relu": torch.relu,
        "Exp": torch.exp,
    }
    return simple[operator](*inputs)


class Opinion(NamedTuple):
    """What the teacher says of a batch.

    Attributes:
        response: ``(B, 16, 16)`` in 0..1, how much each place of the search crop looks like the template.
        peak: ``(B,)``, its maximum.
        corners: ``(B, 4)``, the box at the maximum, as in ``Pairs``.
        features: ``(B, 256, 8, 8)`` of the template.
    """

    response: Tensor
    peak: Tensor
    corners: Tensor
    features: Tensor


class Teacher:
    """The teacher's two graphs on the training device.

    Args:
        folder: holds ``fear_xs_init.onnx`` and ``fear_xs_track.onnx``.
        variant: of the network that learns; its crops have to show what the teacher's do.
        device: where to compute.

    Raises:
        MissingDependencyError: onnx is not installed.
        DatasetError: a graph is missing or unusable.
        UsageError: the network's crops show another part of the frame than the teacher's.
    """

    def __init__(self, folder: Path, variant: Variant, device: torch.device) -> None:
        if (variant.template_factor, variant.search_factor) != (2.0, 4.0):
            raise UsageError("--teacher needs the search crops of the variant: leave out --search-size")
        self.template, self.search = (
            OnnxGraph(folder / name).to(device).eval().requires_grad_(False) for name in (TEMPLATE_GRAPH, SEARCH_GRAPH)
        )
        self.mean, self.std = (value[:, :, None] for value in normalisation(device))

    @torch.no_grad()
    def __call__(self, pairs: Pairs) -> Opinion:
        """Looks at the crops of a batch."""
        features = self.template(image=self._image(pairs.template, TEMPLATE))[0]
        box, logits = self.search(image=self._image(pairs.search, SEARCH), template_features=features)
        response = logits.float().sigmoid()[:, 0]
        peak, place = response.flatten(1).max(1)
        side = response.shape[-1]
        middle = torch.stack([place % side, place // side], 1) * STRIDE
        reach = box.float().flatten(2).gather(2, place[:, None, None].expand(-1, 4, 1))[..., 0]
        corners = torch.cat([middle - reach[:, :2], middle + reach[:, 2:]], 1) / SEARCH
        # The corners of pairs have the crop's middle at pixel (S - 1) / 2.
        return Opinion(response, peak, corners - 0.5 / pairs.search.shape[-1], features.float())

    def _image(self, crop: Tensor, size: int) -> Tensor:
        """Normalised crops as RGB 0..255 of the teacher's size."""
        image = crop.float() * self.std + self.mean
        if image.shape[-1] == size:
            return image
        return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)


def relabel(pairs: Pairs, opinion: Opinion) -> Pairs:
    """Gives labels to pairs that have none, and takes them from negatives that are none.

    A target that the teacher is sure to see is present, at its box; one that it does not see is absent;
    anything between stays unknown. A stranger's template that the teacher is sure to see makes no negative.
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
    """The network with the layers that read the teacher's answers out of its stage 3.

    Args:
        model: the network; its parameters are shared.
    """

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
        # Hardly any place shows the target.
        nn.init.constant_(self.readouts["response"][2].bias, -3.0)  # type: ignore[index, arg-type]

    def forward(self, template: Tensor, search: Tensor) -> Tuple[Prediction, Tensor, Tensor]:
        """Returns the prediction, response logits ``(B, X/16, X/16)``, template features ``(B, 256, Z/16, Z/16)``."""
        prediction, z, x = self.model.with_features(template, search)
        response = self.readouts["response"](x.permute(0, 3, 1, 2))[:, 0]
        return prediction, response, self.readouts["features"](z.permute(0, 3, 1, 2))


def teacher_loss(
    response: Tensor, features: Tensor, opinion: Opinion, weights: TeacherWeights
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """The weighted sum of the teacher's terms, and what to log (detached): ``response``, ``features``."""
    wanted = _fit(opinion.response[:, None], response)[:, 0]
    terms = {
        "response": F.binary_cross_entropy_with_logits(response.float(), wanted),
        "features": 1 - F.cosine_similarity(features.float(), _fit(opinion.features, features), dim=1).mean(),
    }
    loss = weights.response * terms["response"] + weights.features * terms["features"]
    return loss, {name: value.detach() for name, value in terms.items()}


def _fit(target: Tensor, like: Tensor) -> Tensor:
    """Resizes maps ``(B, C, H, W)`` to the last two axes of ``like``."""
    if target.shape[-2:] == like.shape[-2:]:
        return target
    return F.interpolate(target, size=like.shape[-2:], mode="bilinear", align_corners=False)
