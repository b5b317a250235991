"""How many CPUs this process may keep busy: by its affinity, and by the limits of its control groups.

A container with two CPUs of a host of 64 (`docker --cpus=2`, Kubernetes' limits) has all 64 in its affinity: what
holds it back is a quota of CPU time, which Linux enforces by stopping all its threads for the rest of each period. The
quota is `cpu.max` in control groups of version 2, `cpu.cfs_quota_us` over `cpu.cfs_period_us` in version 1, of the
process's group and of each above it (Linux: Documentation/admin-guide/cgroup-v2.rst, scheduler/sched-bwc.rst).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

SYSTEM = Path("/")
"""Where `proc` and the mount points of control groups are."""


def own_cpus() -> frozenset[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def available_cpus() -> int:
    """CPUs that this process can keep busy, at least one; of a quota's last CPU a part counts."""
    return max(1, min(len(own_cpus()), *(math.ceil(limit) for limit in cpu_quotas().values()), 2**31))


def cpu_quotas() -> dict[int, Fraction]:
    """Each quota that holds for this process, in CPUs, by the inode of its control group: processes for which the same
    holds have the same inode, whatever the path that their containers show. Empty without any, as on macOS."""
    found: dict[int, Fraction] = {}
    for group in control_groups():
        quota = quota_of(group)
        if quota is not None:
            found[group.stat().st_ino] = quota
    return found


def control_groups() -> Iterator[Path]:
    """Folders of the control groups that may limit this process's CPU time, from its own up as far as they are shown:
    of a container often only its own."""
    try:
        lines = (SYSTEM / "proc/self/cgroup").read_text().splitlines()
        mounts = (SYSTEM / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    unified = paths.get("")
    legacy = next((path for names, path in paths.items() if "cpu" in names.split(",")), None)
    for mount in mounts:
        left, separator, right = mount.partition(" - cgroup")
        if not separator:
            continue
        fields, (kind, *_, options) = left.split(), f"cgroup{right}".split()
        own = unified if kind == "cgroup2" else legacy if kind == "cgroup" and "cpu" in options.split(",") else None
        if own is None:
            continue
        top, place = fields[3], SYSTEM / fields[4].lstrip("/")
        # Version 1 in a container: the path is the host's, and what is mounted here begins at the container's group.
        below = Path(own).relative_to(top) if Path(own).is_relative_to(top) and ".." not in own else Path()
        yield from (place / part for part in (below, *below.parents))


def quota_of(group: Path) -> Fraction | None:
    """CPUs that a control group may keep busy; None: no limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:  # the topmost has none, nor has one without the controller
        return None
    return None if quota in ("max", "-1") else Fraction(int(quota), int(period))
