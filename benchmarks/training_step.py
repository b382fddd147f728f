"""Training step: forward, backward and a step of Adam; time and peak memory of ours against the baseline.

    python -m benchmarks.training_step [--grids "[64,48]" --widths "[[32,64,128,256,512],[16,32,64,128]]"]

Ours is measured plainly, in bfloat16, and with `activation_checkpointing`, which keeps less and computes more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.networks import FULL, NARROW, SHIPPED_GRID, TINY, Grid, named
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare


@benchmark
def training_step(
    conditions: Conditions,
    grids: Sequence[Grid] = (64, 48, SHIPPED_GRID),
    widths: Sequence[Sequence[int]] = (FULL, NARROW, NARROW),
    context_size: int = 3,
    mini_context_size: int = 3,
) -> Iterator[dict[str, Any]]:
    """Compare a training step.

    Args:
        conditions: of the measurement.
        grids: voxels, one number or three for each case.
        widths: network widths, one list for each case.
        context_size: number of pairs.
        mini_context_size: pairs that run at once.
    """
    if conditions.quick:
        grids, widths = (8,), (TINY,)
    for grid, channels in zip(grids, widths, strict=True):
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
            "ours, checkpointing": {"kind": "ours", "activation_checkpointing": True},
        }
        record = compare(
            {name: Side("passes:training_step", arguments | own) for name, own in sides.items()}, conditions
        )
        yield {"case": f"{named(grid)} L={context_size}, channels {channels[0]} to {channels[-1]}"} | record


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(training_step)
