"""The loop: overfitting, resuming, diverging, distributing, distilling, measuring."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, List

import pytest
import torch
from safetensors.torch import load_file, save_file

from asymtrack_edge.checkpoints import load_weights
from asymtrack_edge.errors import CheckpointError, UsageError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.augmentation import Augmentation
from asymtrack_edge.training.benchmark import compare_steps, random_pairs, reference_form
from asymtrack_edge.training.collection import load_collection
from asymtrack_edge.training.distillation import TEACHER_WIDTHS, distill
from asymtrack_edge.training.loop import DivergedError, RunOptions, Trainer, make_optimiser
from asymtrack_edge.training.losses import LossWeights, corner_targets, iou_and_giou, tracking_loss
from asymtrack_edge.training.pairs import Pairs, PairSampler
from asymtrack_edge.training.progress import plot_run, read_log
from asymtrack_edge.training.recipes import PAPER, SMALL, Recipe
from asymtrack_edge.training.state import RunState, has_state
from asymtrack_edge.variants import VARIANTS, Variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mini() -> Variant:
    """The smallest crops the network takes sensibly."""
    return VARIANTS["T"].with_(template_size=32, search_size=64)


def state_of(variant: Variant, recipe: Recipe) -> RunState:
    torch.manual_seed(0)
    model = AsymTrack(variant)
    return RunState(model, {}, make_optimiser(model, recipe))


def short(recipe: Recipe, steps: int) -> Recipe:
    """``recipe`` at batch 2, for ``steps`` steps."""
    return replace(recipe, batch=2, pairs_per_epoch=2, epochs=steps, warmup=1)


def test_small_recipe_overfits_eight_pairs(collection: Path, tiny: Variant, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=8, pairs_per_epoch=8, epochs=250, warmup=5, lr=1e-3)
    # The corner maps reach (side - 1) / side of the crop, so the targets stay near its middle.
    plain = Augmentation(centre_jitter=0.6, size_jitter=0.1, stills=0.5)
    fixed = PairSampler(load_collection(collection, 128), tiny, plain).draw(8, 0)
    state = state_of(tiny, recipe)
    seen: List[float] = []

    class Enough(Exception):
        pass

    def draw(batch: int, step: int) -> Pairs:
        if step % 10 == 0:
            with torch.no_grad():
                prediction = state.model(fixed.template, fixed.search)
            seen.append(float(iou_and_giou(prediction.corners, fixed.corners)[0].mean()))
            if seen[-1] > 0.9:
                raise Enough
        return fixed

    with pytest.raises(Enough):
        Trainer(state, draw, recipe, RunOptions(tmp_path)).run()
    assert seen[0] < 0.5


def test_resuming_is_bit_exact(collection: Path, mini: Variant, tmp_path: Path) -> None:
    pool = load_collection(collection, 128)
    recipe = short(SMALL, 6)
    drawn: List[List[torch.Tensor]] = [[], []]

    def run(folder: Path, steps: int, which: int) -> RunState:
        state = state_of(mini, recipe)
        if has_state(folder):
            state.load(folder)
        sampler = PairSampler(pool, mini, recipe.augmentation, seed=7)

        def draw(batch: int, step: int) -> Pairs:
            pairs = sampler.draw(batch, step)
            drawn[which].append(pairs.search.clone())
            if step + 1 == steps:
                os.kill(os.getpid(), signal.SIGTERM)  # stops the loop after this step
            return pairs

        Trainer(state, draw, recipe, RunOptions(folder)).run()
        return state

    whole = run(tmp_path / "whole", 6, 0)
    run(tmp_path / "parts", 3, 1)
    parts = run(tmp_path / "parts", 6, 1)
    assert whole.step == parts.step == 6
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1])) and len(drawn[1]) == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
        assert torch.equal(whole.ema[name], parts.ema[name]), name
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        for moment in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(whole.optimiser.state[a][moment], parts.optimiser.state[b][moment])


def test_states_with_a_generator_still_load(mini: Variant, tmp_path: Path) -> None:
    state = state_of(mini, SMALL)
    state.step, state.pairs = 3, 96
    state.save(tmp_path, {"generator": bytes(torch.Generator().get_state().tolist()).hex()})
    fresh = state_of(mini, SMALL)
    fresh.model.backbone.patch_embed.proj.weight.data.zero_()
    fresh.load(tmp_path)
    assert (fresh.step, fresh.pairs) == (3, 96)
    assert torch.equal(fresh.model.backbone.patch_embed.proj.weight, state.model.backbone.patch_embed.proj.weight)


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


def test_nan_stops_with_the_last_good_state(mini: Variant, tmp_path: Path) -> None:
    recipe = short(SMALL, 50)
    good = random_pairs(mini, 2, CPU)

    def draw(batch: int, step: int) -> Pairs:
        return good if step < 2 else good._replace(search=good.search * float("nan"))

    state = state_of(mini, recipe)
    with pytest.raises(DivergedError, match="--resume"):
        Trainer(state, draw, recipe, RunOptions(tmp_path, save_every=0.0)).run()
    fresh = state_of(mini, recipe)
    fresh.load(tmp_path)
    assert fresh.step == 2
    assert all(torch.isfinite(v).all() for v in fresh.model.state_dict().values())
    assert all(torch.isfinite(v).all() for v in fresh.ema.values())


def test_weights_to_deploy_are_the_averaged_ones_in_half(mini: Variant, tmp_path: Path) -> None:
    recipe = short(SMALL, 2)
    pairs = random_pairs(mini, 2, CPU)
    state = state_of(mini, recipe)
    options = RunOptions(tmp_path, log_every=0.0, metadata={"variant": "T"})
    assert Trainer(state, lambda batch, step: pairs, recipe, options).run()
    stored = load_file(str(tmp_path / "weights.safetensors"))
    assert stored["bottleneck.weight"].dtype == torch.float16
    weights = load_weights(tmp_path / "weights.safetensors", VARIANTS["T"])
    for name, value in state.ema.items():
        torch.testing.assert_close(weights[name].float(), value.float(), atol=2e-3, rtol=2e-3)
    rows = read_log(tmp_path)
    assert rows[-1]["step"] == 2 and {"loss", "iou", "giou", "l1", "lr", "pairs_per_s"} <= set(rows[-1])
    assert plot_run(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_time_budget_ends_the_run_saved(mini: Variant, tmp_path: Path) -> None:
    pairs = random_pairs(mini, 2, CPU)
    for recipe in (short(SMALL, 10**6), short(PAPER, 10**6)):
        state = state_of(mini, recipe)
        folder = tmp_path / str(recipe.budget_is_length)
        assert not Trainer(state, lambda b, s: pairs, recipe, RunOptions(folder, time_budget=0.3)).run()
        assert 0 < state.step < 1000
        assert json.loads((folder / "state.json").read_text())["step"] == state.step


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
    assert PAPER.loss == LossWeights(2.0, 5.0, 0.0)
    aug = PAPER.augmentation
    assert (aug.centre_jitter, aug.size_jitter, aug.max_gap) == (3.5, 0.5, 200)
    assert (aug.greyscale, aug.flip, aug.brightness) == (0.05, 0.5, 0.2)
    rates = {name: [g["scale"] for g in make_optimiser(AsymTrack(VARIANTS[name]), PAPER).param_groups] for name in "TB"}
    assert rates == {"T": [0.1, 1.0], "B": [1.0, 1.0]}


def test_recipes_survive_json() -> None:
    for recipe in (PAPER, SMALL):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(UsageError, match="recipe"):
        Recipe.from_dict({**SMALL.to_dict(), "momentum": 0.9})


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
    pairs = random_pairs(mini, 2, CPU)._replace(present=torch.zeros(2, dtype=torch.bool))
    prediction = model(pairs.template, pairs.search)
    loss, terms = tracking_loss(prediction, pairs, LossWeights(2.0, 5.0, 0.5))
    assert terms["giou"] == terms["l1"] == 0
    flat = prediction._replace(score_tl=0 * prediction.score_tl, score_br=0 * prediction.score_br)
    assert tracking_loss(flat, pairs, LossWeights(2.0, 5.0, 0.5))[0] < loss


def test_reference_form_computes_the_same(mini: Variant) -> None:
    torch.manual_seed(0)
    model = AsymTrack(mini).train()
    reference = reference_form(model).train()
    pairs = random_pairs(mini, 2, CPU)
    gradients = []
    for form in (model, reference):
        loss, _ = tracking_loss(form(pairs.template, pairs.search), pairs, LossWeights())
        loss.backward()
        gradients.append((loss.detach(), {n: p.grad for n, p in form.named_parameters()}))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], rtol=2e-3, atol=2e-4, msg=name)


def test_benchmark_gives_positive_figures(mini: Variant) -> None:
    figures = compare_steps(mini, batch=2, rounds=1, device=CPU)
    assert {"reference_fp32", "asymtrack_edge_fp32"} <= set(figures)
    assert all(value > 0 for value in figures.values())


@pytest.mark.slow
def test_training_step_is_faster_than_the_reference_forms() -> None:
    figures = compare_steps(VARIANTS["T"], batch=8, rounds=3, device=CPU)
    assert max(figures.values()) / figures["reference_fp32"] >= 1.4


class FakeTeacher(torch.nn.Module):
    """Blurred colour differences in place of an ImageNet network's features."""

    def forward(self, image: torch.Tensor) -> List[torch.Tensor]:
        mixed = torch.linspace(-1, 1, max(TEACHER_WIDTHS) * 3).view(-1, 3, 1, 1)
        return [
            torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(image, stride), mixed[:width])
            for stride, width in zip((16, 32), TEACHER_WIDTHS)
        ]


def test_distillation_learns_and_goes_on_after_a_kill(
    collection: Path, mini: Variant, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("asymtrack_edge.training.distillation.BATCH", 8)
    monkeypatch.setattr("asymtrack_edge.training.distillation.VIEW", 32)
    monkeypatch.setattr("asymtrack_edge.training.distillation.WARMUP", 2)
    pool = load_collection(collection, 64)
    torch.manual_seed(0)
    model = AsymTrack(mini)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = distill(model, FakeTeacher(), pool, 0.5, tmp_path)
    steps = json.loads((tmp_path / "state.json").read_text())["step"]
    last = distill(AsymTrack(mini), FakeTeacher(), pool, 2.0, tmp_path)
    assert json.loads((tmp_path / "state.json").read_text())["step"] > steps > 0
    assert last < first
    after = model.state_dict()
    assert not torch.equal(after["backbone.patch_embed.proj.weight"], before["backbone.patch_embed.proj.weight"])
    assert torch.equal(after["box_head.conv5_tl.weight"], before["box_head.conv5_tl.weight"])


WORKER = """
import sys, torch
from dataclasses import replace
from pathlib import Path
torch.set_num_threads(1)
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.benchmark import random_pairs
from asymtrack_edge.training.distributed import join_world
from asymtrack_edge.training.loop import RunOptions, Trainer, make_optimiser
from asymtrack_edge.training.recipes import PAPER
from asymtrack_edge.training.state import RunState, save_tensors
from asymtrack_edge.variants import VARIANTS
folder = Path(sys.argv[1])
world = join_world("cpu")
variant = VARIANTS["T"].with_(template_size=32, search_size=64)
recipe = replace(PAPER, batch=4 // world.size, pairs_per_epoch=4, epochs=3)
torch.manual_seed(world.rank)
model = AsymTrack(variant)
whole = random_pairs(variant, 4, world.device)
mine = slice(world.rank * recipe.batch, (world.rank + 1) * recipe.batch)
pairs = type(whole)(*(part[mine] for part in whole))
state = RunState(model, {}, make_optimiser(model, recipe))
finished = Trainer(state, lambda b, s: pairs, recipe, RunOptions(folder), world).run()
assert finished and state.pairs == 12, state.pairs
parameters = {n: p for n, p in model.named_parameters()}
save_tensors(folder / f"rank{world.rank}.safetensors", parameters)
world.leave()
"""


@pytest.mark.slow
def test_two_processes_stay_in_step_and_one_writes(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    port = str(20000 + os.getpid() % 20000)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    one, two = (load_file(str(tmp_path / f"rank{rank}.safetensors")) for rank in (0, 1))
    torch.manual_seed(0)
    initial = dict(AsymTrack(VARIANTS["T"].with_(template_size=32, search_size=64)).named_parameters())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in initial.items())
    assert has_state(tmp_path) and len(list(tmp_path.glob("model-*.safetensors"))) == 1


def test_signals_are_left_alone_outside_the_main_thread(mini: Variant, tmp_path: Path) -> None:
    recipe = short(SMALL, 1)
    pairs = random_pairs(mini, 2, CPU)
    done: List[bool] = []

    def work() -> None:
        done.append(Trainer(state_of(mini, recipe), lambda b, s: pairs, recipe, RunOptions(tmp_path)).run())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_old_pieces_are_removed(mini: Variant, tmp_path: Path) -> None:
    state = state_of(mini, SMALL)
    save_file({"x": torch.zeros(1)}, str(tmp_path / "model-999.safetensors"))
    state.save(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model-0.safetensors"]
