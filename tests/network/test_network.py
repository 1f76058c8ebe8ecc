"""The network against the published implementation's output, and with every switch of the paper's Table 4."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict

import numpy as np
import pytest
import torch
from torch import Tensor

from asymtrack_edge.benchmarks.reference_form import ReferenceForm
from asymtrack_edge.network.layers import DepthwiseConv
from asymtrack_edge.variants import VARIANTS, Variant
from tests.helpers import SMALL, filled_model, golden_answers, random_inputs


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", "TSB")
@torch.no_grad()
def test_agrees_with_the_published_implementation(name: str) -> None:
    model = filled_model(VARIANTS[name])
    theirs = {key: torch.from_numpy(np.asarray(value)) for key, value in golden_answers(name).items()}
    template, search = random_inputs(VARIANTS[name])
    state = model.template(template)
    x = model.backbone.patch_embed(search.permute(0, 2, 3, 1))
    for layer, features in zip(model.backbone.layers, (None, "features_stride16", "features_stride32")):
        x = layer.downsample(layer(x, state))
        assert features is None or relative(x, theirs[features]) < 1e-4
    prediction = model.search(search, state)
    for key in ("box_cxcywh", "box_cxcywh_unfolded"):
        assert (prediction.box[0] - theirs[key]).abs().max() < 1e-5
    assert relative(prediction.score_tl, theirs["score_tl"][:, 0]) < 1e-4
    assert relative(prediction.score_br, theirs["score_br"][:, 0]) < 1e-4


SWITCHES: Dict[str, Dict[str, Any]] = {
    "published": {},
    "depths of S": {"depths": (2, 2, 3)},
    "no ETM": {"etm_stages": ()},
    "ETM in 3": {"etm_stages": (3,)},
    "ETM in 1, 2, 3": {"etm_stages": (1, 2, 3)},
    "no OPE": {"ope_stages": ()},
    "OPE in 1, 2": {"ope_stages": (1, 2)},
    "neither": {"etm_stages": (), "ope_stages": ()},
}


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_switches(changes: Dict[str, Any]) -> None:
    """Gradients reach every parameter, items of a batch are independent, every template feature affects the box."""
    variant = replace(SMALL, **changes)
    # In evaluation mode, because in training mode BatchNorm cancels the biases before it.
    model = filled_model(variant).double()
    template, search = (t.double() for t in random_inputs(variant, 2))
    together = model(template, search)
    (together.score_tl.square().sum() + together.score_br.square().sum() + together.corners.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-12, name
    with torch.no_grad():
        for i in range(2):
            for ours, alone in zip(together, model(template[i : i + 1], search[i : i + 1])):
                assert torch.allclose(ours[i], alone[0], rtol=1e-6, atol=1e-6)
        state, other = model.template(template), model.template(template.flip(-1) * 0.5)
        for name in state:
            assert not torch.equal(model.search(search, {**state, name: other[name]}).box, together.box), name
    assert [(name, tuple(tensor.shape[1:])) for name, tensor in state.items()] == list(variant.state_shapes.items())


def test_gradients_in_bfloat16_on_a_cpu_are_close_to_fp32() -> None:
    torch.manual_seed(0)
    conv = DepthwiseConv(8, 7)
    x, above = torch.randn(2, 8, 9, 12).contiguous(memory_format=torch.channels_last), torch.randn(2, 8, 9, 12)
    found = []
    for kind in (torch.float32, torch.bfloat16):
        given = x.detach().to(kind).requires_grad_()
        found.append(torch.autograd.grad(conv(given), (given, *conv.parameters()), above.to(kind)))
    for exact, ours in zip(*found):
        torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


@pytest.mark.parametrize("variant", [SMALL, replace(SMALL, ope_stages=(1, 3), etm_stages=(2,))])
def test_the_reference_form_gives_the_models_predictions(variant: Variant) -> None:
    model = filled_model(variant)
    template, search = random_inputs(variant, batch=2)
    reference = ReferenceForm(model)
    with torch.no_grad():
        wanted = model(template, search)
        got = reference(search, reference.template(template))
    torch.testing.assert_close(got.corners, wanted.corners, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.score_tl, wanted.score_tl, rtol=1e-4, atol=1e-3)
