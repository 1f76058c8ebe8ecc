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
from typing import Any, Dict, Optional

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asymtrack_edge.errors import CheckpointError

INDEX = "state.json"


@dataclass
class RunState:
    """Everything that a run needs to go on exactly where it stopped.

    Attributes:
        model: in training form.
        ema: averaged weights and buffers, by ``state_dict`` key; empty if not kept.
        optimiser: AdamW over the model's parameters.
        generator: the source of the data order.
        step, pairs: how far the run is.
        seconds: time spent so far.
    """

    model: nn.Module
    ema: Dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
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
        pieces = {"model": _plain(self.model.state_dict()), "ema": _plain(self.ema)}
        for moment in ("exp_avg", "exp_avg_sq"):
            pieces[moment] = _plain(self._moments(moment))
        files = {}
        for name, tensors in pieces.items():
            if tensors:
                files[name] = f"{name}-{self.step}.safetensors"
                _write(folder / files[name], lambda path, t=tensors: save_file(t, str(path)))  # type: ignore[misc]
        index = {
            "files": files,
            "step": self.step,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "generator": bytes(self.generator.get_state().tolist()).hex(),
            **(extra or {}),
        }
        _write(folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1)))
        for path in folder.glob("*-*.safetensors"):
            if path.name not in files.values():
                path.unlink()

    def load(self, folder: Path) -> Dict[str, Any]:
        """Reads a saved state back; returns the index.

        Raises:
            CheckpointError: the folder holds no complete state.
        """
        try:
            index = json.loads((folder / INDEX).read_text())
            pieces = {name: load_file(str(folder / file)) for name, file in index["files"].items()}
            self.model.load_state_dict(pieces["model"])
            device = next(self.model.parameters()).device
            self.ema = {name: value.to(device) for name, value in pieces.get("ema", {}).items()}
            self.generator.set_state(torch.tensor(list(bytes.fromhex(index["generator"])), dtype=torch.uint8))
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from None
        self.step, self.pairs, self.seconds = index["step"], index["pairs"], index["seconds"]
        if "exp_avg" in pieces:
            for name, parameter in self.model.named_parameters():
                if name in pieces["exp_avg"]:
                    self.optimiser.state[parameter] = {
                        "step": torch.tensor(float(self.step)),
                        "exp_avg": pieces["exp_avg"][name].to(device),
                        "exp_avg_sq": pieces["exp_avg_sq"][name].to(device),
                    }
        return index

    def _moments(self, moment: str) -> Dict[str, Tensor]:
        state = self.optimiser.state
        return {n: state[p][moment] for n, p in self.model.named_parameters() if p in state}


def _plain(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in tensors.items()}


def _write(path: Path, write: Any) -> None:
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)
