"""Items of a batch do not see each other, gradients reach everything."""

from __future__ import annotations

import pytest
import torch

from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import SMALL, filled_model, random_inputs

DEEP = VARIANTS["S"].with_(template_size=64, search_size=128)
MHCA = SMALL.with_(etm_interaction="mhca")


@pytest.mark.parametrize("variant", [DEEP, SMALL, MHCA], ids=["S", "small", "mhca"])
def test_an_item_alone_gives_the_same(variant: Variant) -> None:
    model = filled_model(variant).double()
    template, search = (t.double() for t in random_inputs(variant, 3))
    with torch.no_grad():
        together = model(template, search)
        for i in range(3):
            alone = model(template[i : i + 1], search[i : i + 1])
            assert (together.corners[i] - alone.corners[0]).abs().max() < 1e-6
            assert torch.allclose(together.score_tl[i], alone.score_tl[0], rtol=1e-9, atol=1e-9)
            assert torch.allclose(together.score_br[i], alone.score_br[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", [DEEP, MHCA], ids=["S", "mhca"])
def test_gradients_reach_every_parameter(variant: Variant) -> None:
    """In evaluation mode: in training mode BatchNorm takes the biases before it out of the result."""
    model = filled_model(variant).double()
    template, search = (t.double() for t in random_inputs(variant, 2))
    prediction = model(template, search)
    (prediction.score_tl.square().sum() + prediction.score_br.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


def test_the_boxes_alone_train_the_template_selection() -> None:
    """The published code cuts the gradient of ``pre_kernels``; this network must not."""
    model = filled_model(SMALL)
    model(*random_inputs(SMALL, 2)).corners.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".pre_kernels." in n}
    assert len(gradients) == 4
    assert all(g is not None and g.abs().max() > 0 for g in gradients.values())
