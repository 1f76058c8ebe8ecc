"""One call of ``asymtrack-train``: from configuration and folder to saved weights."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Optional

import torch

from asymtrack_edge.errors import MissingDependencyError, UsageError
from asymtrack_edge.training.distillation import EfficientNetTeacher, distill
from asymtrack_edge.training.distributed import World, join_world
from asymtrack_edge.training.loop import RunOptions, Trainer, make_optimiser
from asymtrack_edge.training.progress import LOG, plot_run
from asymtrack_edge.training.runs import CONFIG, Data, RunConfig, held_out_iou, make_model, open_data
from asymtrack_edge.training.state import INDEX, RunState, has_state


def run_session(
    config: RunConfig,
    folder: Path,
    resume: bool = False,
    device: str = "auto",
    time_budget: Optional[float] = None,
    compile_network: bool = False,
) -> bool:
    """Trains a run, from its beginning or from where it stopped.

    Args:
        config: stored in the folder.
        folder: of the run.
        resume: the folder holds a run to go on with.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        time_budget: seconds after which training stops, saved; loading and distilling not counted.
        compile_network: use ``torch.compile``.

    Returns:
        Whether the recipe's pairs are used up.

    Raises:
        UsageError: the folder holds another run, or the configuration cannot be right.
        AsymTrackError: data, weights or extras are missing; or the loss diverged.
    """
    if not resume and has_state(folder):
        raise UsageError(f"{folder} holds a run already: --resume {folder}, or choose another --output")
    world = join_world(device)
    try:
        data = open_data(config, world, folder)
        try:
            return _train(config, folder, data, world, time_budget, compile_network)
        finally:
            data.close()
    finally:
        world.leave()


def _train(
    config: RunConfig,
    folder: Path,
    data: Data,
    world: World,
    time_budget: Optional[float],
    compile_network: bool,
) -> bool:
    model = make_model(config, world.device)
    recipe = config.recipe
    bf16 = recipe.bf16 and has_bf16(world.device)
    if world.is_main:
        config.save(folder)
        _report(config, data, world, bf16)
    state = RunState(model, {}, make_optimiser(model, recipe))
    if has_state(folder):
        state.load(folder)
    elif config.distill:
        _distill(config, folder, data, state, world, bf16)
    options = RunOptions(
        folder,
        time_budget,
        bf16=bf16,
        compile=compile_network,
        metadata={"variant": config.variant, "seed": str(config.seed)},
    )
    world.wait()
    finished = Trainer(state, data.draw, recipe, options, world).run()
    if world.is_main:
        _conclude(state, data, folder)
        if not finished:
            print(f"continue with: asymtrack-train --resume {folder}", file=sys.stderr)
    world.wait()
    return finished


def _distill(config: RunConfig, folder: Path, data: Data, state: RunState, world: World, bf16: bool) -> None:
    """Teaches the encoder, in the main process: the others take its weights over when they join."""
    if data.pool is None:
        raise UsageError("--distill needs imagery in memory: name a folder with --data")
    if world.is_main:
        teacher = EfficientNetTeacher()
        distill(state.model, teacher, data.pool, config.distill, folder / "distill", config.seed, bf16)  # type: ignore[arg-type]


def _report(config: RunConfig, data: Data, world: World, bf16: bool) -> None:
    numbers = "bf16" if bf16 else "fp32"
    threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    what = "pairs read from disk"
    if data.pool is not None:
        what = f"{len(data.pool.canvases):,} images, {len(data.pool):,} targets, {len(data.pool.cutouts):,} cut-outs"
    print(
        f"AsymTrack-{config.variant} on {world.size} x {world.device} ({numbers}{threads}): {what}",
        file=sys.stderr,
    )


def _conclude(state: RunState, data: Data, folder: Path) -> None:
    """Adds the held-out IoU of the averaged weights to the log, and draws it."""
    if data.held_out is not None:
        iou = held_out_iou(state.model, state.best_weights(), data.held_out)
        with open(folder / LOG, "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": state.step, "pairs": state.pairs, "held_out_iou": iou}) + "\n")
        print(f"held-out IoU {iou:.3f} after {state.pairs:,} pairs", file=sys.stderr)
    try:
        plot_run(folder)
    except (MissingDependencyError, UsageError) as reason:
        print(f"no plot: {reason}", file=sys.stderr)


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 by itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def copy_state(source: Path, target: Path) -> None:
    """Copies a run's state, to go on with it in another folder.

    Raises:
        UsageError: the target holds a run already, or the source none.
    """
    if has_state(target):
        raise UsageError(f"{target} holds a run already: choose another --output")
    if not has_state(source):
        raise UsageError(f"{source} holds no saved state yet")
    target.mkdir(parents=True, exist_ok=True)
    for path in [*source.glob("*-*.safetensors"), *(source / name for name in (LOG, CONFIG))]:
        if path.is_file():
            shutil.copy2(path, target / path.name)
    # Last: only with it the copy is a state.
    shutil.copy2(source / INDEX, target / INDEX)
