"""How much memory there is, and what to do with it: how many context pairs run at once."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from scripts.networks import Neuroverse3D

logger = logging.getLogger(__name__)

MOST_PAIRS = {"cpu": 4, "cuda": 8}
"""More pairs at once are no faster."""
MAPS_PER_PAIR = {"slabs": 2.2, "modules": 8.0}
"""Memory of one pair's pass, in maps of the finest stage, by how the network runs (scripts/networks/execution.py)."""
MAPS_FIXED = {"slabs": 4.0, "modules": 8.0}
"""Memory that does not depend on the pairs: target maps, mean context features, the decoder."""
USABLE = 0.8
"""Part of the free memory that may be planned with."""

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
    known = [free for free in (_available_on_host(), _left_in_container()) if free is not None]
    return min(known, default=_UNKNOWN)


def cache_bytes(cache_mb: float | None, device: torch.device) -> int:
    """Memory budget of a cache.

    Args:
        cache_mb: in MB; None takes a quarter of the free memory.
        device: where the entries are.
    """
    return int(CACHE_SHARE * free_memory(device) if cache_mb is None else cache_mb * 2**20)


def map_bytes(network: Neuroverse3D, spatial_size: tuple[int, ...], amp: bool = False) -> int:
    """Bytes of one map of the finest stage."""
    return network.channels[0] * math.prod(spatial_size) * (2 if amp else 4)


def fitting_pairs(network: Neuroverse3D, spatial_size: tuple[int, ...], device: torch.device, amp: bool = False) -> int:
    """The mini-context size that the free memory allows, at least 1.

    Args:
        network: its width sets the size of a map.
        spatial_size: the grid.
        device: where it runs.
        amp: maps are stored in 16 bits.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    way = "slabs" if kind == "cpu" and not amp else "modules"
    free, one = free_memory(device), map_bytes(network, spatial_size, amp)
    fits = int((USABLE * free / one - MAPS_FIXED[way]) / MAPS_PER_PAIR[way])
    size = max(1, min(MOST_PAIRS[kind], fits))
    logger.info("mini-context size %d: %.1f GiB of memory are free on %s", size, free / 2**30, device)
    return size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
