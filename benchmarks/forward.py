"""Forward pass: time and peak memory of ours against the baseline, and against the machine's matrix-product rate.

    python -m benchmarks.forward [--grids "[64,128,[40,56,40]]" --context_sizes "[3,1,3]" --mini_context_size 3]

Ours is measured in float32 and in bfloat16, both against the baseline in float32. The share of the matrix-product rate
counts the baseline's operations, so that an operation saved counts as speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.networks import FULL, NARROW, SHIPPED_GRID, TINY, Grid, named
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare
from benchmarks.passes import forward_flops


@benchmark
def forward(
    conditions: Conditions,
    grids: Sequence[Grid] = (64, 128, SHIPPED_GRID),
    context_sizes: Sequence[int] = (3, 1, 3),
    widths: Sequence[Sequence[int]] = (FULL, FULL, NARROW),
    mini_context_size: int = 3,
) -> Iterator[dict[str, Any]]:
    """Compare a forward pass.

    Args:
        conditions: of the measurement.
        grids: voxels, one number or three for each case.
        context_sizes: number of pairs, one for each case.
        widths: network widths, one list for each case.
        mini_context_size: pairs that run at once.
    """
    if conditions.quick:
        grids, context_sizes, widths = (8,), (2,), (TINY,)
    for grid, context_size, channels in zip(grids, context_sizes, widths, strict=True):
        arguments = {
            "channels": channels,
            "spatial_size": grid,
            "context_size": context_size,
            "mini_context_size": mini_context_size,
            "device": conditions.device,
        }
        sides = {
            BASELINE: {"kind": BASELINE},
            "ours": {"kind": "ours"},
            "ours, bfloat16": {"kind": "ours", "precision": "bfloat16"},
        }
        sides = {name: Side("passes:forward_pass", own | arguments) for name, own in sides.items()}
        rate = Side("paired:matrix_product", {"device": conditions.device, "size": 64 if conditions.quick else 2048})
        record = compare(sides | {"matrix product": rate}, conditions)
        record["ratios"].pop("matrix product")
        gflops = record["sides"]["matrix product"]["gflops"]
        work = forward_flops(channels, grid, context_size) / 1e9
        for kind in sides:
            record["sides"][kind]["share_of_matrix_product"] = work / record["sides"][kind]["seconds"] / gflops
        yield {"case": f"{named(grid)} L={context_size}"} | record


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(forward)
