"""Peak memory and time of one forward pass, or of one training step, at a given grid and mini-context size.

    python -m benchmarks.pass_memory [--spatial_size 64 --context_size 3 --mini_context_size "[1,3]" --train]

Each mini-context size runs in a process of its own on random input; the peak is that of the whole process, libraries
included.
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
from scripts.losses import SmoothL3L1Loss
from scripts.networks import Neuroverse3D


def measure(spatial_size: int, context_size: int, mini_context_size: int, channels: Sequence[int], train: bool) -> None:
    """Run once and print seconds and peak memory as JSON."""
    torch.manual_seed(0)
    network = Neuroverse3D(channels=tuple(channels), spatial_size=spatial_size)
    network = network.to(memory_format=torch.channels_last_3d).train(train)
    target = torch.rand(1, 1, *(spatial_size,) * 3)
    contexts = torch.rand(1, context_size, 1, *(spatial_size,) * 3)
    optimizer = torch.optim.Adam(network.parameters(), 1e-5)
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        loss = SmoothL3L1Loss()(network(target, contexts, contexts, mini_context_size), target)
    if train:
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - started
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": round(seconds, 1), "peak_mib": round(peak_mib)}))


def pass_memory(
    spatial_size: int = 64,
    context_size: int = 3,
    mini_context_size: int | Sequence[int] = (1, 3),
    channels: Sequence[int] = (32, 64, 128, 256, 512),
    train: bool = False,
) -> None:
    """Measure each mini-context size.

    Args:
        spatial_size: voxels per axis.
        context_size: number of pairs.
        mini_context_size: pairs that run at once; one number or several to compare.
        channels: network widths.
        train: forward, backward and optimiser step instead of a forward pass.
    """
    for size in [mini_context_size] if isinstance(mini_context_size, int) else mini_context_size:
        call = f"measure({spatial_size}, {context_size}, {size}, {tuple(channels)}, {train})"
        code = f"from benchmarks.pass_memory import measure; {call}"
        found = json.loads(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
        what = {"step": "train" if train else "forward", "grid": spatial_size, "mini_context_size": size}
        print(json.dumps(what | found | {"device": "cpu"}), flush=True)


if __name__ == "__main__":
    main(pass_memory)
