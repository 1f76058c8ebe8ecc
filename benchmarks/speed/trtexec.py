"""trtexec itself, where TensorRT is installed: protocol P4 with transfers, compute and enqueue apart."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Mapping, Optional, Sequence

from asymtrack_edge.benchmarks.speed.facts import Runner
from asymtrack_edge.errors import BackendError

#: Where NVIDIA's packages put it, on Jetson too.
_USUAL = "/usr/src/tensorrt/bin/trtexec"
_PARTS = ("Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")


@dataclass(frozen=True)
class Part:
    """One line of the summary: milliseconds; a percentile that the version does not print is None."""

    min: float
    max: float
    mean: float
    median: float
    p90: Optional[float]
    p95: Optional[float]
    p99: Optional[float]


@dataclass(frozen=True)
class Performance:
    """trtexec's performance summary.

    Attributes:
        throughput: queries per second.
        parts: by name: Latency, Enqueue Time, H2D Latency, GPU Compute Time, D2H Latency.
    """

    throughput: float
    parts: Dict[str, Part]

    def stages(self) -> Dict[str, float]:
        """Median milliseconds of what follows one another: copy there, compute, copy back."""
        names = {"H2D Latency": "copy in", "GPU Compute Time": "infer", "D2H Latency": "copy out"}
        return {new: self.parts[old].median for old, new in names.items() if old in self.parts}


def find_trtexec() -> Optional[Path]:
    """Path of trtexec; None if it is not installed."""
    found = shutil.which("trtexec") or (_USUAL if Path(_USUAL).is_file() else None)
    return Path(found) if found else None


def parse_summary(text: str) -> Performance:
    """Parses what trtexec prints (TensorRT 8.4 to 10).

    Raises:
        BackendError: there is no performance summary; the message has trtexec's first error.
    """
    throughput = re.search(r"Throughput: ([\d.]+) qps", text)
    parts = {}
    for name in _PARTS:
        line = re.search(rf"\[I\] {name}: (min = .*)", text)
        if line:
            parts[name] = _part(line.group(1))
    if not throughput or "Latency" not in parts:
        error = re.search(r"\[E\] (.*)", text)
        why = error.group(1) if error else "it printed no performance summary"
        raise BackendError(f"trtexec could not measure this engine: {why}")
    return Performance(float(throughput.group(1)), parts)


def _part(text: str) -> Part:
    numbers = {k: float(v) for k, v in re.findall(r"([\w()%]+) = ([\d.]+) ms", text)}
    return Part(
        numbers["min"],
        numbers["max"],
        numbers["mean"],
        numbers["median"],
        *(numbers.get(f"percentile({p}%)") for p in (90, 95, 99)),
    )


def run_trtexec(trtexec: Path, engine: Path, shapes: Mapping[str, Sequence[int]], run: Runner) -> Performance:
    """Measures an engine with trtexec's defaults (200 ms warm-up, 3 s, 10 iterations).

    Args:
        trtexec: see ``find_trtexec``.
        engine: serialized search network.
        shapes: of its inputs, for engines whose batch axis is free; empty for others.
        run: runs it and returns its output.

    Raises:
        BackendError: it failed.
    """
    command = [str(trtexec), f"--loadEngine={engine}", "--percentile=90,95,99"]
    if shapes:
        command.append("--shapes=" + ",".join(f"{n}:{'x'.join(map(str, s))}" for n, s in shapes.items()))
    return parse_summary(run(command) or "")
