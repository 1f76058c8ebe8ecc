"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from asymtrack_edge.files import system_text


def processors(root: Path = Path("/")) -> int:
    """Cores that this process may use, given its affinity and its container's CPU quota; at least 1.

    Two hardware threads of one core count once: a network gains nothing from the second. ``root`` is the folder
    that holds ``proc`` and ``sys``.
    """
    allowed = os.sched_getaffinity(0)
    cores = {system_text(root / f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or n for n in allowed}
    return max(1, int(min(len(cores), cpu_quota(root))))


def cpu_quota(root: Path) -> float:
    """The CPU quota of this process's control groups, in processors; infinity without a quota.

    Versions 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``) are supported. The quotas of a group's ancestors apply, too.
    """
    mounts, quota = root / "sys/fs/cgroup", math.inf
    for line in system_text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (mounts / controllers, mounts / "cpu", mounts / "unified"):
            # Inside a container, the path may be the host's: then only the mount itself exists.
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                old = f"{system_text(folder / 'cpu.cfs_quota_us')} {system_text(folder / 'cpu.cfs_period_us')}"
                for text in (system_text(folder / "cpu.max"), old):
                    with suppress(ValueError, ZeroDivisionError):  # "max", or no such file
                        allowed, period = map(int, text.split())
                        quota = min(quota, allowed / period) if allowed > 0 else quota
    return quota
