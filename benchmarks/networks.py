"""What is measured: the baseline or ours, with the same weights, and random episodes to feed them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.paired import BASELINE
from scripts.networks import Neuroverse3D

FULL = (32, 64, 128, 256, 512)
"""Channels of the published network."""
NARROW = (16, 32, 64, 128)
"""Channels of a network that is worth training on a processor."""
SHIPPED_GRID = (40, 56, 40)
"""Voxels that the shipped weights, a narrow network, are meant for."""
TINY = (2, 4)
"""Channels for `--quick`."""

Grid = int | Sequence[int]
"""Voxels of a grid: one number for all axes, or three."""


def make_network(
    kind: str, channels: Sequence[int], spatial_size: Grid, device: str = "cpu", **options: bool
) -> nn.Module:
    """A network with weights that depend on the parameters' names alone, laid out as the workflows lay it out.

    Args:
        kind: ``baseline``, or anything else for ours.
        channels: width of each stage.
        spatial_size: voxels of the grid, along each axis if it is one number.
        device: where it goes.
        options: of ours.
    """
    if kind == BASELINE:
        network = BaselineNetwork(channels=channels, spatial_size=spatial_size).to(device)
    else:
        network = Neuroverse3D(channels=channels, spatial_size=spatial_size, **options)
        network = network.to(device, memory_format=torch.channels_last_3d)
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bound = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1  # keeps variance: every part is heard
        with torch.no_grad():
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return network


def voxels(spatial_size: Grid) -> tuple[int, ...]:
    """A grid's voxels along its three axes."""
    return (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)


def named(spatial_size: Grid) -> str:
    """A grid in a record's case: ``64^3``, ``40x56x40``."""
    return f"{spatial_size}^3" if isinstance(spatial_size, int) else "x".join(map(str, spatial_size))


def make_episode(spatial_size: Grid, context_size: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random target ``(1, 1, H, W, D)`` on the device; context images and masks ``(1, L, 1, H, W, D)`` on the host."""
    generator = torch.Generator().manual_seed(0)
    grid = voxels(spatial_size)
    target = torch.rand(1, 1, *grid, generator=generator)
    images = torch.rand(1, context_size, 1, *grid, generator=generator)
    masks = (torch.rand(1, context_size, 1, *grid, generator=generator) > 0.5).float()
    return target.to(device), images, masks


def probe(output: Tensor, count: int = 16) -> list[float]:
    """Values spread over an output, to see that two networks compute the same."""
    values = output.detach().float().flatten()
    return values[torch.linspace(0, values.numel() - 1, count).long()].tolist()
