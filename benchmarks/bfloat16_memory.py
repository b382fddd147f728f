"""Peak memory of our forward pass in bfloat16 against float32.

python -m benchmarks.bfloat16_memory [--spatial_size 128 --context_size 1]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.networks import FULL, TINY
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare


@benchmark
def bfloat16_memory(
    conditions: Conditions,
    spatial_size: int = 128,
    context_size: int = 1,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
) -> Iterator[dict[str, Any]]:
    """Compare the two precisions of our network; float32 is the baseline here.

    Args:
        conditions: of the measurement.
        spatial_size: voxels per axis.
        context_size: number of pairs.
        mini_context_size: pairs that run at once.
        channels: network widths.
    """
    if conditions.quick:
        spatial_size, channels = 8, TINY
    arguments = {
        "kind": "ours",
        "channels": channels,
        "spatial_size": spatial_size,
        "context_size": context_size,
        "mini_context_size": mini_context_size,
        "device": conditions.device,
        "warm_ups": 0,
    }
    sides = {
        name: Side("passes:forward_pass", arguments | {"precision": precision})
        for name, precision in ((BASELINE, "float32"), ("bfloat16", "bfloat16"))
    }
    yield {"case": f"{spatial_size}^3 L={context_size}, against our float32"} | compare(sides, conditions, pairs=1)


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(bfloat16_memory)
