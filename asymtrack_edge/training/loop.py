"""The training loop, the same for a CPU, a GPU and several processes (``torchrun``), and the loss.

The loss is ``2 GIoU + 5 L1`` (paper, eq. 9) with an optional term on the corner maps.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge import cli
from asymtrack_edge.checkpoints import save_weights
from asymtrack_edge.errors import AsymTrackError, CheckpointError
from asymtrack_edge.network import AsymTrack, Prediction
from asymtrack_edge.training.distributed import World
from asymtrack_edge.training.log import Log
from asymtrack_edge.training.pairs import DrawPairs, Pairs
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import RunState
from asymtrack_edge.training.teacher import Opinion, Student, Teacher, relabel, teacher_loss

WEIGHTS = "weights.safetensors"
#: Weights of the generalised IoU of the boxes and of the mean absolute difference of their corners.
GIOU, L1 = 2.0, 5.0
#: A run has diverged when ``Guard.above`` reaches this many steps.
PATIENCE = 100
#: How often a run goes back to its last good state before it ends.
RETRIES = 4

#: The pairs of a step, and the teacher's opinion of them.
Batch = Tuple[Pairs, Optional[Opinion]]


class DivergedError(AsymTrackError):
    """The loss rose and stayed high, or is no longer a number."""


def iou_and_giou(a: Tensor, b: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corner boxes ``(B, 4)`` (Rezatofighi et al. 2019), each ``(B,)``."""
    area_a = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1)
    area_b = (b[:, 2:] - b[:, :2]).clamp(min=0).prod(1)
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = area_a + area_b - inter
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = inter / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def corner_targets(corners: Tensor, side: int) -> Tensor:
    """Distributions ``(B, 2, side * side)`` whose expected positions are the two corners.

    The mass is split bilinearly over the four cells around each corner, so that the soft-argmax of
    the target is the corner itself (as far as the map reaches).
    """
    position = corners.view(-1, 2, 2) * side
    cells = torch.arange(side, device=corners.device, dtype=corners.dtype)
    near = (1 - (position.clamp(0, side - 1)[..., None] - cells).abs()).clamp(min=0)
    return (near[:, :, 1, :, None] * near[:, :, 0, None, :]).flatten(2)


def tracking_loss(
    prediction: Prediction, pairs: Pairs, corner: float, average: Callable[[Tensor], Tensor] = lambda value: value
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """The weighted sum of all terms over the known pairs, and the terms to log: giou, l1, corner, iou (detached).

    ``corner`` is ``Recipe.corner_loss``; ``average`` returns the mean of a number over all processes, so that every
    pair has the same weight in each.
    """
    target = pairs.corners.clamp(0, 1)
    present = (pairs.present & pairs.known).float()

    def mean(values: Tensor, of: Tensor) -> Tensor:
        return (values * of).sum() / average(of.sum()).clamp(min=1e-6)

    iou, giou = iou_and_giou(prediction.corners, target)
    distance = (prediction.corners - target).abs().mean(1)
    terms = {"giou": mean(1 - giou, present), "l1": mean(distance, present)}
    loss = GIOU * terms["giou"] + L1 * terms["l1"]
    if corner > 0:
        maps = torch.stack([prediction.score_tl, prediction.score_br], 1).float()
        side = maps.shape[-1]
        wanted = corner_targets(target, side)
        wanted = torch.where(pairs.present[:, None, None], wanted, torch.full_like(wanted, side**-2))
        entropy = -(wanted * F.log_softmax(maps.flatten(2), -1)).sum(-1).mean(1)
        terms["corner"] = mean(entropy, pairs.known.float())
        loss = loss + corner * terms["corner"]
    terms["iou"] = mean(iou, present)
    return loss, {name: value.detach() for name, value in terms.items()}


def make_state(model: AsymTrack, recipe: Recipe, taught: bool = False) -> RunState:
    """A run's state before its first step, with AdamW and, if ``taught``, the read-outs that only a teacher needs."""
    student = Student(model).to(next(model.parameters()).device) if taught else None
    scale = recipe.backbone_lr_scale
    if scale is None:
        scale = 0.1 if model.variant.name == "T" else 1.0
    encoder = list(model.backbone.parameters())
    others = [*model.bottleneck.parameters(), *model.box_head.parameters()]
    others += student.readouts.parameters() if student else ()
    groups: List[Dict[str, Any]] = [{"params": encoder, "scale": scale}, {"params": others, "scale": 1.0}]
    fused = encoder[0].device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused)
    return RunState(model, optimiser, student)


@dataclass
class Trainer:
    """Trains a state until its recipe or its time is used up."""

    state: RunState  #: updated in place
    draw: DrawPairs  #: makes the pairs of a step
    recipe: Recipe
    folder: Path  #: where state, weights and log go
    world: World = field(default_factory=World)
    teacher: Optional[Teacher] = None  #: imitated in addition to the labels
    time_budget: float = math.inf  #: stop after this many seconds, but not before the first step
    retry: bool = False  #: if the loss diverges, go back to the last good state with half the learning rate and go on
    bf16: bool = False  #: compute in bfloat16 where it is safe
    metadata: Dict[str, str] = field(default_factory=dict)  #: stored in the weights to be deployed
    save_every: float = 45.0  #: seconds between saved states
    log_every: float = 5.0  #: seconds between lines of the log

    def __post_init__(self) -> None:
        self.network = self.world.wrap(self.state.student or self.state.model)
        self.parameters = [parameter for _, parameter in self.state.named_parameters()]
        self._ahead = torch.cuda.Stream(self.world.device) if self.world.device.type == "cuda" else None
        self._ready: Optional[Tuple[int, Batch]] = None
        self.total = self.recipe.epochs * self.recipe.pairs_per_epoch
        self.signals: List[int] = []  # received during the run; one ends it

    def run(self) -> bool:
        """Trains and saves regularly; returns whether the recipe's pairs are used up.

        SIGINT, SIGTERM or SIGHUP ends the run after the current step. The final state is saved, unless the loss has
        risen too high: then the last good state stays.

        Raises:
            DivergedError: the loss diverged; the last good state is on disk.
        """
        state = self.state
        self.network.train()
        if state.step == 0:
            self._ready = 0, self._prepare(0)  # first: without pairs to draw, no run is left behind
            self.save()
        if self._ahead and self.world.size == 1 and self.recipe.shallow_every == 1:
            self._capture()
        spent_before, first, count = state.seconds, state.step, self.recipe.batch * self.world.size
        log = Log(self.folder if self.world.is_main else None, self.log_every)
        with log.bar, cli.handled_signals(self._note):
            began = saved = time.monotonic()
            while state.pairs < self.total:
                elapsed = time.monotonic() - began
                progress = state.pairs / self.total
                if self.recipe.budget_is_length:
                    progress = max(progress, elapsed / max(1e-9, self.time_budget))
                over = bool(self.signals) or (state.step > first and elapsed >= self.time_budget)
                progress, stop, diverged = self.world.agree(min(1, progress), over, state.guard.above >= PATIENCE)
                if diverged:
                    self._back(f"rose from {state.guard.best:.3g} to {state.guard.average:.3g} and stayed there")
                    continue
                if stop:
                    break
                values = self._step(self.recipe.learning_rate(state.step, progress) * state.rate)
                # Gradients are averaged over all processes, so that all see a NaN in the same step.
                if not math.isfinite(values["gradient"] + values["loss"]):
                    self._back("is no longer a number")
                    continue
                state.guard.add(values["loss"])
                state.seconds = spent_before + time.monotonic() - began
                log.add(state.step, state.pairs, count, progress, values)
                # While the loss may be diverging, the last good state stays.
                if time.monotonic() - saved > self.save_every and state.guard.good:
                    self.save()
                    saved = time.monotonic()
            log.write()
            if state.guard.above == 0:
                self.save()
            elif self.world.is_main:
                cli.say(f"the loss is high: {self.folder} holds the last good state")
        return state.pairs >= self.total

    def _note(self, number: int, _: Any) -> None:
        """Makes a signal end the run after the current step; a second SIGINT interrupts at once."""
        if self.signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signals.append(number)

    def _back(self, what: str) -> None:
        """Goes back to the last good state with half the learning rate, or ends the run in that state."""
        state, folder, rate = self.state, self.folder, self.state.rate / 2
        what = f"the loss {what} by step {state.step}"
        state.load(folder)
        if not self.retry or rate < 0.5**RETRIES:
            raise DivergedError(
                f"{what}. {folder} holds the state of step {state.step}: continue with --resume {folder} "
                f"--lr {self.recipe.lr * rate:.2g}" + ("" if self.retry else ", or add --on-divergence retry")
            )
        state.rate = rate
        if self.world.is_main:
            cli.say(f"{what}: back to step {state.step} with {rate:g} of the learning rate")

    def _prepare(self, step: int) -> Batch:
        """The pairs of a step and the teacher's opinion of them."""
        pairs = self.draw(self.recipe.batch, step)
        if self.teacher is None:
            return pairs, None
        with self._autocast():
            opinion = self.teacher(pairs)
        return relabel(pairs, opinion), opinion

    def _batch(self, step: int) -> Batch:
        """The result of ``_prepare``; if possible, it was prepared while the GPU was busy with the previous step."""
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != step:
            return self._prepare(step)
        if self._ahead is not None:
            torch.cuda.current_stream().wait_stream(self._ahead)
        return ready[1]

    def _autocast(self) -> torch.autocast:
        # No cache on a GPU: a cast recorded in a CUDA graph must not be reused in another call.
        kind = self.world.device.type
        return torch.autocast(kind, torch.bfloat16, self.bf16, cache_enabled=kind != "cuda")

    def _capture(self) -> None:
        """Records forward and backward pass as CUDA graphs: hundreds of launches become two."""
        # torch warns that the graph runs on another stream. The only cost is a wait.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        pairs = self._prepare(self.state.step)[0]
        buffers = {name: value.clone() for name, value in self.network.named_buffers()}
        with self._autocast():
            torch.cuda.make_graphed_callables(self.network, (pairs.template, pairs.search), allow_unused_input=True)
        # Recording runs the network, which changes its running statistics: restore them.
        with torch.no_grad():
            for name, value in self.network.named_buffers():
                value.copy_(buffers[name])
        for parameter in self.parameters:
            parameter.grad = None

    def _loss(self, batch: Batch) -> Tuple[Tensor, Dict[str, Tensor]]:
        """The loss of a batch, and its terms, detached."""
        pairs, opinion = batch
        with self._autocast():
            output = self.network(pairs.template, pairs.search)
        prediction = output if opinion is None else output[0]
        loss, terms = tracking_loss(prediction, pairs, self.recipe.corner_loss, self.world.average)
        if opinion is not None:
            more, recipe = teacher_loss(output[1], output[2], opinion), self.recipe
            loss = loss + recipe.teacher_response * more["response"] + recipe.teacher_features * more["features"]
            terms.update({name: value.detach() for name, value in more.items()})
        return loss, terms

    def _step(self, rate: float) -> Dict[str, float]:
        """Trains on one batch; returns learning rate, loss, its terms and gradient norm. A NaN changes nothing."""
        state, recipe = self.state, self.recipe
        for group in state.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        if recipe.shallow_every > 1 and self.world.size == 1:
            for name in ("backbone.patch_embed", "backbone.layers.0"):
                state.model.get_submodule(name).requires_grad_(state.step % recipe.shallow_every == 0)
        loss, terms = self._loss(self._batch(state.step))
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm: Tensor = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        values = self.world.average(torch.stack([loss.detach(), *terms.values(), norm.detach()]))
        if self._ahead is not None:
            # This step's pairs stay alive until its values are read, so the next pairs cannot overwrite their memory.
            with torch.cuda.stream(self._ahead):
                self._ready = state.step + 1, self._prepare(state.step + 1)
        # One transfer for all values, because each transfer waits for the device.
        named = {"lr": rate, **dict(zip(["loss", *terms, "gradient"], values.tolist()))}
        if math.isfinite(named["gradient"] + named["loss"]):
            state.optimiser.step()
            state.step += 1
            state.pairs += recipe.batch * self.world.size
            if recipe.ema:
                state.update_ema(recipe.ema)
        return named

    def save(self) -> None:
        """Writes the state and the weights to be deployed (main process only)."""
        if not self.world.is_main:
            return
        self.state.save(self.folder)
        path, weights = self.folder / WEIGHTS, self.state.ema or self.state.model.state_dict()
        metadata = {**self.metadata, "pairs": self.state.pairs}
        try:
            save_weights(path, weights, metadata)
        except CheckpointError:
            # A running variance above 65,504 must not end a run; float32 can hold it.
            save_weights(path, weights, metadata, half=False)
