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
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.files import OutputFile

INDEX = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
#: What of a ``RunState`` the index holds as it is.
COUNTS = ("step", "pairs", "seconds", "rate")


@dataclass
class Guard:
    """Watches the averaged loss of a run: it has diverged when ``above`` has become too large."""

    average: float = 0.0  #: mean of the last 20 losses, roughly; each weighs less than the one after it
    best: float = float("inf")  #: the lowest average
    steps: int = 0  #: how many losses were taken in
    above: int = 0  #: for how many steps in a row the average has been 1.5 times the best or more

    def add(self, loss: float) -> None:
        """Takes in the loss of a step."""
        self.steps += 1
        self.average += (loss - self.average) / min(self.steps, 20)
        if self.steps >= 20:
            self.best = min(self.best, self.average)
        self.above = self.above + 1 if self.average > 1.5 * self.best else 0

    @property
    def good(self) -> bool:
        """Whether the state is worth keeping: the average is within a fifth of the best."""
        return self.average <= 1.2 * self.best


@dataclass
class RunState:
    """Everything that a run needs to go on exactly where it stopped; what is drawn depends on the step alone."""

    model: nn.Module  #: in training form
    optimiser: torch.optim.Optimizer  #: AdamW over all parameters
    readouts: Optional[nn.Module] = None  #: layers that only a teacher needs
    ema: Dict[str, Tensor] = field(default_factory=dict)  #: averaged ``state_dict``; empty if not kept
    step: int = 0
    pairs: int = 0
    seconds: float = 0.0  #: time spent so far
    rate: float = 1.0  #: factor on the recipe's learning rate, halved when the run goes back
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
        files = {name: f"{name}-{self.step}.safetensors" for name, tensors in pieces.items() if tensors}
        for name, file in files.items():
            save_tensors(folder / file, pieces[name])
        index = {"files": files, **{name: getattr(self, name) for name in COUNTS}, "guard": asdict(self.guard)}
        # Not every parameter takes part in every step (see Recipe.shallow_every).
        index["updates"] = {name: int(value) for name, value in self._moments("step").items()}
        save_json(folder / INDEX, index)
        for path in folder.glob("*-*.safetensors"):
            if path.name not in files.values():
                path.unlink()

    def load(self, folder: Path) -> None:
        """Reads a state back; CheckpointError where the folder holds no complete one, or one of another model."""
        device = next(self.model.parameters()).device
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            pieces = {name: load_file(str(folder / file)) for name, file in index["files"].items()}
            self.model.load_state_dict(pieces["model"])
            if self.readouts is not None and "readouts" in pieces:
                self.readouts.load_state_dict(pieces["readouts"])
            for name in COUNTS:
                setattr(self, name, index[name])
            self.guard = Guard(**index["guard"])
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from None
        except RuntimeError:
            raise CheckpointError(f"the state in {folder} is of another variant: check --variant") from None
        self.ema = {name: value.to(device) for name, value in pieces.get("ema", {}).items()}
        self.optimiser.state.clear()
        for name, parameter in self.named_parameters():
            if name in pieces.get(MOMENTS[0], {}):
                moments = {moment: pieces[moment][name].to(device) for moment in MOMENTS}
                # The fused AdamW of a GPU counts there.
                count = torch.tensor(float(index["updates"][name]), device=device if device.type == "cuda" else None)
                self.optimiser.state[parameter] = {"step": count, **moments}

    def _moments(self, moment: str) -> Dict[str, Tensor]:
        state = self.optimiser.state
        return {n: state[p][moment] for n, p in self.named_parameters() if p in state}


def has_state(folder: Path) -> bool:
    """Whether ``folder`` holds a saved state."""
    return (folder / INDEX).is_file()


def save_tensors(path: Path, tensors: Dict[str, Tensor]) -> None:
    """Writes a safetensors file atomically."""
    _write(path, save({name: value.detach().contiguous().cpu() for name, value in tensors.items()}))


def save_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    _write(path, json.dumps(value, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    """Writes beside ``path``, reaches for the disk, and only then takes the name."""
    with OutputFile(path) as file:
        file.write(data)
        with open(file.place, "rb") as written:
            os.fsync(written.fileno())
