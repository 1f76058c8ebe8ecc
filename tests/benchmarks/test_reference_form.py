"""The yardstick gives the model's own answers, so that only its time differs."""

from __future__ import annotations

import pytest
import torch

from asymtrack_edge.benchmarks.reference_form import ReferenceForm
from asymtrack_edge.variants import Variant
from tests.helpers import SMALL, filled_model, random_inputs

CASES = [
    SMALL,
    SMALL.with_(ope_stages=(1, 3), etm_stages=(2,)),
    SMALL.with_(etm_interaction="mhca"),
    SMALL.with_(prototype_attention=False),
]


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("fold_ope", [True, False])
def test_answers_are_the_models(variant: Variant, fold_ope: bool) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant, batch=2)
    reference = ReferenceForm(model, fold_ope)
    with torch.no_grad():
        wanted = model(template, search)
        got = reference(search, reference.template(template))
    torch.testing.assert_close(got.corners, wanted.corners, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.score_tl, wanted.score_tl, rtol=1e-4, atol=1e-3)


def test_six_convolutions_learn_as_the_model_does() -> None:
    model = filled_model(SMALL)
    template, search = random_inputs(SMALL)
    gradients = []
    for run in (
        lambda: model(template, search),
        lambda: _step(ReferenceForm(model, False), template, search),
    ):
        model.zero_grad()
        run().corners.sum().backward()
        enhancement = [p for n, p in model.named_parameters() if "rbr_conv" in n or "theta" in n]
        gradients.append([p.grad.clone() for p in enhancement if p.grad is not None])
    assert gradients[0]
    for model_gradient, reference_gradient in zip(*gradients):
        torch.testing.assert_close(reference_gradient, model_gradient, rtol=1e-3, atol=1e-6)


def _step(reference: ReferenceForm, template: torch.Tensor, search: torch.Tensor):  # type: ignore[no-untyped-def]
    return reference(search, reference.template(template))


def test_weights_are_shared() -> None:
    model = filled_model(SMALL)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in ReferenceForm(model).parameters()} == own
