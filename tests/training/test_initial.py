"""What a run starts from: weights of its own variant, or of a smaller one."""

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


def saved(path: Path, name: str) -> AsymTrack:
    model = filled_model(VARIANTS[name])
    save_weights(path, model.state_dict(), {"variant": name}, half=False)
    return model


def test_a_grown_network_answers_as_the_smaller_one_and_learns(tmp_path: Path) -> None:
    small = saved(tmp_path / "t.safetensors", "T").eval()
    for name in ("S", "B"):
        torch.manual_seed(3)
        large = AsymTrack(VARIANTS[name]).eval()
        load_initial(large, tmp_path / "t.safetensors")
        # T's own crop sizes: the network is convolutional, and B's answers at 384 would cost seconds.
        template, search = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 256, 256)
        with torch.no_grad():
            expected, answer = small(template, search), large(template, search)
        assert torch.equal(answer.score_tl, expected.score_tl)
        assert torch.equal(answer.corners, expected.corners)
    large(template, search).corners.sum().backward()
    gamma = large.backbone.layers[2].blocks[2].gamma_1  # type: ignore[index, union-attr]
    assert gamma.eq(0).all() and gamma.grad.abs().sum() > 0


def test_s_and_b_take_each_others(tmp_path: Path) -> None:
    small = saved(tmp_path / "s.safetensors", "S")
    large = AsymTrack(VARIANTS["B"])
    load_initial(large, tmp_path / "s.safetensors")
    assert all(torch.equal(value, large.state_dict()[name]) for name, value in small.state_dict().items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "s.safetensors", "S")
    with pytest.raises(CheckpointError, match="more encoder blocks than T"):
        load_initial(AsymTrack(VARIANTS["T"]), tmp_path / "s.safetensors")
