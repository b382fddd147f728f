"""Peak memory of a prediction against the number of contexts, at a fixed mini-context size.

    python -m benchmarks.flat_memory [--spatial_size 48 --channels "[16,32,64]" --mini_context_size 2]

Each size runs in a process of its own; contexts are made one by one in host memory, as inference holds them, and
their own bytes are taken off the peak. The ratio against the smallest size is what should stay near 1.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from scripts.commandline import main
from scripts.networks import Neuroverse3D


def measure(context_size: int, spatial_size: int, channels: Sequence[int], mini_context_size: int) -> None:
    """Predict once and print seconds and peak memory as JSON."""
    torch.manual_seed(0)
    network = Neuroverse3D(channels=tuple(channels), spatial_size=spatial_size).eval()
    target = torch.rand(1, 1, *(spatial_size,) * 3)
    contexts = torch.rand(1, context_size, 1, *(spatial_size,) * 3)
    started = time.perf_counter()
    with torch.no_grad():
        network(target, contexts, contexts, mini_context_size)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - contexts.numel() * contexts.element_size()
    print(json.dumps({"L": context_size, "seconds": round(seconds, 2), "peak_mib": round(peak / 2**20, 1)}))


def flat_memory(
    context_sizes: Sequence[int] = (4, 8, 32),
    spatial_size: int = 48,
    channels: Sequence[int] = (16, 32, 64),
    mini_context_size: int = 2,
) -> None:
    """Compare context sizes.

    Args:
        context_sizes: numbers of pairs; the first is what the others are compared with.
        spatial_size: voxels per axis.
        channels: network widths.
        mini_context_size: pairs that run at once.
    """
    first = None
    for size in context_sizes:
        call = f"measure({size}, {spatial_size}, {tuple(channels)}, {mini_context_size})"
        code = f"from benchmarks.flat_memory import measure; {call}"
        found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        first = first or found
        print(json.dumps(found | {"memory_ratio": round(found["peak_mib"] / first["peak_mib"], 3), "device": "cpu"}))


if __name__ == "__main__":
    main(flat_memory)
