"""The network against the published implementation's answers and against a literal second writing."""

from __future__ import annotations

from typing import Dict

import numpy as np
import pytest
import torch
from torch import Tensor

from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import filled_model, golden_answers, golden_inputs, official_shapes, random_inputs
from tests.network import literal


def forward(model: AsymTrack, template: Tensor, search: Tensor) -> Dict[str, Tensor]:
    with torch.no_grad():
        state = model.template(template)
        x = model.backbone.patch_embed(search.permute(0, 2, 3, 1))
        for layer in model.backbone.layers[:2]:
            x = layer(x, state)
        stride16 = x  # what enters stage 3
        stride32 = model.backbone.layers[2](x, state)
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


@pytest.mark.parametrize(
    ("variant", "seed", "batch"),
    [
        (VARIANTS["T"], 1, 3),
        (VARIANTS["T"].with_(template_size=64, search_size=128), 2, 3),
        (VARIANTS["T"].with_(template_size=96, search_size=64), 3, 3),
        (VARIANTS["S"].with_(template_size=64, search_size=128), 1, 2),
    ],
    ids=["T", "T-64-128", "T-96-64", "S-64-128"],
)
def test_agrees_with_a_literal_writing(variant: Variant, seed: int, batch: int) -> None:
    """In double precision, so that nothing but the order of summation may differ."""
    model = filled_model(variant, seed).double()
    template, search = (t.double() for t in random_inputs(variant, batch, seed + 100))
    theirs = literal.forward(model.state_dict(), variant.depths, template, search)
    ours = forward(model, template, search)
    for key in ("stride16", "stride32", "score_tl", "score_br"):
        assert relative(ours[key], theirs[key]) < 1e-10, key
    # The soft-argmax itself is always in fp32.
    assert (ours["box"] - theirs["box"]).abs().max() < 1e-6


def test_the_literal_writing_agrees_with_the_published_implementation() -> None:
    variant = VARIANTS["T"]
    answers = golden_answers("T")
    found = literal.forward(filled_model(variant).state_dict(), variant.depths, *golden_inputs(variant))
    assert np.abs(found["box"][0].numpy() - answers["box_cxcywh"]).max() < 1e-5
    assert relative(found["stride16"], torch.from_numpy(answers["features_stride16"])) < 1e-4
