"""``asymtrack-export``: from checkpoint to ONNX models and engines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.manifest import FLOAT_RGB, UINT8_BGR, Manifest, file_entry
from asymtrack_edge.runtime.sources.clip import clip_argument
from asymtrack_edge.variants import VARIANTS, get_variant

EXAMPLES = """
asymtrack-export --variant T --fp16
asymtrack-export --variant B --checkpoint AsymTrack_ep0500.pth.tar --target xavier --fp16
asymtrack-export --variant S --batch 8 --output exports/s-multi
asymtrack-export --sizes
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser(
        "asymtrack-export",
        "Fold and split a trained AsymTrack, write it as ONNX, verify it, and build engines.",
        EXAMPLES,
    )
    parser.add_argument("--variant", default="T", metavar="{T,S,B}", help="which model (default: T)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="trained weights (default: the bundled ones)")
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a checkpoint with both: averaged over training steps, or of the last step (default: averaged)",
    )
    parser.add_argument(
        "--random-weights", type=int, metavar="SEED", help="untrained weights, to measure speed or try a device"
    )
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="half precision, fp32 in the delicate places")
    precision.add_argument("--int8", action="store_true", help="8-bit integers where it pays, for CPUs")
    parser.add_argument(
        "--target",
        default="onnx",
        choices=("onnx", "xavier", "orin", "rtx"),
        help="what will run it: onnx (any runtime), xavier (TensorRT 8.5), orin (TensorRT 8.6 or newer), "
        "rtx (TensorRT-RTX) (default: onnx)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset (default: 17; 16 for xavier)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="most targets in one call, 1..64 (default: 1, static; 16 with --triton)"
    )
    parser.add_argument(
        "--input",
        choices=(UINT8_BGR, FLOAT_RGB),
        help=f"what the networks take (default: {UINT8_BGR} for onnx, {FLOAT_RGB} for TensorRT)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: exports/asymtrack-t-fp16 or the like")
    parser.add_argument(
        "--triton", type=Path, metavar="DIR", help="also add the model to this model repository of a Triton server"
    )
    parser.add_argument("--no-engine", action="store_true", help="write ONNX only")
    parser.add_argument("--clip", metavar="SOURCE", help="video or image folder to verify on (default: synthetic)")
    parser.add_argument("--box", metavar="x,y,w,h", help="the target in the clip's first frame")
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a summary")
    parser.add_argument("--sizes", action="store_true", help="print parameters and multiply-adds of all variants")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    variant = get_variant(arguments.variant)
    if arguments.checkpoint is not None and arguments.random_weights is not None:
        raise UsageError("--checkpoint and --random-weights exclude each other")
    if arguments.weights is not None and arguments.checkpoint is None:
        raise UsageError("--weights chooses among the weights of a checkpoint: give one with --checkpoint")
    if arguments.sizes:
        return _print_sizes()
    clip = clip_argument(arguments.clip, arguments.box)
    if arguments.triton and arguments.batch == 1:
        raise UsageError("--triton is for servers that join requests in batches: leave out --batch, or give 2 or more")
    # torch takes seconds to import: not before the arguments are known to be right.
    from asymtrack_edge.export.pipeline import ExportOptions, export

    options = ExportOptions(
        precision="fp16" if arguments.fp16 else "int8" if arguments.int8 else "fp32",
        target=arguments.target,
        opset=arguments.opset,
        max_batch=arguments.batch or (16 if arguments.triton else 1),
        input_format=arguments.input,
    )
    name = f"asymtrack-{variant.name.lower()}-{options.precision}"
    if options.target != "onnx":
        name += f"-{options.target}"
    output = arguments.output or Path("exports") / name
    _say(arguments, f"AsymTrack-{variant.name}, {options.precision}, for {options.target} -> {output}")
    model, provenance = _load(arguments, variant.name)

    def finish(folder: Path, manifest: Manifest) -> Manifest:
        if arguments.no_engine or manifest.target == "onnx":
            return manifest
        from asymtrack_edge.runtime.backends.tensorrt.build import engines_or_note

        return engines_or_note(folder, manifest, output, report=lambda line: _say(arguments, line))

    manifest = export(model, options, output, provenance, clip, finish)
    if arguments.triton:
        from asymtrack_edge.export.triton import write_repository

        version = write_repository(output, manifest, arguments.triton)
        _say(arguments, f"version {version} in the Triton model repository {arguments.triton}")
    if arguments.json:
        print((output / "manifest.json").read_text(), end="")
    else:
        _summarise(manifest, output)
    return 0


def _say(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        print(line, flush=True)


def _load(arguments: argparse.Namespace, name: str) -> Tuple[Any, Dict[str, Any]]:
    """The trained model and where it came from."""
    variant = get_variant(name)
    if arguments.random_weights is not None:
        import torch

        from asymtrack_edge.network import AsymTrack

        torch.manual_seed(arguments.random_weights)
        return AsymTrack(variant).eval(), {"weights": f"random, seed {arguments.random_weights}"}
    from asymtrack_edge.checkpoints import load_model, open_checkpoint

    if arguments.checkpoint is None:
        return load_model(None, variant), {"weights": f"bundled {name}"}
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.weights)
    if checkpoint.choice:
        _say(arguments, checkpoint.choice)
    provenance = {
        "weights": arguments.checkpoint.name,
        "weights_sha256": file_entry(arguments.checkpoint).sha256,
        "weights_taken": checkpoint.taken,
    }
    return checkpoint.model(variant), provenance


def _print_sizes() -> int:
    from asymtrack_edge.export.pipeline import model_size
    from asymtrack_edge.network import AsymTrack

    print("variant  parameters (M)  search network (G multiply-adds)  template network   paper (M, GFLOPs)")
    for name, variant in VARIANTS.items():
        size = model_size(AsymTrack(variant))
        print(
            f"{name:7}  {size['parameters'] / 1e6:14.2f}  {size['search_multiply_adds'] / 1e9:32.3f}  "
            f"{size['template_multiply_adds'] / 1e9:16.3f}   {variant.published.params_m}, {variant.published.flops_g}"
        )
    return 0


def _summarise(manifest: Manifest, output: Path) -> None:
    size, checked = manifest.provenance, manifest.verification
    print(
        f"{size['parameters'] / 1e6:.2f} M parameters; multiply-adds: {size['search_multiply_adds'] / 1e9:.3f} G per "
        f"frame, {size['template_multiply_adds'] / 1e9:.3f} G once per target"
    )
    print(
        f"verified over {checked['frames']} frames on {checked['runtime']}: boxes differ by at most "
        f"{checked['box_difference']:.1e} of the crop, track IoU {checked['track_iou_mean']:.4f} "
        f"(least {checked['track_iou_min']:.4f})"
    )
    for name, entry in sorted(manifest.files.items()):
        print(f"  {output / name}  {entry.bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
