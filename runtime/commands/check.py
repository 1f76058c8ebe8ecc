"""``asymtrack-check``: does this device compute what the verified model says?

``asymtrack-export`` proves that its ONNX models equal the trained model, as ONNX Runtime computes them on
a CPU in fp32. Here another backend, with its own kernels, engines and precision, is held against that on
the device that will run it. Exit code 0: it agrees; 1: it does not; 2: it could not be tried.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from typing import Any, Dict, Optional, Sequence

import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.agreement import (
    HALF_ARITHMETIC,
    LIMITS,
    OTHER_CROPS,
    SEGMENT,
    Limits,
    compare,
    compare_together,
    figures,
    within,
)
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import BACKENDS, open_backend
from asymtrack_edge.runtime.sources.clip import clip_argument, default_clip

EXAMPLES = """
asymtrack-check asymtrack-t-fp16-xavier --backend tensorrt
asymtrack-check T --backend openvino --precision bf16 --clip video.mp4 --box 60,14,57,88
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = cli.parser(
        "asymtrack-check",
        "Compare a backend on this device with ONNX Runtime on its CPU: boxes, scores and whole tracks.",
        EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="T, S, B or an export directory")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="what to check (default: auto)")
    parser.add_argument("--device", type=cli.device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", choices=cli.PRECISIONS, help="of the arithmetic (default: the model's)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--clip", metavar="SOURCE", help="video or image folder to compare on (default: synthetic)")
    parser.add_argument("--box", metavar="x,y,w,h", help="the target in the clip's first frame")
    parser.add_argument("--json", action="store_true", help="print the figures for a machine")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def limits_of(engine: Backend) -> Limits:
    """How far an engine may be from the model as ONNX Runtime computes it on a CPU."""
    # CPUs keep numbers in fp16 and compute in fp32, GPUs compute in it.
    in_half = engine.precision == "bf16" or (engine.precision == "fp16" and not engine.on_cpu)
    if engine.precision == "fp32" and not engine.on_cpu and platform.machine() in ("aarch64", "arm64"):
        return OTHER_CROPS
    return HALF_ARITHMETIC if in_half else LIMITS[engine.precision]


def check(engine: Backend, reference: Backend, frames: Sequence[np.ndarray], box: Box) -> Dict[str, Any]:
    """Compares two engines of one model: one target, and several at once.

    Returns:
        The figures with their limits and whether they are within them; see ``agreement``.
    """
    limits = limits_of(engine)
    report: Dict[str, Any] = {
        "checked": engine.description,
        "precision": engine.precision,
        "against": reference.description,
        "frames": len(frames),
        "track_length": SEGMENT,
        **compare(reference, engine, frames, box),
        "together_difference": compare_together(engine, frames, box),
        "limits": {name: limit for name, limit in asdict(limits).items() if name != "largest_half"},
    }
    return {**report, "passed": within(report, limits)}


def _main(arguments: argparse.Namespace) -> int:
    frames, box = clip_argument(arguments.clip, arguments.box) or default_clip()
    engine = open_backend(arguments.model, arguments.backend, arguments.device, arguments.threads, arguments.precision)
    try:
        report = check(engine, open_backend(arguments.model, "onnxruntime", threads=arguments.threads), frames, box)
    finally:
        engine.close()
    if arguments.json:
        # JSON knows no infinity, which stands for answers that are no numbers.
        finite = {k: None if v in (np.inf, -np.inf) else v for k, v in report.items()}
        print(json.dumps(finite, indent=2, allow_nan=False))
    if not report["passed"]:
        print(f"error: {engine.description} does not compute what the model says: {figures(report)}", file=sys.stderr)
        return 1
    if not arguments.json:
        print(f"{engine.description} agrees with {report['against']} over {len(frames)} frames: {figures(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
