"""Where the time of the search network goes, layer by layer."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np

from asymtrack_edge.errors import UsageError


def onnxruntime_layers(model: Path, threads: int, runs: int = 60) -> List[Dict[str, Any]]:
    """Layers in order of execution by ONNX Runtime's own profiler, on the CPU.

    Returns:
        ``operator``, ``name`` and ``milliseconds`` (20th percentile over the runs) of every node of the
        graph that ONNX Runtime makes of ``model``.
    """
    import onnxruntime as ort

    from asymtrack_edge.benchmarks.speed.cases import random_for
    from asymtrack_edge.manifest import BATCH_AXIS

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name(BATCH_AXIS, 1)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feeds = {node.name: random_for(node) for node in session.get_inputs()}
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: Dict[Tuple[str, str], List[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"][: -len("_kernel_time")]].append(event["dur"] / 1000)
    return [
        {"operator": operator, "name": name, "milliseconds": float(np.percentile(values, 20))}
        for (operator, name), values in times.items()
    ]


def trtexec_layers(path: Path) -> List[Dict[str, Any]]:
    """Layers from the file that ``trtexec --exportProfile=FILE`` writes (median times).

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    try:
        return [
            {
                "operator": _kind(entry["name"]),
                "name": str(entry["name"]),
                "milliseconds": float(entry.get("medianMs", entry["averageMs"])),
            }
            for entry in json.loads(path.read_text(encoding="utf-8"))
            if "name" in entry
        ]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is no file written by trtexec --exportProfile") from None


def _kind(name: str) -> str:
    """What TensorRT did in a layer, as far as its name tells."""
    if name.startswith("{ForeignNode"):
        return "fused (Myelin)"
    if name.startswith("Reformatting"):
        return "reformat"
    return name.strip("/").split("/")[-1].split("_")[0].split(" ")[0] or name
