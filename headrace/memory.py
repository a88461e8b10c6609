"""Memory that can be taken now, and the refusal to take more."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from headrace.errors import CapacityError

GIB = 2**30


def available_memory_bytes(device: torch.device) -> int:
    """Memory that can be taken now: the GPU's free memory, or what the operating system calls available, and no more
    than the process's control group (a container) has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_machine_bytes(), *group_room_bytes()])


def check_memory(what: str, needed_bytes: int, device: torch.device, way_out: str) -> None:
    """Raise CapacityError, naming asked and available, if there is not so much memory. `what` begins the sentence."""
    free_bytes = available_memory_bytes(device)
    if needed_bytes > free_bytes:
        raise CapacityError(f"{what} {size(needed_bytes)}; {size(free_bytes)} are available on {device}: {way_out}")


def size(n_bytes: int) -> str:
    """Bytes for a message, in the unit that shows them best."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= unit // 10:
            return f"{n_bytes / unit:,.2f} {name}"
    return f"{n_bytes} bytes"


def _machine_bytes() -> int:
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask for the total instead
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def group_room_bytes(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limits of the control groups above this process leave, both versions of them; pages that only cache
    files count as free, as they do for the machine.

    Version 2: https://docs.kernel.org/admin-guide/cgroup-v2.html, version 1: .../cgroup-v1/memory.html.
    """
    found: list[int] = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, names, path = line.split(":", 2)
        if names == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in names.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        below = base / path.lstrip("/")
        # Inside a container the path may be that of the host, and its own group the root.
        for directory in dict.fromkeys([below, *below.parents, base]):
            if directory != base and base not in directory.parents:
                continue
            try:
                limit_bytes = int((directory / limit).read_text())  # "max": no limit, no number
                used_bytes = int((directory / usage).read_text())
                stat = dict(entry.split() for entry in (directory / "memory.stat").read_text().splitlines())
                found.append(max(0, limit_bytes - used_bytes + int(stat.get(cache, 0))))
            except (OSError, ValueError):
                continue
    return found
