"""The folded, split networks answer as the trained model does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asymtrack_edge.export.fold import fold
from asymtrack_edge.export.split import localisation_score
from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import SMALL, filled_model, random_inputs

CASES = [
    *VARIANTS.values(),
    replace(SMALL, etm_stages=(2,), ope_stages=()),
    replace(SMALL, etm_stages=(1, 2, 3), ope_stages=(2, 3)),
]


@pytest.mark.parametrize("variant", CASES, ids=lambda v: f"{v.name}-{v.etm_stages}-{v.ope_stages}")
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


def test_the_score_is_the_geometric_mean_of_the_heaviest_cells_of_both_corners() -> None:
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 0, 1:3, 1:3], maps[0, 1] = 0.25, 1 / 64  # all of it in 2 x 2 cells; even
    assert localisation_score(maps).item() == pytest.approx(0.25)
