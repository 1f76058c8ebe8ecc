"""Start-up time and memory of a tracking process, measured in fresh processes.

The child imports what a user's program imports, loads a model, tracks for a while and reports; the
parent has long imported everything else, which would hide the cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from asymtrack_edge.errors import BackendError

_CHILD = """
import json, sys, time
began = time.perf_counter()
from asymtrack_edge.runtime import Tracker
imported = time.perf_counter()
model, backend, device, threads, frames = json.loads(sys.argv[1])
cpu = time.process_time()
tracker = Tracker.load(model, backend, threads=threads)
loaded, cpu = time.perf_counter(), time.process_time() - cpu
import numpy as np
frame = np.random.RandomState(0).randint(0, 256, (720, 1280, 3)).astype(np.uint8)
first = time.perf_counter()
tracker.init(frame, (600, 300, 80, 60))
tracker.update(frame)
tracked = time.perf_counter()
for _ in range(frames):
    tracker.update(frame)
from asymtrack_edge.benchmarks.speed.memory import device_memory, process_memory
print(json.dumps({
    "import_s": imported - began, "load_s": loaded - imported, "load_cpu_s": cpu, "first_track_s": tracked - first,
    "device_mb": device_memory(), **process_memory(),
    "heavy": [m for m in ("torch", "onnx", "matplotlib") if m in sys.modules],
    "engine": tracker.backend.description,
}))
"""


@dataclass(frozen=True)
class StartUp:
    """One kind of tracking process; times are medians over the runs, in seconds.

    Attributes:
        import_s: of ``asymtrack_edge.runtime`` with numpy, OpenCV and the inference runtime.
        load_s: of ``Tracker.load``, which reads, checks and optimises both networks.
        load_least_s: the fastest of the runs.
        load_cpu_s: processor time of the load, which other programs do not lengthen.
        first_track_s: of the first ``init`` and ``update`` together.
        peak_rss_mb, rss_mb: of the process, greatest over the runs (10^6 bytes).
        device_mb: on the GPU, where nvidia-smi can tell.
        heavy: heavy packages that got imported though tracking needs none of them.
        runs: processes started.
    """

    engine: str
    import_s: float
    load_s: float
    load_least_s: float
    load_cpu_s: float
    first_track_s: float
    rss_mb: Optional[float]
    peak_rss_mb: Optional[float]
    device_mb: Optional[float]
    heavy: List[str]
    runs: int


def measure(
    model: Path, backend: str = "auto", device: int = 0, threads: Optional[int] = None, runs: int = 5, frames: int = 20
) -> StartUp:
    """Starts ``runs`` processes one after the other.

    The first one, which may have to read the packages from the disk, counts like the others; the
    medians are those of a program that was started before.

    Raises:
        BackendError: the child failed; the message is its own.
    """
    answers: List[Dict[str, Any]] = []
    arguments = json.dumps([str(model), backend, device, threads, frames])
    for _ in range(runs):
        done = subprocess.run([sys.executable, "-c", _CHILD, arguments], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BackendError(f"a tracking process could not be started: {lines[-1]}")
        answers.append(json.loads(done.stdout.splitlines()[-1]))

    def median(key: str) -> float:
        return float(np.median([a[key] for a in answers]))

    def greatest(key: str) -> Optional[float]:
        values = [a[key] for a in answers if a.get(key) is not None]
        return max(values) if values else None

    return StartUp(
        engine=answers[0]["engine"],
        import_s=median("import_s"),
        load_s=median("load_s"),
        load_least_s=min(a["load_s"] for a in answers),
        load_cpu_s=median("load_cpu_s"),
        first_track_s=median("first_track_s"),
        rss_mb=greatest("rss"),
        peak_rss_mb=greatest("peak_rss"),
        device_mb=greatest("device_mb"),
        heavy=sorted({name for a in answers for name in a["heavy"]}),
        runs=runs,
    )
