"""Peak memory of a prediction with 64 contexts against one with 8, at a fixed mini-context size.

    python -m benchmarks.flat_memory [--context_sizes "[8,64]" --spatial_size 64 --mini_context_size 2]

The contexts lie in a file that is mapped into memory, and the network reads them piece by piece. Pages of a file
are the system's to take back, so the peak is that of the process's own (anonymous) memory, sampled all the time; on a
GPU it is that of PyTorch's allocator. The growth is given of that peak, and of what is left of it once the weights
and libraries, which are there before the pass, are taken off.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.networks import FULL, TINY, make_network
from benchmarks.paired import Conditions, Side, benchmark, clock, compare, peak_mib

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.002


@benchmark
def flat_memory(
    conditions: Conditions,
    context_sizes: Sequence[int] = (8, 64),
    spatial_size: int = 64,
    mini_context_size: int = 2,
    channels: Sequence[int] = FULL,
) -> Iterator[dict[str, Any]]:
    """Compare context sizes.

    Args:
        conditions: of the measurement.
        context_sizes: numbers of pairs, the smallest first; the others are compared with it.
        spatial_size: voxels per axis.
        mini_context_size: pairs that run at once.
        channels: network widths.
    """
    if conditions.quick:
        context_sizes, spatial_size, channels = (2, 4), 8, TINY
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for name in ("images", "masks"):
            with (Path(folder) / name).open("wb") as file:
                for _ in range(max(context_sizes)):
                    rng.random((spatial_size,) * 3, np.float32).tofile(file)
        arguments = {
            "folder": folder,
            "spatial_size": spatial_size,
            "mini_context_size": mini_context_size,
            "channels": channels,
            "device": conditions.device,
        }
        sides = {
            f"L={n}": Side("flat_memory:streamed_pass", {"context_size": n} | arguments) for n in sorted(context_sizes)
        }
        record = compare(sides, conditions, pairs=1)
    least, *_, most = record["sides"].values()
    growth = {
        "peak_growth": most["peak_mib"] / least["peak_mib"] - 1,
        "peak_growth_of_the_pass": (most["peak_mib"] - most["before_mib"]) / (least["peak_mib"] - least["before_mib"])
        - 1,
    }
    yield {"case": f"{spatial_size}^3 {' to '.join(sides)}, mini-contexts of {mini_context_size}"} | record | growth


def streamed_pass(
    folder: str, context_size: int, spatial_size: int, mini_context_size: int, channels: Sequence[int], device: str
) -> dict[str, Any]:
    """Predict once from the first contexts of the mapped files ``images`` and ``masks``."""
    grid = (spatial_size,) * 3
    images, masks = (
        torch.from_file(f"{folder}/{name}", shared=True, size=context_size * spatial_size**3).view(
            1, context_size, 1, *grid
        )
        for name in ("images", "masks")
    )
    network = make_network("ours", channels, spatial_size, device).eval()
    target = torch.rand(1, 1, *grid, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), PeakMemory(device) as memory:
        started = clock(device)
        network(target, images, masks, mini_context_size)
        seconds = clock(device) - started
    return {"seconds": seconds, "peak_mib": memory.peak_mib, "before_mib": memory.before_mib}


class PeakMemory:
    """Watches the process's anonymous memory, or PyTorch's on a GPU; ``before_mib`` and ``peak_mib``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before_mib = self.peak_mib = 0.0
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.before_mib = peak_mib(self.device) if self.device.startswith("cuda") else _anonymous_mib()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._watcher.join()
        if self.device.startswith("cuda"):
            self.peak_mib = peak_mib(self.device)

    def _watch(self) -> None:
        while not self._left.wait(_INTERVAL_SECONDS):
            self.peak_mib = max(self.peak_mib, _anonymous_mib())


def _anonymous_mib() -> float:
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(flat_memory)
