"""The training loop: overfitting, resuming, divergence, several processes; its state, recipes and losses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, List, Optional
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from asymtrack_edge.checkpoints import open_checkpoint, save_weights
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.crops import Augmentation
from asymtrack_edge.training.imagery import load_pool
from asymtrack_edge.training.log import read_log
from asymtrack_edge.training.loop import DivergedError, Trainer, corner_targets, iou_and_giou, make_state, tracking_loss
from asymtrack_edge.training.pairs import Pairs, PairSampler
from asymtrack_edge.training.recipes import PAPER, SMALL, Recipe
from asymtrack_edge.training.run import load_initial
from asymtrack_edge.training.state import Guard, RunState, has_state
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL as MINI
from tests.helpers import filled_model
from tests.training.conftest import random_pairs


def state_of(recipe: Recipe, folder: Optional[Path] = None) -> RunState:
    """A new state, or the one in ``folder``."""
    torch.manual_seed(0)
    state = make_state(AsymTrack(MINI), recipe)
    if folder is not None:
        state.load(folder)
    return state


def short(steps: int) -> Recipe:
    """The recipe ``small`` with batch 2 and without warm-up and cool-down, for this many steps."""
    return replace(SMALL, batch=2, pairs_per_epoch=2, epochs=steps, warmup=0, cooldown=0.0, budget_is_length=False)


def trainer(folder: Path, recipe: Recipe, **more: Any) -> Trainer:
    return Trainer(state_of(recipe), lambda batch, step: random_pairs(MINI, 2), recipe, folder, **more)


def test_a_step_clips_gradients_and_scales_the_encoders_rate(tmp_path: Path) -> None:
    one = trainer(tmp_path, replace(short(1), backbone_lr_scale=0.1))
    one.state.model.eval()
    one.state.model.box_head.conv1_tl[1].running_var.fill_(1e6)  # too large for half precision
    assert one.run() and one.state.step == 1 and one.state.model.training
    gradients = [parameter.grad for parameter in one.parameters if parameter.grad is not None]
    assert torch.stack([gradient.norm() for gradient in gradients]).norm() <= 1.001 * one.recipe.clip
    encoder, others = (group["lr"] for group in one.state.optimiser.param_groups)
    assert 0 < encoder == pytest.approx(0.1 * others)
    assert open_checkpoint(tmp_path / "weights.safetensors").stored["bottleneck.bias"].dtype == torch.float32


def test_a_state_whose_loss_has_risen_is_not_saved(tmp_path: Path) -> None:
    one = trainer(tmp_path, short(1), save_every=0.0)
    one.state.guard, one.state.seconds = Guard(9.0, 0.01, 50), 1000.0
    one.run()
    assert one.state.seconds > 1000 and state_of(one.recipe, tmp_path).step == 0


@pytest.mark.parametrize(("steps", "learnt"), [(1, True), (2, False)])
def test_the_stem_learns_in_the_first_step_and_not_in_the_second(steps: int, learnt: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, short(steps))
    run.run()
    assert (run.parameters[0].grad is not None) == learnt


def test_the_rate_is_zero_when_the_time_is_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(SMALL, batch=2), time_budget=0.0)
    run.run()
    assert run.state.optimiser.param_groups[1]["lr"] == 0


def test_a_state_is_averaged_and_saved_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, name = state_of(SMALL), "bottleneck.bias"
    state.update_ema(0.9)
    before = state.ema[name].clone()
    with torch.no_grad():
        state.model.bottleneck.bias += 1
    for step, moved in ((0, 0.9), (10**6, 0.91)):  # at first the decay depends on the step, later it is 0.9
        state.step = step
        state.update_ema(0.9)
        torch.testing.assert_close(state.ema[name] - before, torch.full_like(before, moved))
    taught, other = (make_state(AsymTrack(MINI), SMALL, taught=True) for _ in range(2))
    taught.save(tmp_path)
    for parameter in other.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.optimiser.step()
    other.load(tmp_path)
    assert not other.optimiser.state and taught.student and other.student
    assert all(map(torch.equal, taught.student.readouts.parameters(), other.student.readouts.parameters()))
    # A run that is killed while it writes keeps the previous state.
    monkeypatch.setattr(os, "fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace(taught, step=9).save(tmp_path)
    other.load(tmp_path)
    assert other.step == 0


def test_small_recipe_overfits_eight_pairs(collection: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=8, pairs_per_epoch=8, epochs=50, warmup=5, lr=1e-3)
    # The corner maps reach only (side - 1) / side of the crop, so the targets stay near its centre.
    plain = Augmentation(centre_jitter=0.6, size_jitter=0.1, stills=0.5)
    fixed = PairSampler(load_pool([collection], 128), MINI, plain).draw(8, 0)
    state = state_of(recipe)

    def overlap() -> float:
        with torch.no_grad():
            return float(iou_and_giou(state.model(fixed.template, fixed.search).corners, fixed.corners)[0].mean())

    assert overlap() < 0.5
    assert Trainer(state, lambda batch, step: fixed, recipe, tmp_path).run()
    assert overlap() > 0.9


def test_resuming_is_bit_exact(collection: Path, tmp_path: Path) -> None:
    pool, recipe = load_pool([collection], 128), short(6)

    def run(folder: Path, budget: float = math.inf) -> RunState:
        state = state_of(recipe, folder if has_state(folder) else None)
        draw = PairSampler(pool, MINI, recipe.augmentation, seed=7).draw
        trainer = Trainer(state, draw, recipe, folder, time_budget=budget, log_every=0.0, metadata={"variant": "T"})
        assert trainer.run() == (state.step == 6)
        return state

    whole = run(tmp_path / "whole")
    steps = [run(tmp_path / "parts", 0.0) for _ in range(6)]
    assert [state.step for state in steps] == [1, 2, 3, 4, 5, 6]
    parts = steps[-1]
    assert whole.step == 6 and whole.guard == parts.guard
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
        assert torch.equal(whole.ema[name], parts.ema[name]), name
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimiser.state[a][moment], parts.optimiser.state[b][moment])
    # The averaged weights are written for use, in half precision.
    weights = open_checkpoint(tmp_path / "parts" / "weights.safetensors").tensors(MINI)
    assert all(torch.equal(weights[name], value.half().float()) for name, value in parts.ema.items() if value.ndim)
    row = read_log(tmp_path / "parts")[-1]
    assert row["step"] == 6 and {"loss", "iou", "giou", "l1", "lr", "pairs_per_s"} <= set(row)


def test_a_state_of_another_variant_or_damaged_is_refused(tmp_path: Path) -> None:
    state_of(SMALL).save(tmp_path)
    with pytest.raises(CheckpointError, match="of another variant"):
        make_state(AsymTrack(VARIANTS["S"]), SMALL).load(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot resume"):
        state_of(SMALL, tmp_path)


@pytest.mark.parametrize(("retry", "bad"), [(False, 1), (True, 1), (True, 9)])
def test_after_nan_training_returns_to_the_last_good_state(retry: bool, bad: int, tmp_path: Path, capsys: Any) -> None:
    recipe, good = short(4), random_pairs(MINI, 2)
    drawn: List[int] = []

    def draw(batch: int, step: int) -> Pairs:
        drawn.append(step)
        return good._replace(search=good.search * float("nan")) if step == 2 and drawn.count(2) <= bad else good

    trainer = Trainer(state_of(recipe), draw, recipe, tmp_path, save_every=0.0, log_every=0.0, retry=retry)
    mended = retry and bad == 1
    if mended:
        assert trainer.run()
        assert "back to step 2 with 0.5 of the learning rate" in capsys.readouterr().err
        assert read_log(tmp_path)[-1]["lr"] == pytest.approx(recipe.lr / 2)
    else:
        with pytest.raises(DivergedError, match=r"no longer a number by step 2.*state of step 2.*--resume"):
            trainer.run()
    assert drawn == ([0, 1, 2, 2, 3] if mended else [0, 1] + [2] * (5 if retry else 1))
    fresh = state_of(recipe, tmp_path)
    assert (fresh.step, fresh.rate) == ((4, 0.5) if mended else (2, 1.0))
    assert all(torch.isfinite(v).all() for v in [*fresh.model.state_dict().values(), *fresh.ema.values()])


def test_a_rate_far_too_high_ends_the_run_within_300_steps(collection: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=8, pairs_per_epoch=8, epochs=300, lr=0.05)
    sampler = PairSampler(load_pool([collection], 128), MINI, recipe.augmentation, seed=1)
    with pytest.raises(DivergedError, match=r"by step \d+\..*--resume .* --lr 0.025"):
        Trainer(state_of(recipe), sampler.draw, recipe, tmp_path, save_every=1e9).run()
    fresh, before = state_of(recipe, tmp_path), state_of(recipe).model.state_dict()
    assert fresh.step == 0
    assert all(torch.equal(value, before[name]) for name, value in fresh.model.state_dict().items())


def test_the_guard_tolerates_noise_and_short_rises() -> None:
    guard = Guard()
    for loss in [3.0, 1.0] * 60 + [9.0] * 30 + [2.0] * 100:
        guard.add(loss)
    assert guard.above == 0 and guard.good and guard.best == pytest.approx(2.0, abs=0.1)
    for _ in range(40):
        guard.add(4.0)
    assert guard.above > 10 and not guard.good
    assert Guard(1.1, 1.0).good and not Guard(1.3, 1.0).good
    guard = Guard(1.3, 1.0, 99)
    guard.add(1.3)
    assert guard.above == 0


def test_learning_rates_of_the_published_recipe_and_of_one_with_cool_down() -> None:
    groups = [make_state(AsymTrack(VARIANTS[name]), PAPER).optimiser.param_groups for name in "TB"]
    assert [[group["scale"] for group in one] for one in groups] == [[0.1, 1.0], [1.0, 1.0]]
    assert all(group["weight_decay"] == PAPER.weight_decay for one in groups for group in one)
    rates = [PAPER.learning_rate(step, progress) for step, progress in ((0, 0.0), (10**6, 0.799), (10**6, 0.8))]
    assert rates == pytest.approx([4e-4, 4e-4, 4e-5])
    rates = [SMALL.learning_rate(10**4, progress) for progress in (0.7, 0.875, 1.0)]
    assert SMALL.learning_rate(0, 0.0) < 1e-5 and rates == pytest.approx([SMALL.lr, SMALL.lr / 2, 0])


def test_losses_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    iou, giou = iou_and_giou(a, torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 3.0, 1.0]]))
    assert iou.tolist() == pytest.approx([1 / 3, 0.0]) and giou.tolist() == pytest.approx([1 / 3, -1 / 3])
    # The expectation of each target map is its corner.
    corners = torch.tensor([[0.21, 0.34, 0.55, 0.8]])
    maps = corner_targets(corners, 8).view(2, 8, 8)
    cells = torch.arange(8.0) / 8
    torch.testing.assert_close(torch.stack([maps.sum(1) @ cells, maps.sum(2) @ cells], 1).view(1, 4), corners)


def test_pairs_without_the_target_only_teach_flat_maps() -> None:
    torch.manual_seed(0)
    pairs = random_pairs(MINI, 2)._replace(present=torch.zeros(2, dtype=torch.bool))
    prediction = AsymTrack(MINI)(pairs.template, pairs.search)
    loss, terms = tracking_loss(prediction, pairs, 0.5)
    assert terms["giou"] == terms["l1"] == 0
    flat = prediction._replace(score_tl=0 * prediction.score_tl, score_br=0 * prediction.score_br)
    assert tracking_loss(flat, pairs, 0.5)[0] < loss
    unknown = random_pairs(MINI, 2)._replace(known=torch.zeros(2, dtype=torch.bool))
    assert tracking_loss(prediction, unknown, 0.5)[0] == 0
    # A target that leaves the crop teaches its visible part.
    outside = random_pairs(MINI, 2)._replace(corners=torch.tensor([[-1.0, 0.2, 0.5, 3.0]]).expand(2, -1))
    visible = outside._replace(corners=outside.corners.clamp(0, 1))
    assert tracking_loss(prediction, outside, 0.0)[0] == tracking_loss(prediction, visible, 0.0)[0]


def test_a_grown_network_predicts_as_the_smaller_one_and_learns(tmp_path: Path) -> None:
    small = filled_model(VARIANTS["T"])
    save_weights(tmp_path / "t", small.state_dict(), {"variant": "T"}, half=False)
    large, other, smaller = (AsymTrack(VARIANTS[name]).eval() for name in "SBT")
    load_initial(large, tmp_path / "t")
    template, search = torch.randn(1, 3, 128, 128), torch.randn(1, 3, 256, 256)
    expected, answer = small(template, search), large(template, search)
    assert torch.equal(answer.score_tl, expected.score_tl) and torch.equal(answer.corners, expected.corners)
    answer.corners.sum().backward()
    gamma = large.backbone.layers[2].blocks[2].gamma_1
    assert gamma.eq(0).all() and gamma.grad.abs().sum() > 0
    # S and B have the same tensors; larger weights do not fit a smaller network.
    save_weights(tmp_path / "s", large.state_dict(), {"variant": "S"}, half=False)
    load_initial(other, tmp_path / "s")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in large.state_dict().items())
    with pytest.raises(CheckpointError, match="more encoder blocks than T"):
        load_initial(smaller, tmp_path / "s")


WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.distributed import join_world
from asymtrack_edge.training.loop import Trainer, make_state
from asymtrack_edge.training.recipes import PAPER
from tests.helpers import SMALL
from tests.training.conftest import random_pairs

folder = Path(sys.argv[1])
with join_world("cpu") as world:
    recipe = replace(PAPER, batch=4 // world.size, pairs_per_epoch=4, epochs=3, corner_loss=0.5)
    torch.manual_seed(world.rank)
    state = make_state(AsymTrack(SMALL), recipe)
    whole = random_pairs(SMALL, 4)
    # One of the four pairs has no target, so the processes have different numbers of targets.
    whole = whole._replace(present=torch.tensor([True, True, True, False]))
    mine = slice(world.rank * recipe.batch, (world.rank + 1) * recipe.batch)
    pairs = type(whole)(*(part[mine] for part in whole))
    trainer = Trainer(state, lambda b, s: pairs, recipe, folder, world, log_every=0.0)
    assert trainer.run() and state.pairs == 12, state.pairs
    tensors = {n: v.float() for n, v in state.model.state_dict().items()}
    tensors.update({f"grad.{n}": p.grad for n, p in state.model.named_parameters() if p.grad is not None})
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / f"rank_{world.rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    script, results = tmp_path / "worker.py", []
    script.write_text(WORKER)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script), str(folder)]
        subprocess.run([sys.executable, *run], env=environment, check=True, timeout=300)
        results += [load_file(str(folder / f"rank_{rank}.safetensors")) for rank in range(count)]
        assert (folder / "weights.safetensors").is_file() and (folder / "log.jsonl").is_file()
    alone, first, second = results
    assert all(torch.equal(first[name], second[name]) for name in alone)
    gradients = [name for name in alone if name.startswith("grad.")]
    size = torch.stack([alone[name].norm() for name in gradients]).norm()
    apart = torch.stack([(alone[name] - first[name]).norm() for name in gradients]).norm()
    assert len(gradients) > 60 and apart < 1e-3 * size
    for name in set(alone) - set(gradients):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=2e-4, msg=name)
