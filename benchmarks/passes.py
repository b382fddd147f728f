"""The measurements of a network: one forward pass, one training step, and how much arithmetic they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.networks import Grid, make_episode, make_network, probe, voxels
from benchmarks.paired import timed
from scripts.losses import SmoothL3L1Loss

PRECISIONS = ("float32", "tf32", "bfloat16")
_BF16_TOLERANCE = 0.1


def forward_pass(
    kind: str,
    channels: Sequence[int],
    spatial_size: Grid,
    context_size: int,
    mini_context_size: int = 3,
    device: str = "cpu",
    precision: str = "float32",
    warm_ups: int = 1,
    repeats: int = 1,
) -> dict[str, Any]:
    """Predict one random episode without gradients.

    Args:
        kind: as :func:`benchmarks.networks.make_network`.
        channels: width of each stage.
        spatial_size: voxels, along each axis if it is one number.
        context_size: number of pairs.
        mini_context_size: pairs that run at once.
        device: where it runs.
        precision: ``float32``; ``tf32``: float32 with matrix products in TensorFloat-32 (CUDA only); ``bfloat16``
            autocast, as inference has it with ``--amp true``.
        warm_ups: passes before the timed ones.
        repeats: timed passes.

    Raises:
        ValueError: unknown precision.
    """
    autocast = _in_precision(precision, device)
    network = make_network(kind, channels, spatial_size, device).eval()
    episode = make_episode(spatial_size, context_size, device)
    with torch.no_grad(), autocast:
        seconds, output = timed(lambda: network(*episode, mini_context_size), device, warm_ups, repeats)
    return {"seconds": seconds, "check": probe(output)} | tolerance(precision)


def training_step(
    kind: str,
    channels: Sequence[int],
    spatial_size: Grid,
    context_size: int,
    mini_context_size: int = 3,
    device: str = "cpu",
    precision: str = "float32",
    warm_ups: int = 1,
    repeats: int = 1,
    **options: bool,
) -> dict[str, Any]:
    """Forward pass, backward pass and a step of Adam on one random episode; arguments as :func:`forward_pass`.

    Args:
        kind: as :func:`benchmarks.networks.make_network`.
        channels: width of each stage.
        spatial_size: voxels, along each axis if it is one number.
        context_size: number of pairs.
        mini_context_size: pairs that run at once.
        device: where it runs.
        precision: as :func:`forward_pass`.
        warm_ups: steps before the timed ones.
        repeats: timed steps.
        options: of our network, such as ``activation_checkpointing``.
    """
    autocast = _in_precision(precision, device)
    network = make_network(kind, channels, spatial_size, device, **options).train()
    episode = make_episode(spatial_size, context_size, device)
    loss_function, optimizer = SmoothL3L1Loss(), torch.optim.Adam(network.parameters(), 1e-5)
    wanted = (episode[0] > 0.5).float()

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast:
            predicted = network(*episode, mini_context_size).float()
        loss = loss_function(predicted, wanted)
        loss.backward()
        optimizer.step()
        return loss

    seconds, loss = timed(step, device, warm_ups, repeats)
    # after one step: gradients have had their say
    return {"seconds": seconds, "check": [loss.item()]} | tolerance(precision)


def _in_precision(precision: str, device: str) -> torch.autocast:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bfloat16")


def tolerance(precision: str) -> dict[str, float]:
    """How far a check in this precision may be from float32, as :func:`benchmarks.paired.compare` reads it."""
    return {} if precision == "float32" else {"tolerance": _BF16_TOLERANCE}


def forward_flops(channels: Sequence[int], spatial_size: Grid, context_size: int) -> int:
    """Floating-point operations of the baseline's forward pass: two for each multiplication with its addition."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        grid = voxels(spatial_size)
        pairs = torch.empty(1, context_size, 1, *grid)
        BaselineNetwork(channels=channels, spatial_size=spatial_size)(torch.empty(1, 1, *grid), pairs, pairs)
    return counter.get_total_flops()
