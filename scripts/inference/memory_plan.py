"""How many context pairs run at once in the memory that is free."""

from __future__ import annotations

import logging
import math

import torch

from scripts.networks import Neuroverse3D
from scripts.runtime.memory import free_memory

logger = logging.getLogger(__name__)

MOST_PAIRS = {"cpu": 4, "cuda": 8}
"""More pairs at once are no faster."""
MAPS_PER_PAIR = {"slabs": 2.2, "modules": 8.0}
"""Memory of one pair's pass, in maps of the finest stage, by how the network runs (scripts/networks/execution.py)."""
MAPS_FIXED = {"slabs": 4.0, "modules": 8.0}
"""Memory that does not depend on the pairs: target maps, mean context features, the decoder."""
USABLE = 0.8
"""Part of the free memory that may be planned with."""


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
    way = "slabs" if kind == "cpu" else "modules"
    free, one = free_memory(device), map_bytes(network, spatial_size, amp)
    fits = int((USABLE * free / one - MAPS_FIXED[way]) / MAPS_PER_PAIR[way])
    size = max(1, min(MOST_PAIRS[kind], fits))
    logger.debug("mini-context size %d: %.1f GiB of memory are free on %s", size, free / 2**30, device)
    return size
