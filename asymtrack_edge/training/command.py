"""``asymtrack-train``: trains, resumes, labels videos and plots."""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError, require
from asymtrack_edge.files import check_folder
from asymtrack_edge.variants import VARIANTS

EXAMPLES = """
asymtrack-train --preset small --data images/ clips/ --variant T --output runs/t --time-budget 3600
asymtrack-train --preset paper --lasot LaSOT --got10k GOT-10k --coco COCO --trackingnet TrackingNet
asymtrack-train --preset small --init T --data my-clip/ --lr 1e-4 --output runs/mine --time-budget 900
asymtrack-train --preset small --data clips/ --teacher fear/ --output runs/t
asymtrack-train --resume runs/t --time-budget 3600
torchrun --nproc_per_node 2 -m asymtrack_edge train --preset paper --got10k GOT-10k
asymtrack-train label videos/ --output labelled/ --model T
asymtrack-train plot runs/t
"""
_seconds = partial(cli.number, float, 0.0, 1e9, "number of seconds")
_rate = partial(cli.number, float, 1e-12, 1e3, "positive number")
_share = partial(cli.number, float, 0.0, 1.0, "number from 0 to 1")

_ON_DISK = {"lasot": "LaSOT", "got10k": "GOT-10k", "coco": "COCO2017", "trackingnet": "TrackingNet"}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands; ``run`` is the default."""
    parser = cli.parser("asymtrack-train", "Trains AsymTrack. All options: asymtrack-train run --help", EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="{run,label,plot}")
    _add_run(commands)
    text = "Turns a folder of videos into training data: finds objects and tracks them forward and backward."
    label = commands.add_parser("label", help="turn a folder of videos into training data", description=text)
    label.add_argument("folder", type=Path, metavar="FOLDER", help="folder of videos")
    label.add_argument("--output", type=Path, metavar="DIR", help="folder for the result (default: FOLDER-labelled)")
    cli.add_model(label)
    cli.add_backend(label)
    label.set_defaults(func=_label)
    text = "Draws loss, IoU and learning rate of a run as plot.png in its folder."
    plot = commands.add_parser("plot", help="draw loss, IoU and learning rate of a run as an image", description=text)
    plot.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the run")
    plot.set_defaults(func=_plot)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="train (the default command)", description="Trains AsymTrack.")
    run.set_defaults(func=_run)
    add = run.add_argument_group("data, held in memory or read from disk in the published layout").add_argument
    add("--data", nargs="+", metavar="DIR", help="collections, folders of annotated clips, images or videos")
    for name, title in _ON_DISK.items():
        add(f"--{name}", metavar="DIR", help=f"root of {title}")
    add("--canvas", type=cli.positive, metavar="N", help="long side of images in memory, pixels (default: 320)")
    add("--workers", type=cli.positive, metavar="N", help="disk reader threads (default: one per CPU, up to 16)")
    add = run.add_argument_group("model").add_argument
    add("--variant", type=str.upper, metavar="{T,S,B}", help="what to train (default: that of --init, else T)")
    add("--init", metavar="WEIGHTS", help="weights to start from: a file, or T, S or B for the bundled weights")
    add("--teacher", type=os.path.abspath, metavar="DIR", help="folder of a teacher tracker's two ONNX models")
    recipe = run.add_argument_group("recipe")
    add = recipe.add_argument
    text = "recipe (default: paper; required with --data; docs/training.md compares them)"
    add("--preset", choices=("paper", "small", "gpu"), help=text)
    add("--batch", type=cli.positive, metavar="N", help="pairs per step and process (default: the preset's)")
    add("--lr", type=_rate, metavar="RATE", help="learning rate (default: the preset's)")
    add("--epochs", type=cli.positive, metavar="N", help="epochs of 60,000 pairs (default: the preset's)")
    add("--cooldown", type=_share, metavar="SHARE", help="the run's last part (0..1): the learning rate falls to zero")
    add("--seed", type=cli.seed, metavar="N", help="seed of initial weights and pairs (default: 0)")
    numbers = recipe.add_mutually_exclusive_group().add_argument
    numbers("--bf16", dest="bf16", action="store_const", const=True, help="compute in bfloat16")
    numbers("--fp32", dest="bf16", action="store_const", const=False, help="compute in float32")
    call = run.add_argument_group("this call")
    add = call.add_argument
    add("--output", type=Path, metavar="DIR", help="folder of the run (default: runs/VARIANT-PRESET)")
    add("--resume", type=Path, metavar="DIR", help="resume the run in this folder")
    add("--time-budget", type=_seconds, default=math.inf, metavar="SECONDS", help="save and stop after this long")
    text = "when the loss rises and stays high: stop, or go back to the last good state with half the learning rate "
    add("--on-divergence", choices=("stop", "retry"), default="stop", help=text + "(default: stop)")
    cli.add_device(call)
    add("--threads", type=cli.threads, metavar="N", help="CPU threads (default: one per core)")
    cli.add_json(call)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in ("run", "label", "plot", "-h", "--help", "--version"):
        arguments.insert(0, "run")
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.error("name what to train on, for example --preset small --data clips/")
    return cli.run(_dispatch, parsed)


def _dispatch(arguments: argparse.Namespace) -> Optional[int]:
    for package in ("matplotlib", "safetensors", "torch"):
        require(package, "train", "training")
    return arguments.func(arguments)


def _run(arguments: argparse.Namespace) -> int:
    import torch

    from asymtrack_edge.training.log import read_log
    from asymtrack_edge.training.run import RunConfig, train
    from asymtrack_edge.training.state import has_state

    if arguments.resume and arguments.output not in (None, arguments.resume):
        raise UsageError("--resume continues in the run's folder: leave out --output, or copy the folder first")
    if arguments.resume and (arguments.preset or arguments.init or arguments.variant):
        raise UsageError("--resume keeps the run's network and recipe: leave out --preset, --init and --variant")
    if arguments.data and not arguments.resume and not arguments.preset:
        raise UsageError("--data needs a recipe: --preset small for a CPU, gpu for a GPU, or paper (500 epochs)")
    config = _configure(arguments, RunConfig.load(arguments.resume) if arguments.resume else None)
    name = f"{config.variant.lower()}-{arguments.preset or 'paper'}"
    folder = arguments.resume or arguments.output or Path("runs", name)
    if not arguments.resume and has_state(folder):
        raise UsageError(f"{folder} already holds a run: use --resume {folder}, or choose another --output")
    check_folder(folder)
    path = Path(os.path.abspath(folder))
    if (arguments.data or not arguments.resume) and not {str(path), *map(str, path.parents)}.isdisjoint(config.data):
        other = "--data" if arguments.resume else "--output"
        raise UsageError(f"{folder} lies in the data, so its pictures would be trained on: choose another {other}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    retry = arguments.on_divergence == "retry"
    try:
        finished, left_out = train(config, folder, arguments.device, arguments.time_budget, retry=retry)
    except (MemoryError, RuntimeError) as error:  # numpy's, and PyTorch's, whose text depends on the device
        if not any(words in str(error) for words in ("out of memory", "allocate")):
            raise
        raise UsageError("not enough memory: give a smaller --batch or --canvas, or less --data") from None
    if arguments.json and os.environ.get("RANK", "0") == "0":
        rows: Dict[str, Any] = {key: value for row in read_log(folder) for key, value in row.items()}
        cli.write_json(arguments.json, {"folder": str(folder), "finished": finished, **rows})
    return 1 if left_out and "WORLD_SIZE" not in os.environ else 0  # torchrun would call the run failed


def _configure(arguments: argparse.Namespace, stored: Any) -> Any:
    """The stored configuration, or the preset's, with the changes from the command line."""
    from asymtrack_edge.training.recipes import PRESETS
    from asymtrack_edge.training.run import RunConfig

    def given(*names: str) -> Dict[str, Any]:
        return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}

    recipe = stored.recipe if stored else PRESETS[arguments.preset or "paper"]
    asked = given("batch", "lr", "cooldown", "bf16", "epochs")
    if arguments.epochs and recipe.decay_epoch is not None:
        asked["decay_epoch"] = round(recipe.decay_epoch * arguments.epochs / recipe.epochs)
    changes = given("seed", "init", "teacher", "canvas", "workers", "variant")
    if not stored and not arguments.variant and str(arguments.init).upper() in VARIANTS:
        changes["variant"] = arguments.init.upper()
    # Absolute, so that the run can be resumed from another working directory.
    datasets = {name: os.path.abspath(folder) for name, folder in given(*_ON_DISK).items()}
    if arguments.data or datasets:
        kept = stored.datasets if stored and not arguments.data else {}  # one that has moved replaces itself alone
        changes.update(data=tuple(map(os.path.abspath, arguments.data or ())), datasets={**kept, **datasets})
    return replace(stored or RunConfig(recipe), recipe=replace(recipe, **asked), **changes)


def _label(arguments: argparse.Namespace) -> int:
    from asymtrack_edge.training.labels import label_videos

    output = arguments.output or Path(os.path.abspath(arguments.folder) + "-labelled")
    load = {name: getattr(arguments, name) for name in ("model", "backend", "device", "threads", "precision")}
    count, left_out = label_videos(arguments.folder, output, load)
    print(f"{output}: {count} tracks on which both directions agree")
    if not count:
        cli.say("nothing was labelled: draw boxes yourself (docs/training.md)")
    return 1 if left_out or not count else 0


def _plot(arguments: argparse.Namespace) -> None:
    from asymtrack_edge.training.log import plot_run

    print(plot_run(arguments.folder))
