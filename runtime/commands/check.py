"""``asymtrack-check``: does this device compute the same as the verified model?

``asymtrack-export`` verifies its ONNX models against the trained model, running them with ONNX Runtime on
a CPU in fp32. This command compares another backend, with its own kernels, engines and precision, with that
reference, on the device that will run it. Exit code 0: it agrees; 1: it differs; 2: it cannot be compared.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict
from typing import Any, Dict, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime import comparison
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.sources.clip import clip_argument, default_clip

EXAMPLES = """
asymtrack-check asymtrack-t-fp16-xavier --backend tensorrt
asymtrack-check T --backend openvino --precision bf16 --clip video.mp4 --box 60,14,57,88
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    text = "Compare a backend with ONNX Runtime on this device's CPU. Without a GPU, choose the backend with --backend."
    parser = cli.parser("asymtrack-check", text, EXAMPLES)
    cli.add_model(parser, positional=True)
    cli.add_backend(parser)
    cli.add_clip(parser)
    cli.add_json(parser)
    return cli.run(_main, parser.parse_args(argv))


def limits_of(backend: Backend) -> comparison.Limits:
    """How far a backend may differ from ONNX Runtime on a CPU."""
    # CPUs only store numbers in fp16; GPUs compute in it. ONNX Runtime's TensorRT provider computes fp32 as TF32,
    # which has fp16's mantissa, and has no option to switch that off.
    half = backend.precision == "bf16" or (backend.precision == "fp16" and not backend.on_cpu)
    if half or (backend.precision, backend.name) == ("fp32", "onnxruntime-tensorrt"):
        return comparison.HALF_ARITHMETIC
    if backend.precision == "fp32" and not backend.on_cpu and platform.machine() in ("aarch64", "arm64"):
        return comparison.OTHER_CROPS
    return comparison.LIMITS[backend.precision]


def _main(arguments: argparse.Namespace) -> int:
    frames, box = clip_argument(arguments.clip, arguments.box) or default_clip()
    backend = open_backend(arguments.model, arguments.backend, arguments.device, arguments.threads, arguments.precision)
    try:
        if backend.name == "onnxruntime":
            raise UsageError("this compares ONNX Runtime on the CPU with itself: choose a --backend such as openvino")
        reference, limits = open_backend(arguments.model, "onnxruntime", threads=arguments.threads), limits_of(backend)
        report: Dict[str, Any] = {
            "checked": backend.description,
            "precision": backend.precision,
            "against": reference.description,
            "frames": len(frames),
            "track_length": comparison.SEGMENT,
            **comparison.compare(reference, backend, frames, box),
            "together_difference": comparison.compare_together(backend, frames, box),
            "limits": {name: limit for name, limit in asdict(limits).items() if name != "largest_half"},
        }
        report["passed"] = comparison.within(report, limits)
    finally:
        backend.close()
    cli.write_json(arguments.json, report)
    figures = comparison.figures(report)
    if not report["passed"]:
        cli.say(f"error: {backend.description} does not compute the same as the model: {', '.join(figures)}")
    elif arguments.json != "-":
        agreed = f"{backend.description} agrees with {report['against']} over {len(frames)} frames:"
        print("\n  ".join([agreed, *figures]))
    return 0 if report["passed"] else 1
