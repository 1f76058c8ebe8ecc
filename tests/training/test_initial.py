"""What a run starts from: weights of its own variant, or of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asymtrack_edge.checkpoints import save_weights
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.run import load_initial
from asymtrack_edge.variants import VARIANTS
from tests.helpers import filled_model


def test_a_grown_network_answers_as_the_smaller_one_and_learns(tmp_path: Path) -> None:
    small = filled_model(VARIANTS["T"])
    save_weights(tmp_path / "t", small.state_dict(), {"variant": "T"}, half=False)
    large, other, smaller = (AsymTrack(VARIANTS[name]).eval() for name in "SBT")
    load_initial(large, tmp_path / "t")
    template, search = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 256, 256)
    expected, answer = small(template, search), large(template, search)
    assert torch.equal(answer.score_tl, expected.score_tl) and torch.equal(answer.corners, expected.corners)
    answer.corners.sum().backward()
    gamma = large.backbone.layers[2].blocks[2].gamma_1  # type: ignore[index, union-attr]
    assert gamma.eq(0).all() and gamma.grad.abs().sum() > 0
    # S and B have the same tensors; a larger network does not become a smaller one.
    save_weights(tmp_path / "s", large.state_dict(), {"variant": "S"}, half=False)
    load_initial(other, tmp_path / "s")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in large.state_dict().items())
    with pytest.raises(CheckpointError, match="more encoder blocks than T"):
        load_initial(smaller, tmp_path / "s")
