"""A run's state on disk: safetensors pieces and a JSON index, replaced atomically.

Weights, averaged weights, the optimiser's two moments and what a teacher is read out with are files of
their own, so that none is larger than the model; the index names them and is renamed into place last. A
run killed at any moment finds either the old state or the new one, whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymtrack_edge.errors import CheckpointError

INDEX = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Guard:
    """Watches the averaged loss of a run; see ``Recipe.divergence``.

    Attributes:
        average: mean of the last ``memory`` losses, roughly; each weighs less than the one after it.
        best: the lowest average.
        steps: how many losses were taken in.
        above: for how many steps in a row the average has been too high.
    """

    average: float = 0.0
    best: float = float("inf")
    steps: int = 0
    above: int = 0

    def add(self, loss: float, limit: float, memory: int = 20) -> None:
        """Takes in a loss; an average above ``limit`` times the best counts as too high."""
        self.steps += 1
        self.average += (loss - self.average) / min(self.steps, memory)
        if self.steps >= memory:
            self.best = min(self.best, self.average)
        self.above = self.above + 1 if self.average > limit * self.best else 0

    @property
    def good(self) -> bool:
        """Whether the state is worth keeping: the average is within a fifth of the best."""
        return self.average <= 1.2 * self.best


@dataclass
class RunState:
    """Everything that a run needs to go on exactly where it stopped.

    What is drawn at each step depends on the step alone (see ``crops.Random``), so nothing random needs
    to be kept.

    Attributes:
        model: in training form.
        optimiser: AdamW over all parameters.
        readouts: layers that only a teacher needs; None without one.
        ema: averaged weights and buffers, by ``state_dict`` key; empty if not kept.
        step, pairs: how far the run is.
        seconds: time spent so far.
        rate: factor on the recipe's learning rate, halved when the run goes back.
        guard: see there.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    readouts: Optional[nn.Module] = None
    ema: Dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    pairs: int = 0
    seconds: float = 0.0
    rate: float = 1.0
    guard: Guard = field(default_factory=Guard)

    def named_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """All that is learnt, the read-outs' under ``readouts``."""
        yield from self.model.named_parameters()
        if self.readouts is not None:
            yield from self.readouts.named_parameters("readouts")

    def update_ema(self, decay: float) -> None:
        """Moves the averaged weights towards the model's; faster at the start of a run."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        averaged, current = [], []
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point() and name in self.ema:
                    averaged.append(self.ema[name])
                    current.append(value)
                else:
                    self.ema[name] = value.clone()
            if averaged:
                torch._foreach_lerp_(averaged, current, 1 - decay)

    def best_weights(self) -> Dict[str, Tensor]:
        """Averaged weights where they are kept, else the model's."""
        return self.ema or self.model.state_dict()

    def save(self, folder: Path) -> None:
        """Writes the state into ``folder``; what was there before is removed afterwards."""
        folder.mkdir(parents=True, exist_ok=True)
        pieces = {"model": self.model.state_dict(), "ema": self.ema}
        pieces["readouts"] = {} if self.readouts is None else self.readouts.state_dict()
        pieces.update({moment: self._moments(moment) for moment in MOMENTS})
        files = {}
        for name, tensors in pieces.items():
            if tensors:
                files[name] = f"{name}-{self.step}.safetensors"
                save_tensors(folder / files[name], tensors)
        index = {"files": files, **{name: getattr(self, name) for name in ("step", "pairs", "seconds", "rate")}}
        index["guard"] = asdict(self.guard)
        # Not every parameter takes part in every step (see Recipe.shallow_every).
        index["updates"] = {name: int(value) for name, value in self._moments("step").items()}
        save_json(folder / INDEX, index)
        for path in folder.glob("*-*.safetensors"):
            if path.name not in files.values():
                path.unlink()

    def load(self, folder: Path) -> None:
        """Reads a saved state back.

        Raises:
            CheckpointError: the folder holds no complete state, or one of another model.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            pieces = {name: load_file(str(folder / file)) for name, file in index["files"].items()}
            self.model.load_state_dict(pieces["model"])
            if self.readouts is not None and "readouts" in pieces:
                self.readouts.load_state_dict(pieces["readouts"])
            self.step, self.pairs, self.seconds = index["step"], index["pairs"], index["seconds"]
            self.rate, self.guard = index.get("rate", 1.0), Guard(**index.get("guard", {}))
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from None
        except RuntimeError:
            raise CheckpointError(f"the state in {folder} is of another variant: check --variant") from None
        device = next(self.model.parameters()).device
        self.ema = {name: value.to(device) for name, value in pieces.get("ema", {}).items()}
        self.optimiser.state.clear()
        for name, parameter in self.named_parameters():
            if name in pieces.get(MOMENTS[0], {}):
                moments = {moment: pieces[moment][name].to(device) for moment in MOMENTS}
                updates = float(index.get("updates", {}).get(name, self.step))
                # The fused AdamW of a GPU counts there.
                count = torch.tensor(updates, device=device if device.type == "cuda" else None)
                self.optimiser.state[parameter] = {"step": count, **moments}

    def _moments(self, moment: str) -> Dict[str, Tensor]:
        state = self.optimiser.state
        return {n: state[p][moment] for n, p in self.named_parameters() if p in state}


def has_state(folder: Path) -> bool:
    """Whether ``folder`` holds a saved state."""
    return (folder / INDEX).is_file()


def save_tensors(path: Path, tensors: Dict[str, Tensor]) -> None:
    """Writes a safetensors file atomically."""
    plain = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    _replace(path, lambda beside: save_file(plain, str(beside)))


def save_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    _replace(path, lambda beside: beside.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path``, reaches for the disk, and only then takes the name."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
