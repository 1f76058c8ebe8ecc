"""The folded, split networks answer as the trained model does."""

from __future__ import annotations

from typing import List

import pytest
import torch
from torch import Tensor

from asymtrack_edge.export.fold import fold
from asymtrack_edge.export.split import SearchNetwork, TemplateNetwork, fold_input
from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS, Variant
from tests.helpers import SMALL, filled_model, random_inputs

CASES = [
    *VARIANTS.values(),
    SMALL.with_(etm_interaction="mhca"),
    SMALL.with_(prototype_attention=False),
    SMALL.with_(etm_stages=(2,), ope_stages=()),
    SMALL.with_(etm_stages=(1, 2, 3), ope_stages=(2, 3)),
]


@pytest.mark.parametrize("variant", CASES, ids=lambda v: f"{v.name}-{v.etm_interaction}-{v.ope_stages}")
def test_folded_equals_trained(variant: Variant) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant)
    with torch.no_grad():
        wanted = model(template, search)
        got = fold(model)(template, search)
        assert torch.equal(model(template, search).box, wanted.box), "the trained model is left alone"
    torch.testing.assert_close(got.box, wanted.box, rtol=0, atol=2e-5)
    scale = float(wanted.score_tl.abs().max())
    torch.testing.assert_close(got.score_tl, wanted.score_tl, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(got.score_br, wanted.score_br, rtol=0, atol=2e-5 * scale)


def test_bytes_are_folded_into_the_stem() -> None:
    generator = torch.Generator().manual_seed(0)
    crops: List[Tensor] = [
        torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, generator=generator)
        for side in (SMALL.template_size, SMALL.search_size)
    ]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    normalised = [(crop.flip(3).permute(0, 3, 1, 2) / 255 - mean) / std for crop in crops]
    predictions = []
    for input_format, (template, search) in ((UINT8_BGR, crops), (FLOAT_RGB, normalised)):
        folded = fold(filled_model(SMALL))
        fold_input(folded, input_format)
        with torch.no_grad():
            state = TemplateNetwork(folded, input_format)(template)
            predictions.append(SearchNetwork(folded, input_format)(search, *state))
    torch.testing.assert_close(*predictions, rtol=0, atol=2e-5)
    assert (predictions[0][:, 2:4].abs() > 1e-3).all()
