"""Memory of a process and of a CUDA device."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Dict, Optional

from asymtrack_edge.benchmarks.speed.facts import Runner, run_command


def parse_status(text: str) -> Dict[str, float]:
    """``rss`` and ``peak_rss`` in MB (10^6 bytes) from ``/proc/<pid>/status``; empty if not given there."""
    found = {}
    for name, key in (("VmRSS", "rss"), ("VmHWM", "peak_rss")):
        match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        if match:
            found[key] = int(match.group(1)) * 1024 / 1e6
    return found


def process_memory(pid: str = "self") -> Dict[str, float]:
    """See ``parse_status``; empty on systems without ``/proc``."""
    try:
        return parse_status(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return {}


def parse_compute_apps(text: str, pid: int) -> Optional[float]:
    """MB that a process holds on the GPU, from nvidia-smi's list ``pid, used_memory [MiB]``."""
    for line in text.splitlines():
        match = re.match(r"\s*(\d+)\s*,\s*(\d+)", line)
        if match and int(match.group(1)) == pid:
            return int(match.group(2)) * 2**20 / 1e6
    return None


def device_memory(pid: Optional[int] = None, run: Runner = run_command) -> Optional[float]:
    """MB that a process holds on the GPU; None without nvidia-smi (a Jetson's memory is shared: see RSS)."""
    text = run(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"])
    return parse_compute_apps(text or "", pid or os.getpid())
