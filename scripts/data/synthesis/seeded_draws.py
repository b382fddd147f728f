"""Seeded random numbers and fields that synthetic cohorts are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor


class Draws:
    """One stream of random numbers: the same seed and key give the same stream, and no global state is touched.

    Single numbers and the few that decide on a field are drawn on the CPU, so that an anatomy is the same on every
    device up to rounding; only white noise of whole volumes comes from the device's own generator.

    Args:
        seed: not negative; or several numbers, such as (run, cohort).
        key: names an independent stream of the seed.
        device: where fields are made.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int | Sequence[int], *key: int, device: str | torch.device = "cpu") -> None:
        # SeedSequence keeps neighbouring seeds apart
        state = np.random.SeedSequence(seed, spawn_key=key).generate_state(2, np.uint64)
        self.device = torch.device(device)
        self.cpu = Generator().manual_seed(int(state[0]))
        self.own = Generator(self.device).manual_seed(int(state[1]))

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        """Uniform numbers of a shape, on the CPU."""
        return low + (high - low) * torch.rand(shape, generator=self.cpu)

    def number(self, low: float = 0.0, high: float = 1.0) -> float:
        """One uniform number."""
        return self.uniform(low, high).item()

    def log_number(self, low: float, high: float) -> float:
        """One number whose logarithm is uniform."""
        return math.exp(self.number(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """One whole number from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.cpu))

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return self.number() < probability

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, on the CPU."""
        return torch.randn(shape, generator=self.cpu)

    def order(self, count: int) -> list[int]:
        """The numbers below ``count`` in random order."""
        return torch.randperm(count, generator=self.cpu).tolist()

    def white_noise(self, *shape: int) -> Tensor:
        """Standard normal numbers, on the device."""
        return torch.randn(shape, generator=self.own, device=self.device)

    def smooth_noise(self, count: int, points: int, size: Sequence[int]) -> Tensor:
        """Fields (count, H, W, D) interpolated between ``points`` normal draws along each axis, on the device."""
        drawn = self.normal(1, count, points, points, points).to(self.device)
        return F.interpolate(drawn, size=tuple(size), mode="trilinear", align_corners=True)[0]

    def rotation(self, degrees: float) -> Tensor:
        """Rotation matrix (3, 3) from an angle of up to ``degrees`` either way about each axis."""
        angles = torch.deg2rad(self.uniform(-degrees, degrees, 3))
        matrix = torch.eye(3)
        for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
            turn = torch.eye(3)
            turn[i, i] = turn[j, j] = angle.cos()
            turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
            matrix = matrix @ turn
        return matrix


def coordinates(size: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Voxel centres (H, W, D, 3) in units of half the longest axis, 0 in the middle: the same unit along every axis."""
    axes = [(2 * torch.arange(n, device=device) + 1 - n) / max(size) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
