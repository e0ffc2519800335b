"""What this process may use of the machine: cores and memory, within affinity and control groups (containers)."""

import functools
import math
import os
import shutil
from pathlib import Path

UNKNOWN_MEMORY = 4 * 2**30
"""Assumed where the system does not tell its memory (Windows): a small laptop's."""


@functools.cache
def n_cores() -> int:
    """Cores this process may keep busy: the affinity mask, less a container's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_cores_of_v2(text) for text in _cgroup_files("", "cpu.max")]
    periods = _cgroup_files("cpu", "cpu.cfs_period_us")
    quotas += [
        int(q) / int(p) for q, p in zip(_cgroup_files("cpu", "cpu.cfs_quota_us"), periods, strict=False) if int(q) > 0
    ]
    return max(1, math.floor(min([allowed, *quotas])))


@functools.cache
def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its container's where that is less."""
    limits = [_physical_memory()]
    for text in _cgroup_files("", "memory.max") + _cgroup_files("memory", "memory.limit_in_bytes"):
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_MEMORY


def _cores_of_v2(text: str) -> float:
    """`cpu.max` is "QUOTA PERIOD" in microseconds, or "max PERIOD"."""
    quota, period = text.split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _cgroup_files(controller: str, name: str) -> list[str]:
    """The file `name` of this process's control group and of each above it; controller "" means version 2.

    A limit of any ancestor binds, and inside a container the visible tree may begin at the container's own group.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            break
    else:
        return []
    mount = Path("/sys/fs/cgroup") / controller
    folders = [mount / part for part in (Path(group.lstrip("/")), *Path(group.lstrip("/")).parents)]
    found = []
    for folder in dict.fromkeys(folders):
        try:
            found.append((folder / name).read_text().strip())
        except OSError:
            continue
    return found


def compiler_present() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++", "cl"))
