"""A training run: its stored configuration, data and network, from the first step to the saved weights."""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import zlib
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import nn

from asymtrack_edge import cli
from asymtrack_edge.checkpoints import bundled_weights, open_checkpoint
from asymtrack_edge.datasets import Dataset
from asymtrack_edge.errors import CheckpointError, UsageError
from asymtrack_edge.files import system_text, write_text
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.crops import Augmentation
from asymtrack_edge.training.distributed import World, join_world
from asymtrack_edge.training.imagery import LeftOut, load_pool
from asymtrack_edge.training.labels import find_videos, label_videos
from asymtrack_edge.training.log import LOG, plot_run
from asymtrack_edge.training.loop import Trainer, make_state
from asymtrack_edge.training.pairs import DiskPairs, DrawPairs, PairSampler
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import Guard, has_state
from asymtrack_edge.training.teacher import Teacher
from asymtrack_edge.variants import VARIANTS, get_variant

CONFIG = "run.json"

#: With this many annotated stills and clips or fewer, all may show one object: then no negatives are made.
FEW = 200


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run learns; stored with it as ``run.json``."""

    recipe: Recipe
    variant: str = "T"
    data: Tuple[str, ...] = ()  #: folders held in memory: collections, annotated clips, images, videos
    datasets: Dict[str, str] = field(default_factory=dict)  #: folders read from disk, by names such as ``"lasot"``
    teacher: Optional[str] = None  #: folder of the teacher's graphs
    seed: int = 0  #: decides initial weights and all pairs
    init: Optional[str] = None  #: weights to start from: a file, or the name of a bundled variant
    canvas: int = 320  #: images in memory are shrunk to this many pixels on their long side
    workers: Optional[int] = None  #: threads that read frames from disk; None for one per CPU, up to 16

    @staticmethod
    def load(folder: Path) -> RunConfig:
        """Reads ``run.json``; raises ``UsageError`` if it is missing, damaged or of another version."""
        path = folder / CONFIG
        if not has_state(folder) or not path.is_file():
            raise UsageError(f"cannot resume: {folder} holds no run")
        try:
            values: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            recipe, data = values.pop("recipe"), tuple(values.pop("data"))
            augmentation = Augmentation(**recipe.pop("augmentation"))
            return RunConfig(Recipe(**recipe, augmentation=augmentation), data=data, **values)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise UsageError(f"{path} does not fit this version: {error}") from None


def train(config: RunConfig, folder: Path, device: str, time_budget: float, retry: bool) -> Tuple[bool, int]:
    """Starts a run, or continues the one in ``folder``; for ``retry`` see ``Trainer``.

    Returns whether the recipe's pairs are used up, and how many files, sequences or videos were left out. Raises
    AsymTrackError if data, weights or extras are missing or the loss diverged. Raises KeyboardInterrupt, with the
    signal that ended the run, once everything is saved.
    """
    recipe = config.recipe
    with join_world(device) as world, ExitStack() as stack:
        # Quick steps come first, so that their errors are reported at once.
        torch.manual_seed(config.seed)
        model, init, resumes = AsymTrack(get_variant(config.variant)), config.init, has_state(folder)
        if init is not None and not resumes:
            load_initial(model, bundled_weights(get_variant(init)) if init.upper() in VARIANTS else Path(init))
        model.to(world.device)
        teacher = Teacher(Path(config.teacher), world.device) if config.teacher else None
        draw, what = _open_data(config, folder, world, left_out := LeftOut())
        state = make_state(model, recipe, taught=teacher is not None)
        if all(world.agree(resumes, not resumes)):
            raise UsageError(f"not every process sees the run in {folder}: use a folder that all machines share")
        if resumes:
            state.load(folder)
            before = RunConfig.load(folder)
            if before != config:
                # Another rate, size or data set changes the loss: its best value must be found anew.
                state.guard = Guard()
            if before.recipe.lr != recipe.lr:
                state.rate = 1.0  # the reduced factor applied to the old rate
        if world.device.type == "cpu":
            _keep_freed_memory()
        bf16 = recipe.bf16 and _has_bf16(world.device)
        world.wait()
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(folder / LOG, "a"))
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process is training in {folder}: end it, or use another folder") from None
            except OSError:  # this file system has no locks
                pass
            write_text(folder / CONFIG, json.dumps(asdict(config), indent=1))
            threads = f", threads: {torch.get_num_threads()}" if world.device.type == "cpu" else ""
            where = f"{world.size} x {world.device} ({'bf16' if bf16 else 'fp32'}{threads})"
            cli.say(f"AsymTrack-{config.variant} on {where}: {what}")
            if recipe.budget_is_length and math.isinf(time_budget):
                cli.say("without --time-budget this recipe trains until it is stopped; its learning rate never falls")
        metadata = {"variant": config.variant, "seed": str(config.seed)}
        trainer = Trainer(state, draw, recipe, folder, world, teacher, time_budget, retry, bf16, metadata)
        finished = trainer.run()
        if world.is_main:
            if (folder / LOG).stat().st_size:
                plot_run(folder)
            if not finished:
                more = " --time-budget SECONDS" if recipe.budget_is_length else ""
                cli.say(f"continue with: asymtrack-train --resume {folder}{more}")
        if left_out:
            cli.say(f"left out: {len(left_out)} files, sequences or videos")
        world.wait()
        if trainer.signals:
            raise KeyboardInterrupt(trainer.signals[0])
        return finished, len(left_out)


def load_initial(model: AsymTrack, path: Path) -> None:
    """Loads a file of weights into ``model``; raises ``CheckpointError`` if it is none or has blocks the model lacks.

    Weights of another variant are accepted, too: T grows into S or B, and S and B, which have the same tensors, into
    each other. An encoder block that the file lacks keeps its random weights and starts with ``gamma_1 = 0``: it
    passes its input through, so that the grown network gives the same output as the smaller one at first.
    """
    checkpoint = open_checkpoint(path)
    if not checkpoint.variants or model.variant.name in checkpoint.variants:
        model.load_state_dict(checkpoint.tensors(model.variant))
        return
    small = checkpoint.model(get_variant(checkpoint.variants[0]))
    if any(have > room for have, room in zip(small.variant.depths, model.variant.depths)):
        raise CheckpointError(
            f"{path} holds weights of variant {small.variant.name}, which has more encoder blocks than "
            f"{model.variant.name}: add --variant {small.variant.name}, or start from weights of {model.variant.name}"
        )
    outside = {name: value for name, value in small.state_dict().items() if ".blocks." not in name}
    model.load_state_dict(outside, strict=False)
    stages: Any = zip(small.variant.depths, small.backbone.layers, model.backbone.layers)
    for depth, old, new in stages:
        grown = len(new.blocks) - len(old.blocks)
        for block in new.blocks[depth : depth + grown]:
            nn.init.zeros_(block.gamma_1)
        # In the module list, ETM, OPE and attention come after the encoder blocks.
        for i, block in enumerate(old.blocks):
            new.blocks[i + grown * (i >= depth)].load_state_dict(block.state_dict())


def _open_data(config: RunConfig, folder: Path, world: World, left_out: LeftOut) -> Tuple[DrawPairs, str]:
    """A function that makes the training pairs, and a description of the data."""
    if bool(config.data) == bool(config.datasets):
        raise UsageError(
            "give either --data folders (held in memory) or data sets on disk "
            "(--lasot, --got10k, --coco, --trackingnet)"
        )
    variant, augmentation, share = get_variant(config.variant), config.recipe.augmentation, (world.rank, world.size)
    if config.datasets:
        readers = [Dataset(f"{name}-train", Path(path)) for name, path in config.datasets.items()]
        disk = DiskPairs(readers, variant, augmentation, world.device, config.seed, share, config.workers, left_out)
        return disk.draw, "pairs from " + ", ".join(f"{reader.kind.title} ({len(reader):,})" for reader in readers)
    folders: List[Path] = []
    for number, data in enumerate(map(Path, config.data)):
        if find_videos(data):
            labelled = folder / "labels" / f"{number}-{zlib.crc32(os.fsencode(data)):08x}"
            if world.is_main:
                left_out.update(label_videos(data, labelled, {"model": "T"})[1])
            world.wait()
            folders += [labelled] * labelled.is_dir()
        folders.append(data)
    pool = load_pool(folders, config.canvas, share, left_out).to(world.device)
    what = f"{len(pool.canvases):,} images, {len(pool):,} targets"
    if not len(pool):
        what += ": no boxes (groundtruth.txt, docs/training.md), so training uses arbitrary regions"
    if config.teacher is None and len(pool.group[pool.image].unique()) <= FEW:
        augmentation = replace(augmentation, negatives=0.0)
    return PairSampler(pool, variant, augmentation, config.seed, world.rank, config.teacher is not None).draw, what


def _keep_freed_memory() -> None:
    """Lets glibc reuse memory that a step frees; else it goes back to Linux, which clears it again (mallopt(3))."""
    trim_threshold, mmap_max = -1, -4
    with suppress(AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def _has_bf16(device: torch.device) -> bool:
    """Whether ``device`` supports bfloat16 in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    words = set(system_text(Path("/proc/cpuinfo")).split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
