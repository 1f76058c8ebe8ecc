"""What a run is made of: its stored configuration, its data, its model."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
from torch import nn
from torch.func import functional_call

from asymtrack_edge.checkpoints import bundled_weights
from asymtrack_edge.datasets import open_dataset
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.training.augmentation import Augmentation
from asymtrack_edge.training.collection import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    files_under,
    is_collection,
    load_collection,
    load_images,
)
from asymtrack_edge.training.disk import DiskPairs
from asymtrack_edge.training.distributed import World
from asymtrack_edge.training.initial import load_initial
from asymtrack_edge.training.labels import BoxTracker, label_videos
from asymtrack_edge.training.losses import iou_and_giou
from asymtrack_edge.training.pairs import DrawPairs, Pairs, PairSampler
from asymtrack_edge.training.pool import Pool, merge_pools
from asymtrack_edge.training.recipes import Recipe
from asymtrack_edge.training.state import save_json
from asymtrack_edge.variants import Variant, get_variant

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
        data: folders held in memory: collections, images, videos.
        datasets: folders by the names in ``READERS``, read from disk.
        search_size: side of the search crop in pixels; None for the variant's own.
        seed: decides initial weights and all pairs.
        init: file of weights to start from; ``"bundled"`` for those that come with the package.
        distill: seconds spent on the encoder alone beforehand.
        canvas: images in memory are shrunk to this many pixels on their long side.
        limit: at most this many images or records of each folder.
        workers: threads that read frames from disk; None for one per processor.
        tracker: model (variant or export directory) that labels videos; None for ``variant``.
        overfit: train on this many pairs only, always the same; 0 for all.
    """

    recipe: Recipe
    variant: str = "T"
    data: Tuple[str, ...] = ()
    datasets: Dict[str, str] = field(default_factory=dict)
    search_size: Optional[int] = None
    seed: int = 0
    init: Optional[str] = None
    distill: float = 0.0
    canvas: int = 320
    limit: Optional[int] = None
    workers: Optional[int] = None
    tracker: Optional[str] = None
    overfit: int = 0

    def training_variant(self) -> Variant:
        """The variant with the search size of this run; targets keep their scale.

        Raises:
            UsageError: no such variant, or a size that is not a multiple of 32.
        """
        variant = get_variant(self.variant)
        size = self.search_size
        if size is None or size == variant.search_size:
            return variant
        return variant.with_(search_size=size, search_factor=variant.search_factor * size / variant.search_size)

    def save(self, folder: Path) -> None:
        """Writes ``run.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_json(folder / CONFIG, asdict(self))

    @staticmethod
    def load(folder: Path) -> Optional[RunConfig]:
        """Reads ``run.json``; None where the folder has none.

        Raises:
            UsageError: it is damaged or of another version.
        """
        path = folder / CONFIG
        if not path.is_file():
            return None
        try:
            values: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            recipe = Recipe.from_dict(values.pop("recipe"))
            return RunConfig(recipe, **{**values, "data": tuple(values.get("data", ()))})
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} does not fit this version: {error}") from None


@dataclass
class Data:
    """Where a run's pairs come from.

    Attributes:
        draw: makes the pairs of a step.
        pool: imagery in memory, if any.
        held_out: makes pairs for validation, if some data was held out.
        close: ends what prepares pairs in the background.
    """

    draw: DrawPairs
    pool: Optional[Pool] = None
    held_out: Optional[DrawPairs] = None
    close: Callable[[], None] = lambda: None


def open_data(config: RunConfig, world: World, folder: Path) -> Data:
    """Opens the data of a run.

    Raises:
        UsageError: none is named, or both kinds are.
        DatasetError: it cannot be read.
    """
    if bool(config.data) == bool(config.datasets):
        kinds = ", ".join(f"--{name}" for name in READERS)
        raise UsageError(f"name either --data folders (held in memory) or data sets on disk ({kinds})")
    variant, augmentation = config.training_variant(), config.recipe.augmentation
    if config.datasets:
        readers = [open_dataset(f"{name}-train", Path(path)) for name, path in config.datasets.items()]
        pairs = DiskPairs(readers, variant, augmentation, world.device, config.seed, world.rank, config.workers)
        return Data(_maybe_fixed(pairs.draw, config), close=pairs.close)
    labels = folder / "labels"
    pools = [_load_folder(Path(path), config, world, labels / str(i)) for i, path in enumerate(config.data)]
    pool = merge_pools(pools).to(world.device)
    held_out = None
    learnt = pool
    if len(pool.groups().unique()) > FEWEST_TO_SPLIT:
        learnt, held = pool.split()
        held_out = PairSampler(held, variant, HELD_OUT, config.seed).draw
    draw = PairSampler(learnt, variant, augmentation, config.seed, world.rank).draw
    return Data(_maybe_fixed(draw, config), pool, held_out)


def _maybe_fixed(draw: DrawPairs, config: RunConfig) -> DrawPairs:
    """Always the first pairs, where a run is to overfit them."""
    if not config.overfit:
        return draw
    fixed = draw(config.overfit, 0)

    def again(batch: int, step: int) -> Pairs:
        return fixed

    return again


def _load_folder(folder: Path, config: RunConfig, world: World, labels: Path) -> Pool:
    """Loads a collection, or the images and videos below a folder."""
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: check --data")
    progress = show_progress if world.is_main else _quiet
    if is_collection(folder):
        return load_collection(folder, config.canvas, config.limit, progress)
    pools = []
    if files_under(folder, VIDEO_SUFFIXES):
        if world.is_main:
            tracker = _load_tracker(config.tracker or config.variant)
            if not label_videos(folder, tracker, labels, progress=progress):
                raise DatasetError(
                    f"no object in the videos of {folder} could be followed forward and backward: "
                    "name a better --tracker, or label some frames yourself"
                )
        world.wait()
        pools.append(load_collection(labels, config.canvas, None, progress))
    if files_under(folder, IMAGE_SUFFIXES):
        pools.append(load_images(folder, config.canvas, config.limit, progress))
    if not pools:
        raise DatasetError(f"{folder} is no collection and holds neither images nor videos")
    return merge_pools(pools)


def _load_tracker(model: str) -> BoxTracker:
    from asymtrack_edge.runtime import Tracker

    return Tracker.load(model)


def _quiet(items: Iterable[Any], title: str) -> Iterable[Any]:
    return items


def show_progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A progress bar over ``items``, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=title, leave=False, file=sys.stderr, disable=None)  # a terminal only


def make_model(config: RunConfig, device: torch.device) -> AsymTrack:
    """The network with its initial weights: random, or those of ``config.init``.

    Raises:
        CheckpointError: the file does not fit the variant.
    """
    torch.manual_seed(config.seed)
    variant = config.training_variant()
    model = AsymTrack(variant)
    if config.init is not None:
        load_initial(model, bundled_weights(variant) if config.init == "bundled" else Path(config.init))
    return model.to(device)


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
