"""Weights a run starts from: of its own variant, or of a smaller one that it outgrows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict

import torch
from torch import Tensor

from asymtrack_edge.checkpoints import load_weights, open_checkpoint
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import Variant, get_variant

_BLOCK = re.compile(r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.(.+)")


def load_initial(model: AsymTrack, path: Path) -> None:
    """Loads a file of weights into ``model``.

    Weights of another variant are taken where the model has all their blocks: T grows into S or B,
    and S and B, whose tensors are the same, into each other. An encoder block that the file does not
    have keeps its random weights and starts with ``gamma_1 = 0``: it passes its input on, so that the
    grown network answers at first exactly as the smaller one.

    Raises:
        CheckpointError: the file is no checkpoint, or has blocks for which the model has no place.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file, such as {path / 'weights.safetensors'}")
    variants = open_checkpoint(path).variants
    if not variants or model.variant.name in variants:
        model.load_state_dict(load_weights(path, model.variant))
        return
    source = get_variant(variants[0])
    if any(have > room for have, room in zip(source.depths, model.variant.depths)):
        raise CheckpointError(
            f"{path} holds weights of variant {source.name}, which has more encoder blocks than "
            f"{model.variant.name}: start from weights of {model.variant.name}"
        )
    model.load_state_dict(grow(load_weights(path, source), source, model))


def grow(weights: Dict[str, Tensor], source: Variant, model: AsymTrack) -> Dict[str, Tensor]:
    """Weights for ``model`` made of those of a variant with fewer encoder blocks; see ``load_initial``."""
    grown = {name: value.clone() for name, value in model.state_dict().items()}
    for stage, (have, room) in enumerate(zip(source.depths, model.variant.depths)):
        for block in range(have, room):
            grown[f"backbone.layers.{stage}.blocks.{block}.gamma_1"].zero_()
    for name, value in weights.items():
        match = _BLOCK.fullmatch(name)
        if match:
            stage, block = int(match.group(1)), int(match.group(2))
            if block >= source.depths[stage]:
                # ETM, OPE and attention come after the encoder blocks in one list with them.
                block += model.variant.depths[stage] - source.depths[stage]
            name = f"backbone.layers.{stage}.blocks.{block}.{match.group(3)}"
        grown[name] = value.to(torch.float32) if value.is_floating_point() else value
    return grown
