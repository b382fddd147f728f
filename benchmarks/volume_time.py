"""Seconds per 128³ volume on a GPU at several precisions, against the floor that its peak rates allow.

    python -m benchmarks.volume_time --device cuda [--context_sizes "[1,8,64]" --precisions "['float32','bfloat16']"]
        [--tflops_float32 67 --tflops_tf32 495 --tflops_bfloat16 990 --gigabytes_per_second 3350]

The floor is the greater of two times: the baseline's operations at the peak rate of the precision, and the bytes that
every convolution must at least read and write at the peak rate of memory. The default rates are those that NVIDIA
states for an H100 SXM, dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.networks import FULL, TINY
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare
from benchmarks.passes import forward_flops


@benchmark
def volume_time(
    conditions: Conditions,
    context_sizes: Sequence[int] = (1, 8, 64),
    precisions: Sequence[str] = ("float32", "tf32", "bfloat16"),
    spatial_size: int = 128,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
    tflops_float32: float = 67.0,
    tflops_tf32: float = 495.0,
    tflops_bfloat16: float = 990.0,
    gigabytes_per_second: float = 3350.0,
) -> Iterator[dict[str, Any]]:
    """Compare a forward pass at each L and precision.

    Args:
        conditions: of the measurement.
        context_sizes: numbers of pairs.
        precisions: of ``float32``, ``tf32`` and ``bfloat16``; on a processor there is no ``tf32``.
        spatial_size: voxels per axis.
        mini_context_size: pairs that run at once.
        channels: network widths.
        tflops_float32: peak rate of the device in TFLOP/s.
        tflops_tf32: the same with TensorFloat-32.
        tflops_bfloat16: the same in bfloat16.
        gigabytes_per_second: peak rate of the device's memory.
    """
    rates = {"float32": tflops_float32, "tf32": tflops_tf32, "bfloat16": tflops_bfloat16}
    if conditions.quick:
        context_sizes, precisions, spatial_size, channels = (1,), ("float32",), 8, TINY
    for context_size in context_sizes:
        work = forward_flops(channels, spatial_size, context_size)
        values = convolution_values(channels, spatial_size, context_size)
        for precision in precisions:
            arguments = {
                "channels": channels,
                "spatial_size": spatial_size,
                "context_size": context_size,
                "mini_context_size": mini_context_size,
                "device": conditions.device,
                "precision": precision,
            }
            sides = {kind: Side("passes:forward_pass", {"kind": kind} | arguments) for kind in (BASELINE, "ours")}
            record = compare(sides, conditions)
            size = 2 if precision == "bfloat16" else 4
            floor = max(work / rates[precision] / 1e12, values * size / gigabytes_per_second / 1e9)
            record |= {"floor_seconds": floor, "times_the_floor": record["sides"]["ours"]["seconds"] / floor}
            yield {"case": f"{spatial_size}^3 L={context_size}, {precision}"} | record


def convolution_values(channels: Sequence[int], spatial_size: int, context_size: int) -> int:
    """Numbers that the baseline's convolutions read (input, weight, bias) and write, each once."""
    grid = (spatial_size,) * 3
    with torch.device("meta"), torch.no_grad(), _ConvolutionValues() as counter:
        pairs = torch.empty(1, context_size, 1, *grid)
        BaselineNetwork(channels=channels, spatial_size=spatial_size)(torch.empty(1, 1, *grid), pairs, pairs)
    return counter.values


class _ConvolutionValues(TorchDispatchMode):
    """Adds up the sizes of what convolutions take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten.convolution.default:
            self.values += result.numel() + sum(x.numel() for x in args if isinstance(x, torch.Tensor))
        return result


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(volume_time)
