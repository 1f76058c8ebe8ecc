"""``asymtrack-export``: from checkpoint to ONNX models and engines."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError, require
from asymtrack_edge.files import check_folder
from asymtrack_edge.manifest import FILE_NAME, FLOAT_RGB, PLATFORMS, UINT8_BGR
from asymtrack_edge.runtime.comparison import figures
from asymtrack_edge.runtime.sources.clip import clip_argument
from asymtrack_edge.variants import Variant, get_variant

EXAMPLES = """
asymtrack-export --variant T --fp16
asymtrack-export --variant B --checkpoint AsymTrack_ep0500.pth.tar --target xavier --fp16
asymtrack-export --variant S --batch 8 --output exports/s-multi
asymtrack-export --checkpoint run.pth --weights raw
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    parser = cli.parser(
        "asymtrack-export",
        "Fold and split a trained AsymTrack model, write it as ONNX, verify it, and build engines.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("--variant", default="T", metavar="{T,S,B}", help="size of the network (default: T)")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--checkpoint", type=Path, metavar="FILE", help="trained weights (default: the bundled ones)")
    which = "weights to take, if a checkpoint has both: averaged over training steps (ema), or of the last step (raw) "
    add("--weights", choices=("ema", "raw"), help=which + "(default: ema)")
    one("--random-weights", type=cli.seed, metavar="SEED", help="untrained weights, to measure speed or test a device")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--fp16", action="store_true", help="half precision, except where fp16 loses accuracy; for GPUs")
    one("--int8", action="store_true", help="8-bit integers in the costly convolutions; for CPUs")
    platforms = "where it will run: onnx (any runtime), xavier (TensorRT 8.5), orin (TensorRT 8.6 or newer), "
    platforms += "rtx (TensorRT-RTX) (default: onnx)"
    add("--target", default="onnx", choices=tuple(PLATFORMS), help=platforms)
    add("--opset", type=int, metavar="N", help="ONNX opset (default: 17; 16 for xavier)")
    add("--batch", type=int, metavar="N", help="most targets per call, 1..64 (default: 1, static; 16 with --triton)")
    crops = f"input format of the networks (default: {UINT8_BGR} for onnx, {FLOAT_RGB} for TensorRT)"
    add("--input", choices=(UINT8_BGR, FLOAT_RGB), help=crops)
    add("--output", type=Path, metavar="DIR", help="directory to write (default: exports/asymtrack-t-fp16 or the like)")
    add("--triton", type=Path, metavar="DIR", help="also add the model to this Triton model repository")
    add("--no-engine", action="store_true", help="write ONNX models only")
    cli.add_clip(parser)
    cli.add_json(parser)
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    variant = get_variant(arguments.variant)
    if arguments.weights is not None and arguments.checkpoint is None:
        raise UsageError("--weights chooses among the weights of a checkpoint: give one with --checkpoint")
    clip = clip_argument(arguments.clip, arguments.box)
    if arguments.triton and arguments.batch == 1:
        raise UsageError("--triton is for servers that batch requests: leave out --batch, or give 2 or more")
    if arguments.triton:
        check_folder(arguments.triton)
    # By default, OpenMP's threads busy-wait for each other, which takes three times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Importing torch takes seconds, so the arguments are checked first.
    pipeline = require("asymtrack_edge.export.pipeline", "export", "an export")
    options = pipeline.ExportOptions(
        precision="fp16" if arguments.fp16 else "int8" if arguments.int8 else "fp32",
        platform=arguments.target,
        opset=arguments.opset,
        max_batch=(16 if arguments.triton else 1) if arguments.batch is None else arguments.batch,
        input_format=arguments.input,
    )
    suffix = "" if options.platform == "onnx" else f"-{options.platform}"
    output = arguments.output or Path("exports") / f"asymtrack-{variant.name.lower()}-{options.precision}{suffix}"
    repository = arguments.triton and arguments.triton.resolve()
    if repository and output.resolve() in (repository, *repository.parents):
        raise UsageError("--triton lies in --output, which is replaced as a whole: choose another folder")
    say = cli.say if arguments.json == "-" else partial(print, flush=True)
    say(f"AsymTrack-{variant.name}, {options.precision}, for {options.platform} -> {output}")
    model, weights = _load(arguments, variant, say)

    def publish(folder: Path, manifest: Any) -> None:
        from asymtrack_edge.export.triton import write_repository

        version = write_repository(folder, manifest, arguments.triton)
        say(f"version {version} in the Triton model repository {arguments.triton}")

    export = pipeline.Export(model, options, weights, clip)
    manifest = export.run(output, not arguments.no_engine, say, publish if arguments.triton else None)
    cli.write_json(arguments.json, json.loads((output / FILE_NAME).read_text(encoding="utf-8")))
    size, checked = manifest.provenance, manifest.verification
    say(
        f"{size['parameters'] / 1e6:.2f} M parameters; multiply-adds: {size['search_multiply_adds'] / 1e9:.3f} G per "
        f"frame, {size['template_multiply_adds'] / 1e9:.3f} G once per target"
    )
    verified = f"verified over {checked['frames']} frames on {checked['runtime']}:"
    say("\n  ".join([verified, *figures(checked)]))
    for name, entry in sorted(manifest.files.items()):
        say(f"wrote {output / name}, {entry.bytes / 1e6:.1f} MB")
    return 0


def _load(arguments: argparse.Namespace, variant: Variant, say: Callable[[str], None]) -> Tuple[Any, Dict[str, Any]]:
    from asymtrack_edge.checkpoints import bundled_weights, open_checkpoint

    if arguments.random_weights is not None:
        import torch

        from asymtrack_edge.network import AsymTrack

        torch.manual_seed(arguments.random_weights)
        return AsymTrack(variant).eval(), {"weights": f"random, seed {arguments.random_weights}"}
    if arguments.checkpoint is None:
        return open_checkpoint(bundled_weights(variant)).model(variant), {"weights": f"bundled {variant.name}"}
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.weights)
    if checkpoint.choice:
        say(checkpoint.choice)
    weights = {"weights": arguments.checkpoint.name, "weights_sha256": checkpoint.sha256}
    return checkpoint.model(variant), {**weights, "weights_taken": checkpoint.taken}
