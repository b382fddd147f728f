"""How much memory is free: of a GPU, of this computer or left to its container; budgets, and running out of it."""

from __future__ import annotations

from pathlib import Path

import torch

CACHE_SHARE = 0.25
"""Part of the free memory that a cache may take."""

_UNKNOWN = 8 * 2**30

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> int:
    """Free bytes of a device: of a GPU, or of the host within the limits of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def cache_bytes(cache_mb: float | None, device: torch.device) -> int:
    """Memory budget of a cache.

    Args:
        cache_mb: in MB; None takes a quarter of the free memory.
        device: where the entries are.
    """
    return int(CACHE_SHARE * free_memory(device) if cache_mb is None else cache_mb * 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_host_memory() -> int:
    """Free bytes of the host, within the limits of its container."""
    known = [free for free in (_available_on_host(), _left_in_container()) if free is not None]
    return min(known, default=_UNKNOWN)


def _available_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not a Linux
        return None
    fields = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return fields["MemAvailable"] * 1024 if "MemAvailable" in fields else None


def _left_in_container() -> int | None:
    """Of a memory limit such as that of ``docker run --memory`` (control groups, version 2 and 1)."""
    for limit, used in _CGROUP_FILES:
        try:
            text = (_CGROUP / limit).read_text().strip()
            return None if text == "max" else max(0, int(text) - int((_CGROUP / used).read_text()))
        except (OSError, ValueError):
            continue
    return None
