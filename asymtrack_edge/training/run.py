"""A run: its stored configuration, its data, its network, from the first step to saved weights."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import nn
from torch.func import functional_call

from asymtrack_edge.checkpoints import bundled_weights
from asymtrack_edge.datasets import open_dataset
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.augmentation import Augmentation
from asymtrack_edge.training.disk import DiskPairs
from asymtrack_edge.training.distributed import World, join_world
from asymtrack_edge.training.imagery import VIDEO_SUFFIXES, files_under, is_collection, load_pool
from asymtrack_edge.training.initial import load_initial
from asymtrack_edge.training.labels import BoxTracker, LabelOptions, label_here, label_videos
from asymtrack_edge.training.log import LOG, append, plot_run, show_progress, silent
from asymtrack_edge.training.loop import RunOptions, Trainer, make_state
from asymtrack_edge.training.losses import iou_and_giou
from asymtrack_edge.training.pairs import DrawPairs, PairSampler
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import Guard, has_state, save_json
from asymtrack_edge.training.teacher import Student, Teacher
from asymtrack_edge.variants import VARIANTS, Variant, get_variant

CONFIG = "run.json"

#: Data sets in their published layouts, by the name of their option; of each the training split.
READERS = ("lasot", "got10k", "coco", "trackingnet")

#: How held-out pairs are drawn: about as far off as a tracker's crops are.
HELD_OUT = Augmentation(centre_jitter=1.5, size_jitter=0.15, greyscale=0.0, flip=0.0, brightness=0.0, stills=0.4)
#: Fewer stills and clips than this are all trained on.
FEWEST_TO_SPLIT = 200


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run learns; stored with it as ``run.json``.

    Attributes:
        recipe: see there.
        variant: name of the model.
        data: folders held in memory: collections, annotated clips, images, videos.
        datasets: folders by the names in ``READERS``, read from disk.
        teacher: folder of the teacher's graphs; None for none.
        search_size: side of the search crop in pixels; None for the variant's own.
        seed: decides initial weights and all pairs.
        init: weights to start from: a file, ``"bundled"``, or the name of a bundled variant.
        canvas: images in memory are shrunk to this many pixels on their long side.
        limit: at most this many images or records of each folder.
        workers: threads that read frames from disk; None for one per processor.
        tracker: model (variant or model directory) that labels videos; None for ``variant``.
    """

    recipe: Recipe
    variant: str = "T"
    data: Tuple[str, ...] = ()
    datasets: Dict[str, str] = field(default_factory=dict)
    teacher: Optional[str] = None
    search_size: Optional[int] = None
    seed: int = 0
    init: Optional[str] = None
    canvas: int = 320
    limit: Optional[int] = None
    workers: Optional[int] = None
    tracker: Optional[str] = None

    def training_variant(self) -> Variant:
        """The variant with the search size of this run; targets keep their scale.

        Raises:
            UsageError: no such variant, or a size that is not a multiple of 32.
        """
        variant = get_variant(self.variant)
        size = self.search_size or variant.search_size
        return variant.with_(search_size=size, search_factor=variant.search_factor * size / variant.search_size)

    def save(self, folder: Path) -> None:
        """Writes ``run.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / CONFIG, asdict(self))

    @staticmethod
    def load(folder: Path) -> RunConfig:
        """Reads ``run.json``.

        Raises:
            UsageError: there is none, or it is damaged or of another version.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise UsageError(f"cannot resume: {folder} holds no run")
        try:
            values: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            recipe = Recipe.from_dict(values.pop("recipe"))
            return RunConfig(recipe, **{**values, "data": tuple(values.get("data", ()))})
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not fit this version: {error}") from None


class Data(NamedTuple):
    """Where a run's pairs come from.

    Attributes:
        draw: makes the pairs of a step.
        what: how much there is, in words.
        held_out: makes pairs for validation, if some data was held out.
        close: ends what prepares pairs in the background.
    """

    draw: DrawPairs
    what: str
    held_out: Optional[DrawPairs] = None
    close: Callable[[], None] = lambda: None


class Run:
    """A run in its folder.

    Args:
        config: decides what is learnt.
        folder: of the run.
        resume: the folder holds a run to go on with.

    Raises:
        UsageError: the folder holds another run.
    """

    def __init__(self, config: RunConfig, folder: Path, resume: bool = False) -> None:
        if not resume and has_state(folder):
            raise UsageError(f"{folder} holds a run already: --resume {folder}, or choose another --output")
        self.config = config
        self.folder = folder
        self.variant = config.training_variant()

    def train(self, device: str = "auto", time_budget: Optional[float] = None, retry: bool = False) -> bool:
        """Trains, from the beginning or from where the run stopped.

        Args:
            device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            time_budget: seconds after which training stops, saved; loading not counted.
            retry: see ``RunOptions``.

        Returns:
            Whether the recipe's pairs are used up.

        Raises:
            AsymTrackError: data, weights or extras are missing; or the loss diverged.
        """
        world = join_world(device)
        try:
            # What takes no time comes first: a mistake there is told at once.
            config, model = self.config, self._make_model().to(world.device)
            teacher = Teacher(Path(config.teacher), self.variant, world.device) if config.teacher else None
            data = self._open_data(world)
            try:
                options = RunOptions(self.folder, time_budget, retry)
                return self._train(data, world, model, teacher, options)
            finally:
                data.close()
        finally:
            world.leave()

    def _train(
        self, data: Data, world: World, model: AsymTrack, teacher: Optional[Teacher], options: RunOptions
    ) -> bool:
        config, folder, recipe = self.config, self.folder, self.config.recipe
        student = Student(model).to(world.device) if teacher else None
        state = make_state(model, recipe, student.readouts if student else None)
        here = has_state(folder)
        some, none = world.agree(here, not here)
        if some and none:
            raise UsageError(f"not every process sees the run in {folder}: use a folder that all machines share")
        if here:
            state.load(folder)
            if RunConfig.load(folder) != config:
                # Another rate, size or data set changes the loss: its best is to be found anew.
                state.guard = Guard()
        bf16 = recipe.bf16 and has_bf16(world.device)
        world.wait()
        if world.is_main:
            config.save(folder)
            numbers = "bf16" if bf16 else "fp32"
            threads = f", {torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
            where = f"{world.size} x {world.device} ({numbers}{threads})"
            print(f"AsymTrack-{config.variant} on {where}: {data.what}", file=sys.stderr)
        metadata = {"variant": config.variant, "seed": str(config.seed)}
        options = replace(options, bf16=bf16, metadata=metadata)
        trainer = Trainer(state, data.draw, recipe, options, world, teacher, student)
        finished = trainer.run()
        if world.is_main:
            if data.held_out is not None:
                iou = held_out_iou(model, state.best_weights(), data.held_out)
                append(folder, {"step": state.step, "pairs": state.pairs, "held_out_iou": iou})
                print(f"held-out IoU {iou:.3f} after {state.pairs:,} pairs", file=sys.stderr)
            if (folder / LOG).is_file():
                plot_run(folder)
            if not finished:
                print(f"continue with: asymtrack-train --resume {folder}", file=sys.stderr)
        world.wait()
        return finished

    def _make_model(self) -> AsymTrack:
        """The network with its initial weights: random, or those of ``config.init``."""
        torch.manual_seed(self.config.seed)
        model, init = AsymTrack(self.variant), self.config.init
        if init is not None:
            name = self.config.variant if init == "bundled" else init.upper()
            load_initial(model, bundled_weights(get_variant(name)) if name in VARIANTS else Path(init))
        return model

    def _open_data(self, world: World) -> Data:
        config = self.config
        if bool(config.data) == bool(config.datasets):
            kinds = ", ".join(f"--{name}" for name in READERS)
            raise UsageError(f"name either --data folders (held in memory) or data sets on disk ({kinds})")
        augmentation = config.recipe.augmentation
        if config.datasets:
            readers = [open_dataset(f"{name}-train", Path(path)) for name, path in config.datasets.items()]
            share = (world.rank, world.size)
            pairs = DiskPairs(readers, self.variant, augmentation, world.device, config.seed, share, config.workers)
            return Data(pairs.draw, "pairs read from disk", close=pairs.close)
        progress = show_progress if world.is_main else silent
        folders = [f for i, path in enumerate(config.data) for f in self._with_labels(Path(path), i, world)]
        pool = load_pool(folders, config.canvas, config.limit, progress, (world.rank, world.size)).to(world.device)
        what = f"{len(pool.canvases):,} images, {len(pool):,} targets, {len(pool.cutouts):,} cut-outs"
        learnt, held_out = pool, None
        if len(pool.groups().unique()) > FEWEST_TO_SPLIT:
            learnt, held = pool.split()
            held_out = PairSampler(held, self.variant, HELD_OUT, config.seed).draw
        teacher = config.teacher is not None
        sampler = PairSampler(learnt, self.variant, augmentation, config.seed, world.rank, teacher)
        return Data(sampler.draw, what, held_out)

    def _with_labels(self, folder: Path, number: int, world: World) -> List[Path]:
        """What to load of a folder: itself, the labels of its videos, or both."""
        if is_collection(folder) or not files_under(folder, VIDEO_SUFFIXES):
            return [folder]
        labels = self.folder / "labels" / str(number)
        if world.is_main:
            tracker = load_tracker(self.config.tracker or self.config.variant)
            if not label_videos(folder, partial(label_here, tracker, LabelOptions()), labels, show_progress):
                raise DatasetError(
                    f"no object in the videos of {folder} could be followed forward and backward: "
                    "name a better --tracker, or label some frames yourself"
                )
        world.wait()
        return [labels, folder]


def load_tracker(model: str) -> BoxTracker:
    """The tracker that labels videos: a variant or a model directory."""
    from asymtrack_edge import Tracker

    return Tracker.load(model)


def held_out_iou(model: nn.Module, weights: Dict[str, torch.Tensor], draw: DrawPairs, batches: int = 4) -> float:
    """Mean IoU of held-out pairs with ``weights`` in ``model``, which stays as it is."""
    training = model.training
    model.eval()
    ious: List[torch.Tensor] = []
    with torch.no_grad():
        for step in range(batches):
            pairs = draw(32, step)
            prediction = functional_call(model, weights, (pairs.template, pairs.search))
            ious.append(iou_and_giou(prediction.corners, pairs.corners.clamp(0, 1))[0])
    model.train(training)
    return float(torch.cat(ious).mean())


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 by itself; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
