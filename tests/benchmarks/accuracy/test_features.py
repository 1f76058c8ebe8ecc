"""asymtrack-eval features."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.runtime.sources.clip import default_clip

torch = pytest.importorskip("torch")


def test_maps_with_ope_are_those_without_and_what_ope_adds():
    from asymtrack_edge.benchmarks.accuracy.probes import feature_maps
    from asymtrack_edge.checkpoints import load_model
    from asymtrack_edge.network.layers import PerceptionEnhancement
    from asymtrack_edge.variants import VARIANTS

    model = load_model(None, VARIANTS["T"])
    frames, box = default_clip(2)
    search, maps = feature_maps(model, frames, box)
    assert search.shape == (256, 256, 3) and sorted(maps) == [1, 2, 3]
    sizes = [with_ope.shape for _, with_ope in maps.values()]
    assert sizes == [(side, side, width) for side, width in zip((64, 32, 16), VARIANTS["T"].widths)]
    (ope,) = (block for block in model.backbone.layers[0].blocks if isinstance(block, PerceptionEnhancement))
    without, with_ope = maps[1]  # before it nothing differs
    with torch.inference_mode():
        np.testing.assert_allclose(ope(torch.from_numpy(without)[None])[0], with_ope, atol=1e-5)
    assert np.abs(with_ope - without).max() > 0.01


def test_command_draws_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["features", "T"]) == 0
    assert cv2.imread("features.png").std() > 0
    assert main(["features", "T", "--output", "x.jpg"]) == 2 and ".png" in capsys.readouterr().err
    assert main(["features", str(tmp_path)]) == 2 and "give T, S, B or the checkpoint" in capsys.readouterr().err
