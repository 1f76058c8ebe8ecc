"""Several processes learn what one process does with all of their pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.distributed import join_world
from asymtrack_edge.training.loop import Trainer, make_state
from asymtrack_edge.training.recipes import PAPER
from tests.helpers import SMALL
from tests.training.conftest import random_pairs

folder = Path(sys.argv[1])
with join_world("cpu") as world:
    recipe = replace(PAPER, batch=4 // world.size, pairs_per_epoch=4, epochs=3, corner_loss=0.5)
    torch.manual_seed(world.rank)
    state = make_state(AsymTrack(SMALL), recipe)
    whole = random_pairs(SMALL, 4)
    # Of four pairs one has no target: the processes do not have equally many.
    whole = whole._replace(present=torch.tensor([True, True, True, False]))
    mine = slice(world.rank * recipe.batch, (world.rank + 1) * recipe.batch)
    pairs = type(whole)(*(part[mine] for part in whole))
    trainer = Trainer(state, lambda b, s: pairs, recipe, folder, world, log_every=0.0)
    assert trainer.run() and state.pairs == 12, state.pairs
    tensors = {n: v.float() for n, v in state.model.state_dict().items()}
    tensors.update({f"grad.{n}": p.grad for n, p in state.model.named_parameters() if p.grad is not None})
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / f"rank_{world.rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    script, results = tmp_path / "worker.py", []
    script.write_text(WORKER)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script), str(folder)]
        subprocess.run([sys.executable, *run], env=environment, check=True, timeout=300)
        results += [load_file(str(folder / f"rank_{rank}.safetensors")) for rank in range(count)]
        assert (folder / "weights.safetensors").is_file() and (folder / "log.jsonl").is_file()
    alone, first, second = results
    assert all(torch.equal(first[name], second[name]) for name in alone)
    gradients = [name for name in alone if name.startswith("grad.")]
    size = torch.stack([alone[name].norm() for name in gradients]).norm()
    apart = torch.stack([(alone[name] - first[name]).norm() for name in gradients]).norm()
    assert len(gradients) > 60 and apart < 1e-3 * size
    for name in set(alone) - set(gradients):
        torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=2e-4, msg=name)
