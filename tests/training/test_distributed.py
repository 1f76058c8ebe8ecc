"""Several processes, started as on two machines, learn what one process does with all of their pairs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asymtrack_edge.training.state import INDEX

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.distributed import join_world
from asymtrack_edge.training.loop import Trainer, make_state
from asymtrack_edge.training.recipes import PAPER
from asymtrack_edge.training.state import save_tensors
from asymtrack_edge.variants import VARIANTS
from tests.training.conftest import random_pairs

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
with join_world("cpu") as world:
    variant = VARIANTS["T"].with_(template_size=32, search_size=64)
    recipe = replace(PAPER, batch=4 // world.size, pairs_per_epoch=4, epochs=steps, corner_loss=0.5)
    torch.manual_seed(world.rank)
    state = make_state(AsymTrack(variant), recipe)
    whole = random_pairs(variant, 4)
    # Of four pairs one has no target: the processes do not have equally many.
    whole = whole._replace(present=torch.tensor([True, True, True, False]))
    mine = slice(world.rank * recipe.batch, (world.rank + 1) * recipe.batch)
    pairs = type(whole)(*(part[mine] for part in whole))
    trainer = Trainer(state, lambda b, s: pairs, recipe, folder, world, log_every=0.0)
    assert trainer.run() and state.pairs == 4 * steps, state.pairs
    tensors = {n: p for n, p in state.model.named_parameters()}
    tensors.update({f"buffer.{n}": b.float() for n, b in state.model.named_buffers()})
    tensors.update({f"grad.{n}": p.grad for n, p in state.model.named_parameters() if p.grad is not None})
    save_tensors(folder / f"rank_{world.rank}.safetensors", tensors)
"""


PATHS = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


def on_two_nodes(script: Path, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "--node_rank", rank, str(script), *arguments],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [agent.communicate(timeout=300)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_does_with_twice_the_batch(tmp_path: Path) -> None:
    steps, script = 3, tmp_path / "worker.py"
    script.write_text(WORKER)
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    one.mkdir()
    subprocess.run([sys.executable, str(script), str(one), str(steps)], env=ENVIRONMENT, check=True, timeout=300)
    on_two_nodes(script, str(two), str(steps))
    alone = load_file(str(one / "rank_0.safetensors"))
    first, second = (load_file(str(two / f"rank_{rank}.safetensors")) for rank in (0, 1))
    for name in alone:
        assert torch.equal(first[name], second[name]), name
    gradients = [name for name in alone if name.startswith("grad.")]
    size = torch.stack([alone[name].norm() for name in gradients]).norm()
    apart = torch.stack([(alone[name] - first[name]).norm() for name in gradients]).norm()
    assert len(gradients) > 100 and apart < 1e-3 * size
    for name in alone:
        if "grad." not in name and "num_batches" not in name:
            torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=2e-4, msg=name)
    assert (two / INDEX).is_file() and len(list(two.glob("model-*.safetensors"))) == 1
