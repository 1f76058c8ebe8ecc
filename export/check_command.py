"""``asymtrack-check``: does this device compute what the verified model says?

``asymtrack-export`` proves that its ONNX models equal the trained model, as ONNX Runtime computes them on
a CPU in fp32. Here another backend, with its own kernels, engines and precision, is held against that on
the device that will run it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any, Dict, Optional, Sequence

from asymtrack_edge import cli
from asymtrack_edge.errors import EngineError
from asymtrack_edge.export.agreement import HALF_ARITHMETIC, LIMITS, SEGMENT, Limits, compare, figures, within
from asymtrack_edge.export.clip import clip_argument, default_clip
from asymtrack_edge.runtime.engine import Engine
from asymtrack_edge.runtime.loading import BACKENDS, open_engine

EXAMPLES = """
asymtrack-check asymtrack-t-fp16-xavier --backend tensorrt
asymtrack-check T --backend openvino-bf16 --clip video.mp4 --box 60,14,57,88
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
    parser.add_argument("--device", type=int, default=0, metavar="N", help="GPU index (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--clip", metavar="SOURCE", help="video or image folder to compare on (default: synthetic)")
    parser.add_argument("--box", metavar="x,y,w,h", help="the target in the clip's first frame")
    parser.add_argument("--json", action="store_true", help="print the figures for a machine")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Entry point; see ``--help``."""
    return cli.run(_main, make_parser().parse_args(argv))


def limits_of(engine: Engine) -> Limits:
    """How far an engine may be from the model as ONNX Runtime computes it on a CPU."""
    precise = engine.precision == "fp32" or engine.backend == "onnxruntime"
    return LIMITS[engine.precision] if precise else HALF_ARITHMETIC


def _main(arguments: argparse.Namespace) -> int:
    frames, box = clip_argument(arguments.clip, arguments.box) or default_clip()
    engine = open_engine(arguments.model, arguments.backend, arguments.device, arguments.threads)
    try:
        reference = open_engine(arguments.model, "onnxruntime", threads=arguments.threads)
        report: Dict[str, Any] = {
            "checked": engine.name,
            "precision": engine.precision,
            "against": reference.name,
            "frames": len(frames),
            "track_length": SEGMENT,
            **compare(reference, engine, frames, box),
            "limits": asdict(limits_of(engine)),
        }
    finally:
        engine.close()
    report["passed"] = within(report, limits_of(engine))
    if arguments.json:
        print(json.dumps(report, indent=2))
    if not report["passed"]:
        raise EngineError(f"{engine.name} does not compute what the model says: {figures(report)}")
    if not arguments.json:
        print(f"{engine.name} agrees with {reference.name} over {len(frames)} frames: {figures(report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
