"""Splitting: the folded model as two networks with plain tensors as inputs and outputs.

The template network runs once per target, the search network once per frame. The template state passes
between them as separate tensors (``Variant.state_shapes``).
"""

from __future__ import annotations

from typing import Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.manifest import FLOAT_RGB, PLATFORMS, UINT8_BGR, Manifest, TensorSpec, image_spec
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant


def fold_input(model: AsymTrack, input_format: str) -> None:
    """Folds scale and channel order of the input format into the stem, in place.

    The mean cannot be folded: the stem pads the normalised image with zeros. In fp16 the stem's 7x7 kernel with stride
    4 becomes a 3x3 kernel on tiles of 4x4 pixels: tensor cores need many input channels, not three.
    """
    if input_format == UINT8_BGR:
        stem = model.backbone.patch_embed.proj
        std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=stem.weight.device).view(1, 3, 1, 1) * 255
        weight = (stem.weight.data.float() / std).flip(1).to(stem.weight.dtype)
        if weight.dtype == torch.float16:
            tiles = F.pad(weight, (1, 4, 1, 4)).unflatten(3, (3, 4)).unflatten(2, (3, 4))
            weight = tiles.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
            stem.stride, stem.padding = (1, 1), (1, 1)
        stem.weight.data = weight.contiguous()


class _Network(nn.Module):
    mean: Tensor

    def __init__(self, model: AsymTrack, input_format: str) -> None:
        super().__init__()
        self.model = model
        self.as_bytes = input_format == UINT8_BGR
        weight = model.backbone.patch_embed.proj.weight
        self.dtype, self.in_tiles = weight.dtype, weight.shape[1] != 3
        mean = torch.tensor(IMAGE_MEAN[::-1]).repeat(weight.shape[1] // 3).view(-1, 1, 1) * 255
        self.register_buffer("mean", mean.to(self.dtype))

    def image(self, image: Tensor) -> Tensor:
        """Maps ``(B, S, S, 3)`` uint8 or ``(B, 3, S, S)`` float to ``(B, 3, S, S)`` or tiles ``(B, 48, S/4, S/4)``."""
        if not self.as_bytes:
            return image.to(self.dtype)
        if self.in_tiles:  # see fold_input
            side = image.shape[1] // 4
            image = image.reshape(-1, side, 4, side, 12).permute(0, 1, 3, 2, 4).flatten(3)
        return image.permute(0, 3, 1, 2).to(self.dtype) - self.mean


class TemplateNetwork(_Network):
    """Template crop to template state, as a tuple in the order of ``Variant.state_shapes``."""

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self.model.template(self.image(image)).values())


class SearchNetwork(_Network):
    """Search crop and template state to ``(B, 5)``: cx, cy, w, h in crop units, and the score."""

    grid: Tensor

    def __init__(self, model: AsymTrack, input_format: str) -> None:
        super().__init__(model, input_format)
        self.register_buffer("grid", _box_of_cells(model.variant.search_size // 32))  # 32 is the stride of the maps

    def forward(self, image: Tensor, *state: Tensor) -> Tensor:
        """See ``image`` for the shape; ``state`` is the output of the template network."""
        named: Dict[str, Tensor] = dict(zip(self.model.variant.state_shapes, state))
        corners, _ = self.model.score_maps(self.image(image), named)
        maps = torch.stack(corners, 1).float()
        probability = maps.flatten(2).softmax(-1)
        box = (probability.flatten(1).unsqueeze(1) * self.grid).sum(-1)
        return torch.cat([box, localisation_score(probability.view_as(maps))], 1)


#: The module of each network, by its name.
MODULES = {"template": TemplateNetwork, "search": SearchNetwork}


def _box_of_cells(side: int) -> Tensor:
    """The box ``(4, 2 * side * side)`` that each cell of both corner maps stands for.

    The sum of these boxes, weighted by the cells' probabilities, is the box between both maps' ``soft_argmax``.
    """
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten()])  # the position of each cell
    return torch.cat([torch.cat([cells / 2, cells / 2], 1), torch.cat([-cells, cells], 1)])


def localisation_score(probability: Tensor) -> Tensor:
    """Score ``(B, 1)`` in 0..1 from both corners' probabilities ``(B, 2, H, W)``.

    Each map's probability is summed over the 2x2 window that holds most of it: close to 1 when a
    corner is located (a corner between cells fills four of them), ``4 / (H * W)`` when the map is
    flat. The score is the geometric mean of the two sums.
    """
    windows = F.avg_pool2d(probability, 2, 1)
    # Pooling and a split, because a reduction on a GPU waits for memory to be cleared.
    top_left, bottom_right = F.max_pool2d(windows, int(windows.shape[-1])).flatten(1).split(1, 1)
    return (top_left * bottom_right).sqrt() * 4


def describe(
    variant: Variant,
    precision: str = "fp32",
    platform: str = "onnx",
    opset: int = PLATFORMS["onnx"][0],
    max_batch: int = 1,
    input_format: str = FLOAT_RGB,
) -> Manifest:
    """Describes the tensors of an export; files, provenance and verification are left empty."""
    half = "float16" if precision == "fp16" else "float32"
    # The kernels of ETM are computed and used in fp32.
    types = {name: "float32" if name.startswith("etm") else half for name in variant.state_shapes}
    return Manifest(
        variant=variant.name,
        precision=precision,
        platform=platform,
        opset=opset,
        max_batch=max_batch,
        input_format=input_format,
        template=image_spec(input_format, variant.template_size),
        search=image_spec(input_format, variant.search_size),
        state=tuple(TensorSpec(name, types[name], shape) for name, shape in variant.state_shapes.items()),
        output=TensorSpec("prediction", "float32", (5,)),
        template_factor=variant.template_factor,
        search_factor=variant.search_factor,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        files={},
    )


def example_inputs(manifest: Manifest, network: str, batch: int) -> Dict[str, Tensor]:
    """Zeros of the shapes and types of a network's inputs, by name."""
    specs, _ = manifest.tensors(network)
    return {spec.name: torch.zeros((batch, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in specs}
