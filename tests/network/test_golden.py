"""The network against the published implementation's output."""

from __future__ import annotations

from typing import Dict

import numpy as np
import pytest
import torch
from torch import Tensor

from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS
from tests.helpers import filled_model, golden_answers, golden_inputs, official_shapes


def forward(model: AsymTrack, template: Tensor, search: Tensor) -> Dict[str, Tensor]:
    with torch.no_grad():
        state = model.template(template)
        x = model.backbone.patch_embed(search.permute(0, 2, 3, 1))
        for layer in model.backbone.layers[:2]:
            x = layer.downsample(layer(x, state))
        stride16 = x  # what enters stage 3
        last = model.backbone.layers[2]
        stride32 = last.downsample(last(x, state))
        prediction = model.search(search, state)
    return {
        "stride16": stride16,
        "stride32": stride32,
        "score_tl": prediction.score_tl,
        "score_br": prediction.score_br,
        "box": prediction.box,
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", "TSB")
def test_agrees_with_the_published_implementation(name: str) -> None:
    variant = VARIANTS[name]
    ours = forward(filled_model(variant), *golden_inputs(variant))
    theirs = {key: torch.from_numpy(np.asarray(value)) for key, value in golden_answers(name).items()}
    for key in ("box_cxcywh", "box_cxcywh_unfolded"):
        assert (ours["box"][0] - theirs[key]).abs().max() < 1e-5
    for key in ("stride16", "stride32"):
        assert relative(ours[key], theirs[f"features_{key}"]) < 1e-4
    for key in ("score_tl", "score_br"):
        assert relative(ours[key], theirs[key][:, 0]) < 1e-4


@pytest.mark.parametrize("name", "TSB")
def test_names_and_shapes_are_the_published_ones(name: str) -> None:
    ours = {key: tuple(v.shape) for key, v in AsymTrack(VARIANTS[name]).state_dict().items()}
    theirs = official_shapes(name)
    assert all(theirs[key] == shape for key, shape in ours.items())
    unused = {key.split(".blocks.")[1].split(".")[1] for key in set(theirs) - set(ours)}
    assert unused == {"post_kernels", "downsample"}
