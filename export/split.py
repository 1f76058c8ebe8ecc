"""Splitting: the folded model as two networks with plain tensors in and out.

The template network runs once per target; the search network once per frame. What passes between
them is the template state, tensor by tensor (``Variant.state_shapes``).
"""

from __future__ import annotations

from typing import Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR, Manifest, TensorSpec
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant

OUTPUT = "prediction"
IMAGE = "image"


class ImageInput(nn.Module):
    """Turns crops of the given input format into what the stem takes.

    For ``UINT8_BGR`` the mean is subtracted here; scale and channel order are folded into the stem's
    convolution (``fold_input``). The mean cannot be: the stem pads the normalised image with zeros.
    """

    mean: Tensor

    def __init__(self, input_format: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.uint8 = input_format == UINT8_BGR
        self.dtype = dtype
        mean = torch.tensor(IMAGE_MEAN[::-1]).view(3, 1, 1) * 255
        self.register_buffer("mean", mean.to(dtype))

    def forward(self, image: Tensor) -> Tensor:
        """``(B, S, S, 3)`` uint8 or ``(B, 3, S, S)`` float to ``(B, 3, S, S)``."""
        if not self.uint8:
            return image.to(self.dtype)
        return image.permute(0, 3, 1, 2).to(self.dtype) - self.mean


def fold_input(model: AsymTrack, input_format: str) -> None:
    """Folds scale and channel order of the input format into the stem, in place."""
    if input_format == UINT8_BGR:
        weight = model.backbone.patch_embed.proj.weight
        std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=weight.device).view(1, 3, 1, 1) * 255
        weight.data = (weight.data.float() / std).flip(1).to(weight.dtype).contiguous()


class TemplateNetwork(nn.Module):
    """Template crop to template state, as a tuple in the order of ``Variant.state_shapes``."""

    def __init__(self, model: AsymTrack, input_format: str) -> None:
        super().__init__()
        self.model = model
        self.image = ImageInput(input_format, model.backbone.patch_embed.proj.weight.dtype)

    def forward(self, image: Tensor) -> Tuple[Tensor, ...]:
        """See ``ImageInput`` for the shape of ``image``."""
        return tuple(self.model.template(self.image(image)).values())


class SearchNetwork(nn.Module):
    """Search crop and template state to ``(B, 5)``: cx, cy, w, h in crop units, and the score."""

    def __init__(self, model: AsymTrack, input_format: str) -> None:
        super().__init__()
        self.model = model
        self.image = ImageInput(input_format, model.backbone.patch_embed.proj.weight.dtype)

    def forward(self, image: Tensor, *state: Tensor) -> Tensor:
        """See ``ImageInput`` for the shape of ``image``; the state as the template network gave it."""
        named: Dict[str, Tensor] = dict(zip(self.model.variant.state_shapes, state))
        prediction = self.model.search(self.image(image), named)
        score = localisation_score(prediction.score_tl, prediction.score_br)
        return torch.cat([prediction.box.float(), score], 1)


def localisation_score(score_tl: Tensor, score_br: Tensor) -> Tensor:
    """Score ``(B, 1)`` in 0..1 from the corner maps ``(B, H, W)`` before softmax.

    Each map's probability is summed over the 2x2 window that holds most of it: close to 1 when a
    corner is located (a corner between cells fills four of them), ``4 / (H * W)`` when the map is
    flat. The score is the geometric mean of both corners'.
    """
    maps = torch.stack([score_tl, score_br], 1).float()
    probability = maps.flatten(2).softmax(-1).view_as(maps)
    peak = F.avg_pool2d(probability, 2, 1).amax((2, 3)) * 4
    return (peak[:, :1] * peak[:, 1:]).sqrt()


def describe(
    variant: Variant,
    precision: str = "fp32",
    platform: str = "onnx",
    opset: int = 17,
    max_batch: int = 1,
    input_format: str = FLOAT_RGB,
) -> Manifest:
    """Describes the tensors of an export; files, provenance and verification are left empty.

    In an fp16 export the kernels of ETM stay fp32: they are computed and used there.
    """

    def image(size: int) -> TensorSpec:
        if input_format == UINT8_BGR:
            return TensorSpec(IMAGE, "uint8", (size, size, 3))
        return TensorSpec(IMAGE, "float32", (3, size, size))

    def state_dtype(name: str) -> str:
        return "float16" if precision == "fp16" and not name.startswith("etm") else "float32"

    return Manifest(
        variant=variant.name,
        precision=precision,
        target=platform,
        opset=opset,
        max_batch=max_batch,
        input_format=input_format,
        template=image(variant.template_size),
        search=image(variant.search_size),
        state=tuple(TensorSpec(name, state_dtype(name), shape) for name, shape in variant.state_shapes.items()),
        output=TensorSpec(OUTPUT, "float32", (5,)),
        template_factor=variant.template_factor,
        search_factor=variant.search_factor,
        mean=IMAGE_MEAN,
        std=IMAGE_STD,
        files={},
    )


def example_inputs(manifest: Manifest, batch: int) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Zeros of the right shapes and types: the inputs of the template network and of the search network."""

    def zeros(*specs: TensorSpec) -> Dict[str, Tensor]:
        return {spec.name: torch.zeros((batch, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in specs}

    return zeros(manifest.template), zeros(manifest.search, *manifest.state)
