"""Start-up time and memory of a tracking process, measured in fresh processes.

The child imports what a user's program imports, loads a model, tracks for a while and reports; the
parent has long imported everything else, which would hide the cost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any, Dict, List

import numpy as np

from asymtrack_edge.benchmarks.speed.cases import Setting
from asymtrack_edge.errors import BackendError

_CHILD = """
import json, sys, time
began = time.perf_counter()
from asymtrack_edge.runtime import Tracker
imported = time.perf_counter()
gpu, frames, setting = json.loads(sys.argv[1])
cpu = time.process_time()
tracker = Tracker.load(**setting)
loaded, cpu = time.perf_counter(), time.process_time() - cpu
import numpy as np
frame = np.random.RandomState(0).randint(0, 256, (720, 1280, 3)).astype(np.uint8)
first = time.perf_counter()
tracker.init(frame, (600, 300, 80, 60))
tracker.update(frame)
tracked = time.perf_counter()
for _ in range(frames):
    tracker.update(frame)
heavy = [m for m in ("torch", "onnx", "matplotlib") if m in sys.modules]
from asymtrack_edge.benchmarks.speed.machine import process_memory
print(json.dumps({"import (s)": imported - began, "load (s)": loaded - imported, "load, processor time (s)": cpu,
                  "first init and update (s)": tracked - first, **process_memory(gpu), "heavy": heavy}))
"""


def measure(setting: Setting, runs: int, gpu: int = 0, frames: int = 20) -> Dict[str, Any]:
    """Starts ``runs`` tracking processes one after the other.

    The first one, which may have to read the packages from the disk, counts like the others; the
    medians are those of a program that was started before.

    Returns:
        Medians of the times in seconds, the greatest memory in MB (10^6 bytes), and under ``heavy`` the
        packages that got imported though tracking needs none of them.

    Raises:
        BackendError: the child failed; the message is its own.
    """
    answers: List[Dict[str, Any]] = []
    for _ in range(runs):
        command = [sys.executable, "-c", _CHILD, json.dumps([gpu, frames, asdict(setting)])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BackendError(f"a tracking process could not be started: {lines[-1]}")
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    found: Dict[str, Any] = {"heavy": sorted({name for a in answers for name in a["heavy"]})}
    for key in answers[0]:
        if key != "heavy":
            values = [a[key] for a in answers if key in a]
            found[key] = float(np.median(values) if key.endswith("(s)") else max(values))
    return found
