"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from asymtrack_edge.files import system_text


def processors(root: Path = Path("/")) -> int:
    """Cores that this process may use, by its affinity and by the CPU quota of its container; at least 1.

    Two processors that are threads of one core count once: a network gains nothing from the second. ``proc`` and
    ``sys`` are below ``root``.
    """
    allowed = os.sched_getaffinity(0)
    cores = {system_text(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or n for n in allowed}
    return max(1, int(min(len(cores), cpu_quota(root))))


def cpu_quota(root: Path) -> float:
    """Processors' worth of time that the control groups of this process allow; infinity without a quota.

    Both versions are understood, ``cpu.max`` and ``cpu.cfs_quota_us``. A group's ancestors bound it, too.
    """
    mounts, quota = root / "sys/fs/cgroup", math.inf
    for line in system_text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (mounts / controllers, mounts / "cpu", mounts / "unified"):
            # Seen from inside a container, the path may be the host's: then only the mount itself is there.
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                old = f"{system_text(folder / 'cpu.cfs_quota_us')} {system_text(folder / 'cpu.cfs_period_us')}"
                for text in (system_text(folder / "cpu.max"), old):
                    with suppress(ValueError, ZeroDivisionError):  # "max", or no such file
                        allowed, period = map(int, text.split())
                        quota = min(quota, allowed / period) if allowed > 0 else quota
    return quota
