"""Puts trained weights into the package: safetensors, the ONNX pair, and a model card.

For maintainers. The card's JSON holds what the weights do not show (data, pairs seen, time, validation);
it is kept in the safetensors header and rendered as Markdown. Without ``--card`` the weights keep their card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.checkpoints import open_checkpoint, save_weights
from asymtrack_edge.errors import UsageError
from asymtrack_edge.export.pipeline import Export, ExportOptions
from asymtrack_edge.files import write_text
from asymtrack_edge.manifest import Manifest
from asymtrack_edge.variants import BUNDLED, get_variant


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point."""
    parser = cli.parser(
        "asymtrack_edge.export.bundle",
        "Put trained weights into the package.",
        "python -m asymtrack_edge.export.bundle runs/t/weights.safetensors --variant T --card card.json",
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--variant", required=True, metavar="{T,S,B}")
    parser.add_argument("--card", type=Path, help="JSON: data, training, validation, limits (default: the file's own)")
    return cli.run(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> None:
    variant = get_variant(arguments.variant)
    checkpoint = open_checkpoint(arguments.checkpoint)
    if not arguments.card and "card" not in checkpoint.metadata:
        raise UsageError(f"{arguments.checkpoint} has no card: give --card FILE")
    text = arguments.card.read_text(encoding="utf-8") if arguments.card else checkpoint.metadata["card"]
    card: Dict[str, Any] = json.loads(text)
    file = BUNDLED / f"{variant.name}.safetensors"
    save_weights(file, checkpoint.tensors(variant), {"variant": variant.name, "card": card})
    bundled = open_checkpoint(file)
    weights = {"weights": file.name, "weights_sha256": bundled.sha256}
    # A free batch axis, for other programs that run several targets as one batch.
    options = ExportOptions(max_batch=64, half_storage=True)
    manifest = Export(bundled.model(variant), options, weights).run(BUNDLED / variant.name)
    write_text(BUNDLED / f"{variant.name}.md", render(variant.name, card, manifest))
    print(f"bundled {file} and {BUNDLED / variant.name}")


def render(name: str, card: Dict[str, Any], manifest: Manifest) -> str:
    """The model card as Markdown: one section per key of the card, tables for lists of rows."""
    lines = [f"# AsymTrack-{name}: bundled weights"]
    for title, content in card.items():
        lines += ["", f"## {title}", ""]
        if isinstance(content, list) and content and isinstance(content[0], dict):
            columns = list(content[0])
            rows = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in content)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
        else:
            lines += [f"- {k}: {v}" for k, v in content.items()] if isinstance(content, dict) else [str(content)]
    checked = manifest.verification
    return "\n".join(lines) + (
        f"\n\n## The ONNX pair\n\n`{name}/template.onnx` and `{name}/search.onnx` compute in fp32 and store their "
        f"weights as fp16. On {checked['frames']} synthetic frames, boxes differ from the trained PyTorch model's by "
        f"at most {checked['box_difference']:.1e} of the crop; the mean track IoU is {checked['track_iou_mean']:.4f}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
