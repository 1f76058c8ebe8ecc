"""Helpers for all tests: made-up weights, files and inputs, and the published implementation's outputs for them."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor

from asymtrack_edge.checkpoints import open_checkpoint
from asymtrack_edge.errors import CheckpointError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.variants import VARIANTS, Variant

GOLDEN = Path(__file__).parent / "data" / "golden"

#: T with fewer blocks and small crops, for tests that need many runs.
SMALL = replace(VARIANTS["T"], depths=(1, 2, 1), template_size=64, search_size=96)

#: The smallest network that this architecture allows: a file of 4 MB.
TINY = replace(VARIANTS["T"], widths=(32, 32, 32, 32), depths=(1, 1, 1), attention_heads=1)


def fill(key: str, shape: Tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Reproducible values for the tensor ``key``, the same in any implementation (see data/golden/README.md)."""
    r = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    draws = {
        "running_var": (r.uniform, 0.5, 1.5),
        "running_mean": (r.normal, 0, 0.1),
        "gamma_1": (r.uniform, 0.2, 0.6),
        "ibe_scale": (r.normal, 0, 0.5),
        "theta": (r.normal, 0, 1),
    }
    if last in draws or len(shape) == 1:
        draw, *range_ = draws.get(last) or ((r.uniform, 0.8, 1.2) if last == "weight" else (r.normal, 0, 0.1))
        values = draw(*range_, shape)
    else:
        values = r.normal(0, 1, shape) * np.sqrt(2 / np.prod(shape[1:])) * (8 if ".conv5_" in key else 1)
    return values.astype(np.float32)


def fill_all(shapes: Dict[str, Tuple[int, ...]], seed: int = 0) -> Dict[str, Tensor]:
    return {key: torch.from_numpy(np.asarray(fill(key, tuple(shape), seed))) for key, shape in shapes.items()}


def filled_model(variant: Variant, seed: int = 0) -> AsymTrack:
    model = AsymTrack(variant).eval()
    model.load_state_dict(fill_all({key: tuple(v.shape) for key, v in model.state_dict().items()}, seed))
    return model


def export_small(folder: Path, *options: Any, **more: Any) -> Path:
    """Exports ``SMALL`` with made-up weights, without verification; the arguments are those of ``ExportOptions``."""
    from asymtrack_edge.export.pipeline import Export, ExportOptions

    folder.mkdir(exist_ok=True)
    Export(filled_model(SMALL), ExportOptions(*options, **more)).write(folder).save(folder)
    return folder


def random_inputs(variant: Variant, batch: int = 1) -> Tuple[Tensor, Tensor]:
    """Template and search crops ``(batch, 3, side, side)`` of normally distributed noise."""
    r = np.random.RandomState(7)
    sides = (variant.template_size, variant.search_size)
    template, search = (r.normal(0, 1, (batch, 3, side, side)).astype(np.float32) for side in sides)
    return torch.from_numpy(template), torch.from_numpy(search)


def golden_answers(name: str) -> Dict[str, np.ndarray]:
    """The published implementation's outputs for variant ``name`` and seed 0."""
    with np.load(GOLDEN / f"official_{name}_seed0.npz") as answers:
        return dict(answers)


def official_shapes(name: str) -> Dict[str, Tuple[int, ...]]:
    """Keys and shapes of the published network's state_dict, unused modules included."""
    keys = json.loads((GOLDEN / f"official_keys_{name}.json").read_text())
    return {key: tuple(shape) for key, shape in keys.items()}


def refused(path: Path, variant: Variant = TINY, weights: Optional[str] = None) -> str:
    """The one-line error message for a checkpoint that must be refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, weights).tensors(variant)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def refusal(main: Callable[[List[str]], Optional[int]], arguments: List[str], capsys: Any) -> str:
    """The one-line error message of a command that must end with exit code 2."""
    try:
        code: Any = main(arguments)
    except SystemExit as ended:  # raised by argparse
        code = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: ")
    return line


class Calls:
    """Pickles as a call of ``function``; unpickling then sets ``state`` on the result."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Makes an instance callable, so that pickle accepts it as a function."""
