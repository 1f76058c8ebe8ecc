"""Feature maps of a search region with and without object perception enhancement (OPE; the paper's Fig. 7)."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import numpy as np

from asymtrack_edge.benchmarks.accuracy.report import figure
from asymtrack_edge.errors import CheckpointError, UsageError
from asymtrack_edge.files import OutputFile, check_output, printable
from asymtrack_edge.geometry import Box, Cropper, crop_window
from asymtrack_edge.runtime.sources.clip import clip_argument, default_clip
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS

if TYPE_CHECKING:
    from asymtrack_edge.network import AsymTrack

#: Stage -> its features (H, W, C) without OPE and with it.
Maps = Dict[int, Tuple[np.ndarray, np.ndarray]]


def features(args: argparse.Namespace) -> None:
    """Draws feature maps of the three stages for the search region of the second frame, with and without OPE.

    Without: the trained network with its OPE blocks bypassed. Maps show the mean over the channels and the
    largest activation of any channel, each pair in the same colours.
    """
    check_output(args.output)
    frames, box = clip_argument(args.clip, args.box) or default_clip(2)
    model = _model(args.model)
    search, maps = feature_maps(model, frames, box)
    if args.output.suffix.lower() != ".png":
        raise UsageError(f"--output takes a .png here, not {printable(args.output)}")
    drawn = _draw(search, maps)
    with OutputFile(args.output) as file:
        drawn.savefig(file.place, dpi=120, format="png")
    print(f"wrote {printable(args.output)}")


def _model(name: str) -> AsymTrack:
    """A bundled model, or that of a checkpoint."""
    from asymtrack_edge.checkpoints import load_model, open_checkpoint

    if name.upper() in VARIANTS:
        return load_model(None, VARIANTS[name.upper()])
    if Path(name).is_dir():
        raise UsageError(f"{name} is an exported model, whose OPE is folded: give T, S, B or the checkpoint")
    variants = open_checkpoint(name).variants
    if not variants:
        raise CheckpointError(f"{name} fits none of {', '.join(VARIANTS)}")
    return load_model(name, VARIANTS[variants[0]])


def feature_maps(model: AsymTrack, frames: List[np.ndarray], box: Box) -> Tuple[np.ndarray, Maps]:
    """Runs both forms of a network on the template of the first BGR frame and the search region of the second.

    Returns the search crop, BGR uint8, and the features where the OPE blocks of the stages are.
    """
    import torch

    variant = model.variant
    crops = []
    for frame, size, factor in (
        (frames[0], variant.template_size, variant.template_factor),
        (frames[1], variant.search_size, variant.search_factor),
    ):
        crops.append(np.empty((size, size, 3), np.uint8))
        Cropper().crop(frame, crop_window(box, factor), crops[-1])
    images = [(crop[..., ::-1] / 255 - IMAGE_MEAN) / IMAGE_STD for crop in crops]
    template, search = (torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) for image in images)
    without, with_ope = (_run(model.eval(), template, search, bypass) for bypass in (True, False))
    return crops[1], {stage: (without[stage], with_ope[stage]) for stage in with_ope}


def _run(model: AsymTrack, template: Any, search: Any, bypass: bool) -> Dict[int, np.ndarray]:
    """By stage what its OPE block returns of the search region; with ``bypass`` that is what goes into it."""
    import torch

    from asymtrack_edge.network.layers import PerceptionEnhancement

    found: Dict[int, np.ndarray] = {}

    def keep(stage: int, module: Any, inputs: Any, output: Any) -> Any:
        passed = inputs[0] if bypass else output
        found[stage] = passed[0].numpy().copy()
        return passed

    with ExitStack() as hooks, torch.inference_mode():
        for stage, layer in enumerate(model.backbone.layers, start=1):
            for block in layer.blocks:  # type: ignore[union-attr]
                if isinstance(block, PerceptionEnhancement):
                    hooks.enter_context(block.register_forward_hook(partial(keep, stage)))
        model.search(search, model.template(template))  # the search region's maps replace the template's
    return found


def _draw(search: np.ndarray, maps: Maps) -> Any:
    drawn = figure(13, 2.6 * len(maps))
    axes = drawn.subplots(len(maps), 5, squeeze=False)
    for row, (stage, pair) in zip(axes, maps.items()):
        row[0].imshow(search[..., ::-1])
        row[0].set_title("search region")
        for kind, reduce, columns in (("mean", np.mean, row[1:3]), ("largest", np.max, row[3:5])):
            pictures = [reduce(values, axis=-1) for values in pair]
            low, high = min(p.min() for p in pictures), max(p.max() for p in pictures)
            for column, picture, form in zip(columns, pictures, ("without OPE", "with OPE")):
                column.imshow(picture, cmap="viridis", vmin=low, vmax=high)
                column.set_title(f"stage {stage}, {kind}, {form}", fontsize=9)
        for each in row:
            each.axis("off")
    return drawn
