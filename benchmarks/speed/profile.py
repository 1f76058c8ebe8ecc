"""Where the time of the search network goes, layer by layer."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Tuple

from asymtrack_edge.benchmarks.contenders import node_times
from asymtrack_edge.errors import UsageError


@dataclass(frozen=True)
class Layer:
    """One node of the graph as the runtime executes it (operators may be fused)."""

    operator: str
    name: str
    milliseconds: float


def onnxruntime_layers(model: Path, threads: int, runs: int = 60) -> List[Layer]:
    """Layers in order of execution by ONNX Runtime's own profiler, on the CPU."""
    return [Layer(op, name, us / 1000) for op, name, us in node_times(model, threads, runs)]


def parse_trtexec_profile(text: str) -> List[Layer]:
    """Layers from the file that ``trtexec --exportProfile=FILE`` writes (median times).

    Raises:
        UsageError: it is no such file.
    """
    try:
        content = json.loads(text)
        return [
            Layer(_kind(e["name"]), str(e["name"]), float(e.get("medianMs", e["averageMs"])))
            for e in content
            if "name" in e
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"this is no file written by trtexec --exportProfile ({error!r})") from None


def _kind(name: str) -> str:
    """What TensorRT did in a layer, as far as its name tells."""
    if name.startswith("{ForeignNode"):
        return "fused (Myelin)"
    if name.startswith("Reformatting"):
        return "reformat"
    return name.strip("/").split("/")[-1].split("_")[0].split(" ")[0] or name


def by_operator(layers: List[Layer]) -> List[Tuple[str, int, float]]:
    """Operator, number of layers and their milliseconds, slowest first."""
    sums: Dict[str, List[float]] = defaultdict(list)
    for layer in layers:
        sums[layer.operator].append(layer.milliseconds)
    return sorted(((op, len(t), sum(t)) for op, t in sums.items()), key=lambda row: -row[2])
