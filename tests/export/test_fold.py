"""The folded, split networks answer as the trained model does."""

from __future__ import annotations

from typing import List

import pytest
import torch
from torch import Tensor

from asymtrack_edge.export.fold import fold, to_half
from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork, fold_input
from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS, Variant
from tests.helpers import SMALL, filled_model, random_inputs

CASES = [
    *VARIANTS.values(),
    SMALL.with_(etm_interaction="mhca"),
    SMALL.with_(prototype_attention=False),
    SMALL.with_(etm_stages=(2,), ope_stages=()),
    SMALL.with_(etm_stages=(1, 2, 3), ope_stages=(2, 3)),
]


def predict(folded: AsymTrack, input_format: str, template: Tensor, search: Tensor) -> Tensor:
    with torch.no_grad():
        state = TemplateNetwork(folded, input_format)(template)
        return SearchNetwork(folded, input_format)(search, *state)


@pytest.mark.parametrize("variant", CASES, ids=lambda v: f"{v.name}-{v.etm_interaction}-{v.ope_stages}")
def test_folded_equals_trained(variant: Variant) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant)
    folded = fold(model)
    with torch.no_grad():
        wanted = model(template, search)
        got = folded(template, search)
    torch.testing.assert_close(got.box, wanted.box, rtol=0, atol=2e-5)
    scale = float(wanted.score_tl.abs().max())
    torch.testing.assert_close(got.score_tl, wanted.score_tl, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(got.score_br, wanted.score_br, rtol=0, atol=2e-5 * scale)


def test_folding_leaves_the_trained_model_alone() -> None:
    model = filled_model(SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bytes_are_folded_into_the_stem() -> None:
    generator = torch.Generator().manual_seed(0)
    crops: List[Tensor] = [
        torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
        for side in (SMALL.template_size, SMALL.search_size)
    ]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    normalised = [(crop.flip(3).permute(0, 3, 1, 2) / 255 - mean) / std for crop in crops]
    bytes_in = fold(filled_model(SMALL))
    fold_input(bytes_in, UINT8_BGR)
    got, wanted = predict(bytes_in, UINT8_BGR, *crops), predict(fold(filled_model(SMALL)), FLOAT_RGB, *normalised)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert (wanted[:, 2:4].abs() > 1e-3).all()


def test_half_precision_is_close() -> None:
    folded = fold(filled_model(SMALL))
    template, search = random_inputs(SMALL)
    wanted = predict(folded, FLOAT_RGB, template, search)
    got = predict(to_half(folded), FLOAT_RGB, template, search)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :4], wanted[:, :4], rtol=0, atol=2e-2)
