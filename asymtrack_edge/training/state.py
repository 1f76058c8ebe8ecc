"""A run's state on disk: one safetensors file. A kill at any moment leaves the old state or the new one, complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.files import write_bytes
from asymtrack_edge.training.teacher import Student

STATE = "state.safetensors"
#: Fields of ``RunState`` that are stored in the file's metadata, in addition to ``guard``.
COUNTS = ("step", "pairs", "seconds", "rate")
#: AdamW's state of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Guard:
    """Watches the averaged loss of a run: the run has diverged when ``above`` becomes too large."""

    average: float = 0.0  #: roughly the mean of the last 20 losses, with more weight on later ones
    best: float = float("inf")  #: the lowest average
    steps: int = 0  #: number of losses added
    above: int = 0  #: number of successive steps in which the average has been above 1.5 times the best

    def add(self, loss: float) -> None:
        self.steps += 1
        self.average += (loss - self.average) / min(self.steps, 20)
        if self.steps >= 20:
            self.best = min(self.best, self.average)
        self.above = self.above + 1 if self.average > 1.5 * self.best else 0

    @property
    def good(self) -> bool:
        """Whether the state is worth keeping: the average is at most 1.2 times the best."""
        return self.average <= 1.2 * self.best


@dataclass
class RunState:
    """Everything that a run needs to resume exactly where it stopped; the pairs depend on the step alone."""

    model: nn.Module  #: in training form
    optimiser: torch.optim.Optimizer  #: AdamW over all parameters
    student: Optional[Student] = None  #: the model with the layers that only a teacher needs
    ema: Dict[str, Tensor] = field(default_factory=dict)  #: averaged ``state_dict``; empty if not kept
    step: int = 0
    pairs: int = 0
    seconds: float = 0.0  #: time spent so far
    rate: float = 1.0  #: factor on the recipe's learning rate, halved when the run goes back
    guard: Guard = field(default_factory=Guard)

    def named_parameters(self) -> Iterator[Tuple[str, nn.Parameter]]:
        """All trained parameters, those of the read-outs under ``readouts``."""
        yield from self.model.named_parameters()
        if self.student is not None:
            yield from self.student.readouts.named_parameters("readouts")

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

    def save(self, folder: Path) -> None:
        """Writes the state into ``folder``, its tensors as ``model/NAME``, ``ema/NAME``, ``exp_avg/NAME`` and so on."""
        parts = {"model": self.model.state_dict(), "ema": self.ema}
        if self.student is not None:
            parts["readouts"] = self.student.readouts.state_dict()
        # Not every parameter takes part in every step (see Recipe.shallow_every).
        moments = {n: self.optimiser.state[p] for n, p in self.named_parameters() if p in self.optimiser.state}
        parts.update({key: {n: state[key] for n, state in moments.items()} for key in MOMENTS})
        tensors = {f"{part}/{name}": t.detach().cpu() for part, values in parts.items() for name, t in values.items()}
        counts = json.dumps({**{name: getattr(self, name) for name in COUNTS}, "guard": asdict(self.guard)})
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".state.*.part"):  # left by a run that was killed
            left.unlink()
        write_bytes(folder / STATE, save({n: t.contiguous() for n, t in tensors.items()}, {"counts": counts}))

    def load(self, folder: Path) -> None:
        """Reads a state; raises ``CheckpointError`` if the folder holds no complete one, or one of another model."""
        parts: Dict[str, Dict[str, Tensor]] = {key: {} for key in ("model", "ema", "readouts", *MOMENTS)}
        device = next(self.model.parameters()).device
        try:
            with safe_open(folder / STATE, "pt") as file:
                counts = json.loads((file.metadata() or {})["counts"])
                for key in file.keys():  # noqa: SIM118  (it is not a dictionary)
                    part, _, name = key.partition("/")
                    parts[part][name] = file.get_tensor(key).clone()  # a copy, because the file is replaced
            self.model.load_state_dict(parts["model"])
            if self.student is not None and parts["readouts"]:
                self.student.readouts.load_state_dict(parts["readouts"])
            moments = {name: {key: parts[key][name] for key in MOMENTS} for name in parts["step"]}
            self.guard = Guard(**counts["guard"])
            for name in COUNTS:
                setattr(self, name, counts[name])
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"cannot resume from {folder}: {error}") from None
        except RuntimeError:
            raise CheckpointError(f"the state in {folder} is of another variant than the one in its run.json") from None
        self.ema = {name: tensor.to(device) for name, tensor in parts["ema"].items()}
        self.optimiser.state.clear()
        for name, parameter in self.named_parameters():
            if name in moments:
                self.optimiser.state[parameter] = {key: tensor.to(device) for key, tensor in moments[name].items()}


def has_state(folder: Path) -> bool:
    """Whether ``folder`` holds a saved state."""
    return (folder / STATE).is_file()
