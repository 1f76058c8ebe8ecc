"""Looks at a model that no data set's protocol gives: tracks from many starts, the score, feature maps.

It is the weights that are looked at, not what is done about lost targets: those are not looked for.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import cv2
import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.accuracy.metrics import is_box, overlaps, success_curve
from asymtrack_edge.benchmarks.accuracy.report import figure
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.datasets import Dataset, Sequence
from asymtrack_edge.errors import CheckpointError, DatasetError, UsageError
from asymtrack_edge.files import OutputFile, check_output, printable
from asymtrack_edge.geometry import Box, Cropper, crop_window
from asymtrack_edge.runtime.sources.clip import clip_argument, default_clip
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, VARIANTS

if TYPE_CHECKING:
    from asymtrack_edge.network import AsymTrack

#: Where tracks begin, in parts of a sequence.
STARTS = (0.0, 0.25, 0.5)
#: Frames with and without the target, counted from 0: near enough to the first to show the target still.
PRESENT, ABSENT = 4, 6
#: Distances, in the list of sequences, of those that stand in for a scene without the target.
OTHERS = (1, 2, 3, 5)
PERCENTILES = (5, 10, 25, 50, 75, 95)
#: Stage -> its features (H, W, C) without OPE and with it.
Maps = Dict[int, Tuple[np.ndarray, np.ndarray]]


def track_aucs(tracker: Any, sequence: Sequence) -> List[float]:
    """Success AUC of each track of a sequence, the frame it starts from left out."""
    frames = [sequence.read(i) for i in range(len(sequence))]
    width = frames[0].shape[1]
    found = []
    for mirrored in (False, True):
        truth = sequence.truth.copy()
        if mirrored:
            truth[:, 0] = width - truth[:, 0] - truth[:, 2]
            frames = [np.ascontiguousarray(frame[:, ::-1]) for frame in frames]
        # A track begins where there is a box, and needs a frame after it.
        known = np.flatnonzero(is_box(truth))
        for part in STARTS:
            later = known[known >= int(part * len(frames))]
            if len(later) < 2:
                continue
            start, judged = later[0], later[1:]
            tracker.init(frames[start], truth[start])
            boxes = np.array([tracker.update(frame).box for frame in frames[start + 1 :]])
            found.append(float(success_curve(overlaps(boxes[judged - start - 1], truth[judged])).mean()))
    return found


def starts(args: argparse.Namespace) -> int:
    """Success AUC over many tracks of few sequences, for comparing weights.

    With a handful of sequences, one lost track moves the mean by a hundredth or more. Here every sequence
    gives six tracks: from its first frame, from a quarter and from half of its length, as it is and
    mirrored left to right. Lost targets are not looked for. The figure is no published protocol's.
    """
    sequences, left_out = Dataset("folder", args.root).read()
    tracker = TrackerSpec.of(args.model, args, recover=False).build()
    means, tracks = {}, 0
    for sequence in sequences:
        try:
            aucs = track_aucs(tracker, sequence)
        except DatasetError as error:
            left_out[sequence.name] = str(error)
            continue
        if aucs:
            tracks += len(aucs)
            means[sequence.name] = round(float(np.mean(aucs)), 4)
            cli.say(f"{sequence.name}: {means[sequence.name]:.3f} over {len(aucs)} tracks")
    mean = round(float(np.mean([*means.values()])), 4) if means else None
    return _finish(args, {"tracks": tracks, "success AUC": mean, "sequences": means}, left_out)


def presence(args: argparse.Namespace) -> int:
    """Does the score tell whether the target is there? Percentiles of the score with it and without.

    Each sequence gives one score with its target in view (its fifth frame) and four without (the seventh
    frame of four other sequences, resized to its own).
    """
    sequences, left_out = Dataset("folder", args.root).read()
    sequences = [sequence for sequence in sequences if len(sequence) > ABSENT]
    if len(sequences) <= max(OTHERS):
        need = f"more than {max(OTHERS)} sequences of more than {ABSENT} frames"
        raise UsageError(f"{args.root} has {len(sequences)} that can be used: this needs {need}")
    tracker = TrackerSpec.of(args.model, args, recover=False).build()
    found: Dict[str, List[float]] = {"present": [], "absent": []}
    for i, sequence in enumerate(sequences):
        first, later = sequence.read(0), sequence.read(PRESENT)
        tracker.init(first, sequence.start)
        found["present"].append(tracker.update(later).score)
        for distance in OTHERS:
            other = sequences[(i + distance) % len(sequences)].read(ABSENT)
            tracker.init(first, sequence.start)
            tracker.update(later)
            found["absent"].append(tracker.update(cv2.resize(other, first.shape[1::-1])).score)
    table = {
        kind: dict(zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).round(3).tolist()))
        for kind, values in found.items()
    }
    return _finish(args, {"sequences": len(sequences), "percentiles of the score": table}, left_out)


def _finish(args: argparse.Namespace, answer: Dict[str, Any], left_out: Dict[str, str]) -> int:
    cli.write_json(args.json or "-", answer)
    for error in left_out.values():
        cli.say(f"error: left out: {error}")
    return 1 if left_out else 0


def features(args: argparse.Namespace) -> None:
    """Draws feature maps of the three stages for the search region of the second frame, with and without OPE.

    Without: the trained network with its OPE blocks bypassed. Maps show the mean over the channels and the
    largest activation of any channel, each pair in the same colours.
    """
    if args.output.suffix.lower() != ".png":
        raise UsageError(f"--output takes a .png here, not {printable(args.output)}")
    check_output(args.output)
    frames, box = clip_argument(args.clip, args.box) or default_clip(2)
    drawn = _draw(*feature_maps(_model(args.model), frames, box))
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
    checkpoint = open_checkpoint(name)
    if not checkpoint.variants:
        raise CheckpointError(f"{name} fits none of {', '.join(VARIANTS)}")
    return checkpoint.model(VARIANTS[checkpoint.variants[0]])


def feature_maps(model: AsymTrack, frames: List[np.ndarray], box: Box) -> Tuple[np.ndarray, Maps]:
    """Runs both forms of a network on the template of the first BGR frame and the search region of the second.

    Returns the search crop, BGR uint8, and the features where the OPE blocks of the stages are.
    """
    import torch

    from asymtrack_edge.network.layers import PerceptionEnhancement

    variant = model.eval().variant
    crops = [np.empty((size, size, 3), np.uint8) for size in (variant.template_size, variant.search_size)]
    for crop, frame, factor in zip(crops, frames, (variant.template_factor, variant.search_factor)):
        Cropper().crop(frame, crop_window(box, factor), crop)
    images = [(crop[..., ::-1] / 255 - IMAGE_MEAN) / IMAGE_STD for crop in crops]
    template, search = (torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)) for image in images)
    found: Dict[Tuple[bool, int], np.ndarray] = {}

    def keep(bypass: bool, stage: int, module: Any, inputs: Any, output: Any) -> Any:
        passed = inputs[0] if bypass else output
        found[bypass, stage] = passed[0].numpy().copy()
        return passed

    for bypass in (True, False):
        with ExitStack() as hooks, torch.inference_mode():
            for stage, layer in enumerate(model.backbone.layers, start=1):
                for block in layer.blocks:  # type: ignore[union-attr]
                    if isinstance(block, PerceptionEnhancement):
                        hooks.enter_context(block.register_forward_hook(partial(keep, bypass, stage)))
            model.search(search, model.template(template))  # the search region's maps replace the template's
    return crops[1], {stage: (found[True, stage], found[False, stage]) for _, stage in found}


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


#: Name -> what ``--help`` says, and the body.
COMMANDS = {
    "starts": ("success AUC over many tracks of few sequences", starts),
    "presence": ("does the score tell whether the target is there?", presence),
}
