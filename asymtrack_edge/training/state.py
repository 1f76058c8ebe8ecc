"""A run's state on disk: safetensors pieces and a JSON index, replaced atomically.

Weights, averaged weights and the optimiser's two moments are files of their own, so that none is
larger than the model; the index names them and is renamed into place last, so that a run killed at
any moment finds either the old state or the new one, whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymtrack_edge.errors import CheckpointError

INDEX = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class RunState:
    """Everything that a run needs to go on exactly where it stopped.

    What is drawn at each step depends on the step alone (see ``randomness``), so nothing random
    needs to be kept.

    Attributes:
        model: in training form.
        ema: averaged weights and buffers, by ``state_dict`` key; empty if not kept.
        optimiser: AdamW over the model's parameters.
        step, pairs: how far the run is.
        seconds: time spent so far.
    """

    model: nn.Module
    ema: Dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    step: int = 0
    pairs: int = 0
    seconds: float = 0.0

    def update_ema(self, decay: float) -> None:
        """Moves the averaged weights towards the model's; faster at the start of a run."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point() and name in self.ema:
                    self.ema[name].lerp_(value, 1 - decay)
                else:
                    self.ema[name] = value.clone()

    def best_weights(self) -> Dict[str, Tensor]:
        """Averaged weights where they are kept, else the model's."""
        return self.ema or self.model.state_dict()

    def save(self, folder: Path, extra: Optional[Dict[str, Any]] = None) -> None:
        """Writes the state into ``folder``; what was there before is removed afterwards."""
        folder.mkdir(parents=True, exist_ok=True)
        pieces = {"model": self.model.state_dict(), "ema": self.ema}
        pieces.update({moment: self._moments(moment) for moment in MOMENTS})
        files = {}
        for name, tensors in pieces.items():
            if tensors:
                files[name] = f"{name}-{self.step}.safetensors"
                save_tensors(folder / files[name], tensors)
        index = {"files": files, "step": self.step, "pairs": self.pairs, "seconds": self.seconds, **(extra or {})}
        # Not every parameter takes part in every step (see Recipe.shallow_every).
        index["updates"] = {name: int(value) for name, value in self._moments("step").items()}
        save_json(folder / INDEX, index)
        for path in folder.glob("*-*.safetensors"):
            if path.name not in files.values():
                path.unlink()

    def load(self, folder: Path) -> Dict[str, Any]:
        """Reads a saved state back; returns the index.

        Raises:
            CheckpointError: the folder holds no complete state, or one of another model.
        """
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            pieces = {name: load_file(str(folder / file)) for name, file in index["files"].items()}
            self.model.load_state_dict(pieces["model"])
            self.step, self.pairs, self.seconds = index["step"], index["pairs"], index["seconds"]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from None
        except RuntimeError:
            raise CheckpointError(f"the state in {folder} is of another variant: check --variant") from None
        device = next(self.model.parameters()).device
        self.ema = {name: value.to(device) for name, value in pieces.get("ema", {}).items()}
        for name, parameter in self.model.named_parameters():
            if name in pieces.get(MOMENTS[0], {}):
                moments = {moment: pieces[moment][name].to(device) for moment in MOMENTS}
                updates = float(index.get("updates", {}).get(name, self.step))
                self.optimiser.state[parameter] = {"step": torch.tensor(updates), **moments}
        return index

    def _moments(self, moment: str) -> Dict[str, Tensor]:
        state = self.optimiser.state
        return {n: state[p][moment] for n, p in self.model.named_parameters() if p in state}


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
