"""Every switch of the paper's Tables 4 and 5 gives a network that builds, runs and learns."""

from __future__ import annotations

from typing import Any, Dict

import pytest
import torch

from asymtrack_edge.errors import UsageError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL, filled_model, random_inputs

SWITCHES: Dict[str, Dict[str, Any]] = {
    "published": {},
    "no ETM": {"etm_stages": ()},
    "ETM in 3": {"etm_stages": (3,)},
    "ETM in 1, 2, 3": {"etm_stages": (1, 2, 3)},
    "cross-attention in 1, 2, 3": {"etm_interaction": "mhca", "etm_stages": (1, 2, 3)},
    "no prototype attention": {"prototype_attention": False},
    "no prototype attention, cross-attention": {"prototype_attention": False, "etm_interaction": "mhca"},
    "no OPE": {"ope_stages": ()},
    "OPE in 1, 2": {"ope_stages": (1, 2)},
    "neither": {"etm_stages": (), "ope_stages": ()},
}
switches = pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())


@switches
def test_learns(changes: Dict[str, Any]) -> None:
    """A step against the gradient lowers the loss by about as much as the gradient promises."""
    variant = SMALL.with_(**changes)
    model = filled_model(variant).double().train()
    template, search = (t.double() for t in random_inputs(variant, 2))
    target = torch.tensor([0.25, 0.25, 0.75, 0.75])

    def loss() -> torch.Tensor:
        return (model(template, search).corners - target).square().sum()

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    size = torch.stack([gradient.norm() for _, gradient in gradients]).norm()
    assert torch.isfinite(size)
    assert size > 1e-3
    step = 1e-4 / size  # so that the loss should fall by 0.0001
    with torch.no_grad():
        for parameter, gradient in gradients:
            parameter.sub_(step * gradient / size)
        after = loss()
    assert 0.9e-4 < before - after < 1.1e-4


@switches
def test_the_template_reaches_the_box_as_declared(changes: Dict[str, Any]) -> None:
    variant = SMALL.with_(**changes)
    model = filled_model(variant)
    template, search = random_inputs(variant, 2)
    with torch.no_grad():
        state = model.template(template)
        other = model.template(template.flip(-1) * 0.5)
        box = model.search(search, state).box
        for name in state:
            assert not torch.equal(model.search(search, {**state, name: other[name]}).box, box), name
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in state.items()}
    assert shapes == variant.state_shapes and list(shapes) == list(variant.state_shapes)


@pytest.mark.parametrize(
    "changes",
    [{"etm_stages": (4,)}, {"ope_stages": (0,)}, {"etm_interaction": "sum"}, {"search_size": 250}],
    ids=str,
)
def test_impossible_switches_are_refused(changes: Dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        VARIANTS["T"].with_(**changes)


@pytest.mark.parametrize("name", "TSB")
def test_folded_size_is_the_published_one(name: str) -> None:
    """OPE's three kernels and theta become one kernel; the paper counts that form."""
    variant = VARIANTS[name]
    with torch.device("meta"):
        stored = sum(p.numel() for p in AsymTrack(variant).parameters())
    folded = stored - sum(2 * 9 * width**2 + 1 for width in (32, 64, 128))
    assert round(folded / 1e6, 4) == {"T": 3.0533, "S": 3.3634, "B": 3.3634}[name]
    assert abs(folded / 1e6 - variant.published.params_m) < 0.005
