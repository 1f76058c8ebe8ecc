"""``asymtrack-check``: does this device compute what the verified model says?

``asymtrack-export`` verifies its ONNX models against the trained model, as ONNX Runtime computes them on
a CPU in fp32. Here another backend, with its own kernels, engines and precision, is held against that on
the device that will run it. Exit code 0: it agrees; 1: it does not; 2: it could not be tried.
"""

from __future__ import annotations

import argparse
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
from asymtrack_edge.runtime.backends.loading import open_backend
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
    cli.add_model(parser, positional=True)
    cli.add_backend(parser)
    cli.add_clip(parser)
    cli.add_json(parser)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def limits_of(backend: Backend) -> Limits:
    """How far a backend may be from the model as ONNX Runtime computes it on a CPU."""
    # CPUs keep numbers in fp16 and compute in fp32, GPUs compute in it.
    in_half = backend.precision == "bf16" or (backend.precision == "fp16" and not backend.on_cpu)
    if backend.precision == "fp32" and not backend.on_cpu and platform.machine() in ("aarch64", "arm64"):
        return OTHER_CROPS
    return HALF_ARITHMETIC if in_half else LIMITS[backend.precision]


def check(backend: Backend, reference: Backend, frames: Sequence[np.ndarray], box: Box) -> Dict[str, Any]:
    """Compares two backends of one model: one target, and several at once.

    Returns:
        The figures with their limits and whether they are within them; see ``agreement``.
    """
    limits = limits_of(backend)
    report: Dict[str, Any] = {
        "checked": backend.description,
        "precision": backend.precision,
        "against": reference.description,
        "frames": len(frames),
        "track_length": SEGMENT,
        **compare(reference, backend, frames, box),
        "together_difference": compare_together(backend, frames, box),
        "limits": {name: limit for name, limit in asdict(limits).items() if name != "largest_half"},
    }
    return {**report, "passed": within(report, limits)}


def _main(arguments: argparse.Namespace) -> int:
    frames, box = clip_argument(arguments.clip, arguments.box) or default_clip()
    backend = open_backend(arguments.model, arguments.backend, arguments.device, arguments.threads, arguments.precision)
    try:
        report = check(backend, open_backend(arguments.model, "onnxruntime", threads=arguments.threads), frames, box)
    finally:
        backend.close()
    # JSON knows no infinity, which stands for predictions that are no numbers.
    cli.write_json(arguments.json, {k: None if v in (np.inf, -np.inf) else v for k, v in report.items()})
    if not report["passed"]:
        print(f"error: {backend.description} does not compute what the model says: {figures(report)}", file=sys.stderr)
        return 1
    if arguments.json != "-":
        print(f"{backend.description} agrees with {report['against']} over {len(frames)} frames: {figures(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
