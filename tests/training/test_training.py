"""The loop: overfitting, resuming, diverging; its state, its recipes and its losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from safetensors.torch import load_file

from asymtrack_edge.checkpoints import load_weights
from asymtrack_edge.errors import CheckpointError, UsageError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.crops import Augmentation
from asymtrack_edge.training.imagery import load_pool
from asymtrack_edge.training.log import read_log
from asymtrack_edge.training.loop import (
    GIOU,
    L1,
    DivergedError,
    Trainer,
    corner_targets,
    iou_and_giou,
    make_state,
    tracking_loss,
)
from asymtrack_edge.training.pairs import Pairs, PairSampler
from asymtrack_edge.training.recipes import PAPER, PRESETS, SMALL, Recipe
from asymtrack_edge.training.run import RunConfig
from asymtrack_edge.training.state import Guard, RunState, has_state
from asymtrack_edge.variants import VARIANTS, Variant
from tests.training.conftest import random_pairs

CPU = torch.device("cpu")


def state_of(variant: Variant, recipe: Recipe) -> RunState:
    torch.manual_seed(0)
    return make_state(AsymTrack(variant), recipe)


def short(recipe: Recipe, steps: int) -> Recipe:
    """``recipe`` at batch 2, for ``steps`` steps."""
    return replace(recipe, batch=2, pairs_per_epoch=2, epochs=steps, warmup=1)


def test_small_recipe_overfits_eight_pairs(collection: Path, tiny: Variant, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=8, pairs_per_epoch=8, epochs=250, warmup=5, lr=1e-3)
    # The corner maps reach (side - 1) / side of the crop, so the targets stay near its middle.
    plain = Augmentation(centre_jitter=0.6, size_jitter=0.1, stills=0.5)
    fixed = PairSampler(load_pool([collection], 128), tiny, plain).draw(8, 0)
    state = state_of(tiny, recipe)
    seen: List[float] = []

    def draw(batch: int, step: int) -> Pairs:
        if step % 10 == 0:
            with torch.no_grad():
                prediction = state.model(fixed.template, fixed.search)
            seen.append(float(iou_and_giou(prediction.corners, fixed.corners)[0].mean()))
            trainer.stop = seen[-1] > 0.9
        return fixed

    trainer = Trainer(state, draw, recipe, tmp_path)
    assert not trainer.run() and seen[0] < 0.5


def test_resuming_is_bit_exact(collection: Path, mini: Variant, tmp_path: Path) -> None:
    pool = load_pool([collection], 128)
    recipe = short(SMALL, 6)

    def run(folder: Path, steps: int) -> RunState:
        state = state_of(mini, recipe)
        if has_state(folder):
            state.load(folder)
        sampler = PairSampler(pool, mini, recipe.augmentation, seed=7)

        def draw(batch: int, step: int) -> Pairs:
            trainer.stop = step + 1 == steps
            return sampler.draw(batch, step)

        trainer = Trainer(state, draw, recipe, folder)
        trainer.run()
        return state

    whole = run(tmp_path / "whole", 6)
    assert run(tmp_path / "parts", 3).step == 3
    parts = run(tmp_path / "parts", 6)
    assert whole.step == parts.step == 6
    assert whole.guard == parts.guard
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
        assert torch.equal(whole.ema[name], parts.ema[name]), name
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimiser.state[a][moment], parts.optimiser.state[b][moment])


SIGNALS = """
import signal
from asymtrack_edge.training.loop import stop_signals

before = signal.getsignal(signal.SIGTERM)
with stop_signals() as signals:
    signal.raise_signal(signal.SIGTERM)
    assert signals
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
assert signal.getsignal(signal.SIGTERM) is before
"""


def test_a_signal_is_a_wish_to_stop_and_a_second_interrupts() -> None:
    # In a process of its own: handlers belong to the main thread, and a test may run in another.
    ended = subprocess.run([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE, text=True, check=True)
    assert ended.stdout == "interrupted\n"


def test_a_state_of_another_variant_or_damaged_is_refused(mini: Variant, tmp_path: Path) -> None:
    state_of(mini, SMALL).save(tmp_path)
    with pytest.raises(CheckpointError, match="--variant"):
        state_of(VARIANTS["S"], SMALL).load(tmp_path)
    (tmp_path / "model-0.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cannot resume"):
        state_of(mini, SMALL).load(tmp_path)


def test_a_kill_while_saving_leaves_the_old_state(mini: Variant, tmp_path: Path, monkeypatch: Any) -> None:
    state = state_of(mini, SMALL)
    state.save(tmp_path)
    state.step = 9
    replaced = os.replace

    def die(source: Any, target: Any) -> None:
        if str(target).endswith("state.json"):
            raise KeyboardInterrupt
        replaced(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        state.save(tmp_path)
    fresh = state_of(mini, SMALL)
    fresh.load(tmp_path)
    assert fresh.step == 0


@pytest.mark.parametrize("retry", [False, True])
def test_nan_goes_back_to_the_last_good_state(mini: Variant, tmp_path: Path, retry: bool) -> None:
    recipe = short(SMALL, 50)
    good = random_pairs(mini, 2)
    drawn: List[int] = []

    def draw(batch: int, step: int) -> Pairs:
        drawn.append(step)
        return good if step < 2 else good._replace(search=good.search * float("nan"))

    state = state_of(mini, recipe)
    with pytest.raises(DivergedError, match=r"no longer a number by step 2.*state of step 2.*--resume"):
        Trainer(state, draw, recipe, tmp_path, save_every=0.0, retry=retry).run()
    assert drawn == ([0, 1] + [2] * 5 if retry else [0, 1, 2])
    fresh = state_of(mini, recipe)
    fresh.load(tmp_path)
    assert fresh.step == 2
    assert all(torch.isfinite(v).all() for v in fresh.model.state_dict().values())
    assert all(torch.isfinite(v).all() for v in fresh.ema.values())


def test_a_rate_far_too_high_ends_the_run_within_300_steps(collection: Path, mini: Variant, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=8, pairs_per_epoch=8, epochs=300, lr=0.05)
    sampler = PairSampler(load_pool([collection], 128), mini, recipe.augmentation, seed=1)
    state = state_of(mini, recipe)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"by step \d+\..*--resume .* --lr 0.025"):
        Trainer(state, sampler.draw, recipe, tmp_path, save_every=1e9).run()
    fresh = state_of(mini, recipe)
    fresh.load(tmp_path)
    assert fresh.step == 0
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


def test_a_run_that_goes_back_halves_its_rate_and_remembers(mini: Variant, tmp_path: Path, capsys: Any) -> None:
    recipe = replace(short(SMALL, 130), cooldown=0.0)
    pairs = random_pairs(mini, 2)
    state = state_of(mini, recipe)
    trainer = Trainer(state, lambda batch, step: pairs, recipe, tmp_path, retry=True, log_every=0.0)
    losses = iter([1.0] * 22 + [9.0] * 101 + [1.0] * 200)

    def step(rate: float) -> Dict[str, float]:
        state.step, state.pairs = state.step + 1, state.pairs + 2
        return {"lr": rate, "loss": next(losses), "iou": 0.0, "gradient": 1.0}

    trainer._step = step  # type: ignore[method-assign]
    assert trainer.run()
    assert "back to step 0 with 0.5 of the rate" in capsys.readouterr().err
    fresh = state_of(mini, recipe)
    fresh.load(tmp_path)
    assert fresh.rate == 0.5 and fresh.step == 130
    assert read_log(tmp_path)[-1]["lr"] == pytest.approx(recipe.lr / 2)


def test_the_guard_forgives_noise_and_short_rises() -> None:
    guard = Guard()
    for loss in [3.0, 1.0] * 60 + [9.0] * 30 + [2.0] * 100:
        guard.add(loss)
    assert guard.above == 0 and guard.good and guard.best == pytest.approx(2.0, abs=0.1)
    for _ in range(40):
        guard.add(4.0)
    assert guard.above > 10 and not guard.good


def test_weights_to_deploy_are_the_averaged_ones_in_half(mini: Variant, tmp_path: Path) -> None:
    recipe = short(SMALL, 2)
    pairs = random_pairs(mini, 2)
    state = state_of(mini, recipe)
    told = {"variant": "T"}
    assert Trainer(state, lambda batch, step: pairs, recipe, tmp_path, log_every=0.0, metadata=told).run()
    stored = load_file(str(tmp_path / "weights.safetensors"))
    assert stored["bottleneck.weight"].dtype == torch.float16
    weights = load_weights(tmp_path / "weights.safetensors", VARIANTS["T"])
    for name, value in state.ema.items():
        torch.testing.assert_close(weights[name].float(), value.float(), atol=2e-3, rtol=2e-3)
    row = read_log(tmp_path)[-1]
    assert row["step"] == 2 and {"loss", "iou", "giou", "l1", "lr", "pairs_per_s"} <= set(row)


def test_rates_follow_the_recipes() -> None:
    assert PAPER.rate(0, 0.0) == 4e-4 and PAPER.rate(10**6, 0.799) == 4e-4
    assert PAPER.rate(10**6, 0.8) == pytest.approx(4e-5)
    assert SMALL.rate(0, 0.0) < 1e-5
    assert SMALL.rate(10**4, 0.7) == SMALL.lr
    assert SMALL.rate(10**4, 0.875) == pytest.approx(SMALL.lr / 2)
    assert SMALL.rate(10**4, 1.0) == 0


def test_the_paper_preset_is_the_published_recipe() -> None:
    assert (PAPER.lr, PAPER.epochs, PAPER.pairs_per_epoch, PAPER.decay_epoch) == (4e-4, 500, 60_000, 400)
    assert (PAPER.batch, PAPER.weight_decay, PAPER.clip) == (64, 1e-4, 0.1)
    assert (GIOU, L1, PAPER.corner_loss) == (2.0, 5.0, 0.0)
    aug = PAPER.augmentation
    assert (aug.centre_jitter, aug.size_jitter, aug.max_gap) == (3.5, 0.5, 200)
    assert (aug.greyscale, aug.flip, aug.brightness) == (0.05, 0.5, 0.2)
    models = {name: make_state(AsymTrack(VARIANTS[name]), PAPER) for name in "TB"}
    rates = {name: [g["scale"] for g in state.optimiser.param_groups] for name, state in models.items()}
    assert rates == {"T": [0.1, 1.0], "B": [1.0, 1.0]}


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_configurations_survive_json(recipe: Recipe, tmp_path: Path) -> None:
    config = RunConfig(recipe, data=("a", "b"), seed=3)
    stored = tmp_path / "run.json"
    stored.write_text(json.dumps(asdict(config)))
    assert RunConfig.load(tmp_path) == config
    stored.write_text(stored.read_text().replace('"ema"', '"momentum"'))
    with pytest.raises(UsageError, match="does not fit this version"):
        RunConfig.load(tmp_path)


def test_iou_and_giou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 3.0, 1.0]])
    iou, giou = iou_and_giou(a, b)
    assert iou.tolist() == pytest.approx([1 / 3, 0.0])
    assert giou.tolist() == pytest.approx([1 / 3, -1 / 3])


def test_corner_targets_have_their_corner_as_expectation() -> None:
    corners = torch.tensor([[0.21, 0.34, 0.55, 0.8]])
    maps = corner_targets(corners, 8).view(2, 8, 8)
    cells = torch.arange(8.0) / 8
    found = [float((m.sum(0) * cells).sum()) for m in maps] + [float((m.sum(1) * cells).sum()) for m in maps]
    assert found == pytest.approx([0.21, 0.55, 0.34, 0.8], abs=1e-5)


def test_pairs_without_the_target_teach_flat_maps_only(mini: Variant) -> None:
    torch.manual_seed(0)
    model = AsymTrack(mini)
    pairs = random_pairs(mini, 2)._replace(present=torch.zeros(2, dtype=torch.bool))
    prediction = model(pairs.template, pairs.search)
    loss, terms = tracking_loss(prediction, pairs, 0.5)
    assert terms["giou"] == terms["l1"] == 0
    flat = prediction._replace(score_tl=0 * prediction.score_tl, score_br=0 * prediction.score_br)
    assert tracking_loss(flat, pairs, 0.5)[0] < loss
    unknown = pairs._replace(known=torch.zeros(2, dtype=torch.bool))
    assert tracking_loss(prediction, unknown, 0.5)[0] == 0
