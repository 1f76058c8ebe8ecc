"""``asymtrack-train``: trains, continues, labels video, measures and plots."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import MissingDependencyError, UsageError

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

EXAMPLES = """
asymtrack-train --preset small --data images/ clips/ --variant T --output runs/t --time-budget 3600
asymtrack-train --preset paper --lasot LaSOT --got10k GOT-10k --coco COCO --trackingnet TrackingNet
torchrun --nproc_per_node 2 -m asymtrack_edge.training --preset paper --got10k GOT-10k
asymtrack-train --resume runs/t --time-budget 3600
asymtrack-train --init bundled --data footage/ --lr 1e-4 --output runs/mine
asymtrack-train label videos/ --output labelled/ --model T
asymtrack-train plot runs/t
asymtrack-train benchmark
"""
COMMANDS = ("run", "label", "plot", "benchmark")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` is the one meant where none is named."""
    parser = cli.parser("asymtrack-train", "Trains and fine-tunes AsymTrack.", EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="{run,label,plot,benchmark}")
    _add_run(commands)
    _add_label(commands)
    plot = commands.add_parser("plot", help="draw loss, IoU and learning rate of a run as an image")
    plot.add_argument("folder", type=Path, help="of the run")
    plot.set_defaults(func=_plot)
    bench = commands.add_parser("benchmark", help="compare the training step with the reference form's")
    bench.add_argument("--variant", default="T", help="T, S or B (default T)")
    bench.add_argument("--batch", type=_positive, default=16, help="pairs per step (default 16)")
    bench.add_argument("--rounds", type=_positive, default=5, help="alternating rounds (default 5)")
    bench.add_argument("--threads", type=_positive, help="CPU threads")
    bench.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    bench.add_argument("--json", action="store_true", help="print the figures as JSON")
    bench.set_defaults(func=_benchmark)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="train (this is what happens without a command's name)", description="Trains AsymTrack."
    )
    data = run.add_argument_group("data, held in memory or read from disk as published")
    data.add_argument("--data", nargs="+", metavar="DIR", help="collections, folders of images or videos")
    for name, title in (
        ("lasot", "LaSOT"),
        ("got10k", "GOT-10k"),
        ("coco", "COCO2017"),
        ("trackingnet", "TrackingNet"),
    ):
        data.add_argument(f"--{name}", metavar="DIR", help=f"root of {title}")
    data.add_argument("--limit", type=_positive, help="at most this many images or records of each folder")
    data.add_argument("--canvas", type=_positive, help="long side of images in memory, pixels (default 320)")
    data.add_argument("--workers", type=_positive, help="threads that read from disk (default: one per CPU)")
    data.add_argument("--tracker", metavar="MODEL", help="labels videos: variant or export directory")
    model = run.add_argument_group("model")
    model.add_argument("--variant", help="T, S or B (default T)")
    model.add_argument("--init", metavar="FILE", help="weights to start from, or 'bundled'")
    model.add_argument("--distill", type=_seconds, metavar="SECONDS", help="first teach the encoder alone")
    model.add_argument("--search-size", type=_positive, help="search crop in pixels (smaller is faster)")
    recipe = run.add_argument_group("recipe")
    recipe.add_argument("--preset", choices=("paper", "small"), help="default: paper")
    recipe.add_argument("--batch", type=_positive, help="pairs per step and process")
    recipe.add_argument("--lr", type=_rate, help="learning rate")
    recipe.add_argument("--epochs", type=_positive, help="of 60,000 pairs")
    recipe.add_argument("--cooldown", type=_share, help="last part (0..1) in which the rate falls to zero")
    recipe.add_argument("--seed", type=_seed, help="of weights and pairs (default 0)")
    recipe.add_argument("--overfit", type=_positive, metavar="N", help="learn N pairs only, as a check")
    recipe.add_argument("--bf16", dest="bf16", action="store_const", const=True, help="compute in bfloat16")
    recipe.add_argument("--fp32", dest="bf16", action="store_const", const=False, help="compute in float32")
    call = run.add_argument_group("this call")
    call.add_argument("--output", type=Path, metavar="DIR", help="of the run (default runs/VARIANT-PRESET)")
    call.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    call.add_argument("--time-budget", type=_seconds, metavar="SECONDS", help="stop, saved, after this long")
    call.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    call.add_argument("--threads", type=_positive, help="CPU threads")
    call.add_argument("--compile", action="store_true", help="optimise with torch.compile")
    run.set_defaults(func=_run)


def _add_label(commands: Any) -> None:
    label = commands.add_parser("label", help="turn a folder of videos into a collection with pseudo-labels")
    label.add_argument("folder", type=Path, help="of videos")
    label.add_argument("--output", type=Path, required=True, metavar="DIR", help="the collection")
    label.add_argument("--model", default="T", help="tracker: variant or export directory (default T)")
    label.add_argument("--seed", type=_seed, default=0, help="of the regions that are tried (default 0)")
    label.set_defaults(func=_label)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command; returns the exit code, 2 for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        arguments.insert(0, "run")
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        return 2
    return cli.run(_dispatch, parsed)


def _dispatch(arguments: argparse.Namespace) -> Optional[int]:
    if torch is None and arguments.func is not _plot:
        raise MissingDependencyError("torch", "train", "training")
    return arguments.func(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from asymtrack_edge.training.session import run_session

    stored, folder = _stored_run(arguments)
    config = _configure(arguments, stored)
    folder = folder or arguments.output or Path("runs") / f"{config.variant.lower()}-{arguments.preset or 'paper'}"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run_session(
        config,
        folder,
        resume=arguments.resume is not None,
        device=arguments.device,
        time_budget=arguments.time_budget,
        compile_network=arguments.compile,
    )
    return 0


def _stored_run(arguments: argparse.Namespace) -> Any:
    """Configuration and folder of the run to go on with, each None where there is none."""
    from asymtrack_edge.training.runs import RunConfig
    from asymtrack_edge.training.state import has_state

    folder: Optional[Path] = arguments.resume
    if folder is None:
        return None, None
    if not folder.is_dir():
        raise UsageError(f"cannot resume: there is no folder {folder}")
    config = RunConfig.load(folder)
    if config is None and not has_state(folder):
        raise UsageError(f"cannot resume: {folder} holds no run")
    if arguments.output is not None and arguments.output != folder:
        from asymtrack_edge.training.session import copy_state

        copy_state(folder, arguments.output)
        folder = arguments.output
    return config, folder


def _configure(arguments: argparse.Namespace, stored: Any) -> Any:
    """The stored configuration, or the preset's, with what the command line says."""
    from asymtrack_edge.training.recipes import PRESETS
    from asymtrack_edge.training.runs import READERS, RunConfig

    config = stored or RunConfig(PRESETS[arguments.preset or "paper"])
    recipe = config.recipe if arguments.preset is None else PRESETS[arguments.preset]
    asked = {name: getattr(arguments, name) for name in ("batch", "lr", "cooldown", "bf16")}
    if arguments.epochs is not None:
        asked["epochs"] = arguments.epochs
        if recipe.decay_epoch is not None:
            asked["decay_epoch"] = round(recipe.decay_epoch * arguments.epochs / recipe.epochs)
    if arguments.overfit:
        asked["batch"] = arguments.overfit
    changes: Dict[str, Any] = {"recipe": replace(recipe, **_given(asked))}
    names = ("variant", "search_size", "seed", "init", "distill", "canvas", "limit", "workers", "tracker", "overfit")
    changes.update(_given({name: getattr(arguments, name) for name in names}))
    if "variant" in changes:
        changes["variant"] = changes["variant"].upper()
    datasets = _given({name: getattr(arguments, name) for name in READERS})
    if arguments.data or datasets:
        changes["data"] = tuple(arguments.data or ())
        changes["datasets"] = datasets
    config = replace(config, **changes)
    config.training_variant()
    return config


def _given(values: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _label(arguments: argparse.Namespace) -> None:
    from asymtrack_edge.runtime import Tracker
    from asymtrack_edge.training.labels import LabelOptions, label_videos
    from asymtrack_edge.training.runs import show_progress

    tracker = Tracker.load(arguments.model)
    options = LabelOptions(seed=arguments.seed)
    count = label_videos(arguments.folder, tracker, arguments.output, options, show_progress)
    print(f"{arguments.output}: {count} tracks on which both directions agree")


def _plot(arguments: argparse.Namespace) -> None:
    from asymtrack_edge.training.progress import plot_run

    print(plot_run(arguments.folder))


def _benchmark(arguments: argparse.Namespace) -> None:
    from asymtrack_edge.training.benchmark import compare_steps
    from asymtrack_edge.training.distributed import pick_device
    from asymtrack_edge.variants import get_variant

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    figures = compare_steps(get_variant(arguments.variant), arguments.batch, arguments.rounds, device)
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{'training step':<34}{'pairs/s':>9}{'ratio':>8}")
    reference = figures["reference_fp32"]
    for name, value in figures.items():
        print(f"{name:<34}{value:>9.2f}{value / reference:>8.2f}")


def _number(kind: Any, low: float, high: float, what: str) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"takes {what}, not {text!r}")
        return value

    return parse


_positive = _number(int, 1, 1 << 40, "a whole number of 1 or more")
_seed = _number(int, 0, (1 << 63) - 1, "a whole number of 0 or more")
_seconds = _number(float, 0.0, 1e9, "seconds, 0 or more")
_rate = _number(float, 1e-12, 1e3, "a positive number")
_share = _number(float, 0.0, 1.0, "a number from 0 to 1")


if __name__ == "__main__":
    raise SystemExit(main())
