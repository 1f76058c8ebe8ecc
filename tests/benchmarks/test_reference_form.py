"""The yardstick gives the model's own answers, so that only its time differs."""

from __future__ import annotations

import pytest
import torch

from asymtrack_edge.benchmarks.reference_form import ReferenceForm
from asymtrack_edge.variants import Variant
from tests.helpers import SMALL, filled_model, random_inputs


@pytest.mark.parametrize("variant", [SMALL, SMALL.with_(ope_stages=(1, 3), etm_stages=(2,))])
def test_answers_are_the_models(variant: Variant) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant, batch=2)
    reference = ReferenceForm(model)
    with torch.no_grad():
        wanted = model(template, search)
        got = reference(search, reference.template(template))
    torch.testing.assert_close(got.corners, wanted.corners, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.score_tl, wanted.score_tl, rtol=1e-4, atol=1e-3)
