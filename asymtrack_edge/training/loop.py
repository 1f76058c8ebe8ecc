"""The training loop: the same for a CPU, one GPU, and several by ``torchrun``."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional

import torch
from torch import nn

from asymtrack_edge.checkpoints import save_weights
from asymtrack_edge.errors import AsymTrackError, CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.distributed import World
from asymtrack_edge.training.losses import tracking_loss
from asymtrack_edge.training.pairs import DrawPairs
from asymtrack_edge.training.progress import Log, StopSignals
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import RunState

WEIGHTS = "weights.safetensors"


class DivergedError(AsymTrackError):
    """The loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class RunOptions:
    """What of a run is not its recipe.

    Attributes:
        folder: where state, weights and log go.
        time_budget: stop after this many seconds of this call (None: run all epochs).
        save_every: seconds between saved states.
        log_every: seconds between lines of the log.
        bf16: compute in bfloat16 where it is safe.
        compile: let ``torch.compile`` optimise the network.
        metadata: stored in the weights to be deployed.
    """

    folder: Path
    time_budget: Optional[float] = None
    save_every: float = 45.0
    log_every: float = 5.0
    bf16: bool = False
    compile: bool = False
    metadata: Optional[Dict[str, str]] = None


def make_optimiser(model: AsymTrack, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the encoder's learning rate scaled (see ``Recipe.backbone_lr_scale``)."""
    scale = recipe.backbone_lr_scale
    if scale is None:
        scale = 0.1 if model.variant.name == "T" else 1.0
    encoder = list(model.backbone.parameters())
    others = [*model.bottleneck.parameters(), *model.box_head.parameters()]
    groups: List[Dict[str, Any]] = [{"params": encoder, "scale": scale}, {"params": others, "scale": 1.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


class Trainer:
    """Trains a state until its recipe or its time is used up.

    Args:
        state: updated in place.
        draw: makes the pairs of a step.
        recipe: optimisation settings.
        options: where to write, how long to go on.
        world: the processes that take part; by default this one alone.
    """

    def __init__(
        self,
        state: RunState,
        draw: DrawPairs,
        recipe: Recipe,
        options: RunOptions,
        world: Optional[World] = None,
    ) -> None:
        self.state = state
        self.draw = draw
        self.recipe = recipe
        self.options = options
        device = next(state.model.parameters()).device
        self.world = world or World(0, 1, device)
        network: nn.Module = torch.compile(state.model) if options.compile else state.model  # type: ignore[assignment]
        self.network = self.world.wrap(network)
        self.total = recipe.epochs * recipe.pairs_per_epoch

    def run(self) -> bool:
        """Trains, saving as it goes; returns whether the recipe's pairs are used up.

        A signal to terminate or interrupt ends the run after the current step, saved.

        Raises:
            DivergedError: the loss became NaN or infinite; the last good state is on disk.
        """
        state, options = self.state, self.options
        state.model.train()
        if state.step == 0:
            self.save()
        began = saved = time.monotonic()
        spent_before = state.seconds
        with Log(options.folder if self.world.is_main else None, options.log_every, state.pairs) as log:
            with StopSignals() as signals:
                while state.pairs < self.total:
                    elapsed = time.monotonic() - began
                    progress, stop = self.world.agree(
                        self._progress(elapsed), self._out_of_time(elapsed) or signals.received
                    )
                    if stop:
                        break
                    values = self._step(self.recipe.rate(state.step, progress))
                    state.seconds = spent_before + time.monotonic() - began
                    log.add(state, progress, values)
                    if time.monotonic() - saved > options.save_every:
                        self.save()
                        saved = time.monotonic()
            self.save()
        return state.pairs >= self.total

    def _progress(self, elapsed: float) -> float:
        """How much of the schedule lies behind, 0..1."""
        progress = self.state.pairs / self.total
        if self.options.time_budget is not None and self.recipe.budget_is_length:
            progress = max(progress, elapsed / max(1e-9, self.options.time_budget))
        return min(1.0, progress)

    def _out_of_time(self, elapsed: float) -> bool:
        return self.options.time_budget is not None and elapsed >= self.options.time_budget

    def _autocast(self) -> ContextManager[Any]:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.options.bf16 else nullcontext()

    def _step(self, rate: float) -> Dict[str, float]:
        """One batch: returns the learning rate and the terms of the loss."""
        state, recipe = self.state, self.recipe
        for group in state.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        if recipe.shallow_every > 1 and self.world.size == 1:
            self._choose_depth(state.step % recipe.shallow_every == 0)
        pairs = self.draw(recipe.batch, state.step)
        with self._autocast():
            prediction = self.network(pairs.template, pairs.search)
        loss, terms = tracking_loss(prediction, pairs, recipe.loss)
        state.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
        names = ["loss", *terms, "gradient"]
        # One transfer for all values: each would wait for the device.
        values = torch.stack([loss.detach(), *terms.values(), norm.detach()]).tolist()
        # Gradients are averaged over all processes, so that all see a NaN in the same step.
        if not (math.isfinite(values[-1]) and math.isfinite(values[0])):
            raise DivergedError(
                f"the loss is {values[0]:g} and its gradient {values[-1]:g} at step {state.step}: "
                f"continue from the last good state with --resume {self.options.folder} and a lower --lr"
            )
        state.optimiser.step()
        state.step += 1
        state.pairs += recipe.batch * self.world.size
        if recipe.ema:
            state.update_ema(recipe.ema)
        return {"lr": rate, **dict(zip(names, values))}

    def _choose_depth(self, shallow: bool) -> None:
        """Sets whether stem and first stage learn in this step (see ``Recipe.shallow_every``)."""
        for name in ("backbone.patch_embed", "backbone.layers.0"):
            self.state.model.get_submodule(name).requires_grad_(shallow)

    def save(self) -> None:
        """Writes the state and the weights to be deployed (main process only)."""
        if self.world.is_main:
            self.state.save(self.options.folder)
            deploy(self.state, self.options)


def deploy(state: RunState, options: RunOptions) -> None:
    """Writes the best weights of a run for export, in half precision where they fit it."""
    path = options.folder / WEIGHTS
    metadata = {**(options.metadata or {}), "pairs": state.pairs}
    try:
        save_weights(path, state.best_weights(), metadata)
    except CheckpointError:
        # A running variance beyond 65,504 must not end a run; full precision holds it.
        save_weights(path, state.best_weights(), metadata, half=False)
