"""Time and peak memory against the number of contexts L, of ours and of the baseline.

python -m benchmarks.context_curve [--context_sizes "[1,2,4,8,16,32,64]" --spatial_size 64]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.networks import FULL, TINY
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare


@benchmark
def context_curve(
    conditions: Conditions,
    context_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    spatial_size: int = 64,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
) -> Iterator[dict[str, Any]]:
    """Compare a forward pass at each L; contexts are in host memory, theirs is counted.

    Args:
        conditions: of the measurement.
        context_sizes: numbers of pairs.
        spatial_size: voxels per axis.
        mini_context_size: pairs that run at once.
        channels: network widths.
    """
    if conditions.quick:
        context_sizes, spatial_size, channels = (1, 2), 8, TINY
    for context_size in context_sizes:
        arguments = {
            "channels": channels,
            "spatial_size": spatial_size,
            "context_size": context_size,
            "mini_context_size": mini_context_size,
            "device": conditions.device,
            "warm_ups": int(context_size < 8),  # a long pass is its own warm-up
        }
        sides = {kind: Side("passes:forward_pass", {"kind": kind} | arguments) for kind in (BASELINE, "ours")}
        record = compare(sides, conditions, pairs=1)
        yield {"case": f"{spatial_size}^3 L={context_size}", "context_size": context_size} | record


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(context_curve)
