"""The training loop."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch
from torch import nn

from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.losses import tracking_loss
from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import RunState


class DivergedError(AsymTrackError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class RunOptions:
    """What of a run is not its recipe.

    Attributes:
        folder: where state, log and plot go.
        time_budget: stop after this many seconds of this call (None: run all epochs).
        save_every: seconds between saved states.
        bf16: compute in bfloat16 where it is safe.
        compile: let ``torch.compile`` optimise the network.
    """

    folder: Path
    time_budget: Optional[float] = None
    save_every: float = 60.0
    bf16: bool = False
    compile: bool = False


def make_optimiser(model: AsymTrack, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the encoder's learning rate scaled (see ``Recipe.backbone_lr_scale``)."""
    scale = recipe.backbone_lr_scale
    if scale is None:
        scale = 0.1 if model.variant.name == "T" else 1.0
    encoder = list(model.backbone.parameters())
    others = [*model.bottleneck.parameters(), *model.box_head.parameters()]
    groups: List[Dict[str, Any]] = [{"params": encoder, "scale": scale}, {"params": others, "scale": 1.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)


def train(
    state: RunState,
    draw: Callable[[int], Pairs],
    recipe: Recipe,
    options: RunOptions,
    describe: Optional[Dict[str, Any]] = None,
) -> None:
    """Trains until the recipe's pairs or the time budget are used up, saving as it goes.

    Args:
        state: updated in place.
        draw: makes a batch of the given number of pairs.
        recipe: optimisation settings.
        options: where to write, how long to go on.
        describe: stored with each saved state.

    Raises:
        DivergedError: the loss became NaN or infinite; the last good state is on disk.
    """
    model = state.model.train()
    network: nn.Module = torch.compile(model) if options.compile else model  # type: ignore[assignment]
    device = next(model.parameters()).device
    total = recipe.epochs * recipe.pairs_per_epoch
    began, spent_before, pairs_before = time.monotonic(), state.seconds, state.pairs
    saved = logged = began
    meter = _Meter()
    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / "log.jsonl", "a", encoding="utf-8") as log:
        while state.pairs < total:
            elapsed = time.monotonic() - began
            progress = state.pairs / total
            if options.time_budget is not None:
                progress = max(progress, elapsed / options.time_budget)
            if progress >= 1:
                break
            rate = recipe.rate(state.step, progress)
            for group in state.optimiser.param_groups:
                group["lr"] = rate * group["scale"]
            pairs = draw(recipe.batch)
            with torch.autocast(device.type, torch.bfloat16) if options.bf16 else nullcontext():
                prediction = network(pairs.template, pairs.search)
            loss, terms = tracking_loss(prediction, pairs, recipe.loss)
            if not math.isfinite(loss.item()):
                raise DivergedError(
                    f"the loss is {loss.item()} at step {state.step}: resume from {options.folder} with a lower --lr"
                )
            state.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            state.optimiser.step()
            state.step += 1
            state.pairs += recipe.batch
            state.seconds = spent_before + time.monotonic() - began
            if recipe.ema:
                state.update_ema(recipe.ema)
            meter.add(loss=loss.item(), **{k: v.item() for k, v in terms.items()})
            now = time.monotonic()
            if now - logged > 5:
                logged = now
                row = {
                    "step": state.step,
                    "pairs": state.pairs,
                    "seconds": round(state.seconds, 1),
                    "lr": rate,
                    "pairs_per_s": (state.pairs - pairs_before) / (now - began),
                    **meter.values,
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                _report(row, progress)
            if now - saved > options.save_every:
                saved = now
                state.save(options.folder, describe)
    state.save(options.folder, describe)


class _Meter:
    """Exponentially averaged values for the progress line."""

    def __init__(self) -> None:
        self.values: Dict[str, float] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.values[name] = 0.98 * self.values.get(name, value) + 0.02 * value


def _report(row: Dict[str, Any], progress: float) -> None:
    line = (
        f"{100 * progress:5.1f} %  {row['pairs']:>9,} pairs  {row['pairs_per_s']:6.1f} pairs/s  "
        f"loss {row['loss']:.3f}  IoU {row['iou']:.3f}"
    )
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
