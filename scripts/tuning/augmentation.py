"""Changes of an aligned group: one large change in common, a small one of every member."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scripts.tuning.deformations import random_affine, smooth_field, warped

CONTROL_VOXELS = 10.0
"""Between control points of smooth fields."""


@dataclass(frozen=True)
class AlignedAugmentation:
    """How far the members of an aligned group are changed.

    The common change makes other anatomies of the group; the small own ones are what a registration leaves, so that
    the network has to look where borders are.

    Attributes:
        turn: rotation of the group about each axis, degrees at most.
        scale: change of the group's size along each axis, at most.
        shift: of the group, as a part of the size, at most.
        bend: standard deviation of the group's smooth field, voxels.
        own_turn: as ``turn``, of every context.
        own_scale: as ``scale``, of every context.
        own_shift: as ``shift``, of every context.
        own_bend: as ``bend``, of every context.
        flips: mirror the group along each axis, in half of the draws.
        gamma: largest exponent of intensities of the group, and its inverse the smallest; members by a fourth of it.
        noise: largest standard deviation of noise.
    """

    turn: float = 15.0
    scale: float = 0.15
    shift: float = 0.05
    bend: float = 1.0
    own_turn: float = 3.0
    own_scale: float = 0.03
    own_shift: float = 0.01
    own_bend: float = 0.5
    flips: bool = False
    gamma: float = 1.4
    noise: float = 0.04

    def __call__(self, images: Tensor, masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Change one group.

        Args:
            images: (N, 1, H, W, D) in [0, 1], the target first.
            masks: (N, C, H, W, D), 0 to 1.
            rng: decides everything.

        Returns:
            Both alike; the masks are not thresholded.
        """
        count, shape = len(images), images.shape[2:]
        matrix, shift = random_affine(rng, self.turn, self.scale, self.shift, shape)
        if self.flips:
            matrix = matrix * rng.choice((-1, 1), 3)
        common = smooth_field(rng, rng.uniform(0, self.bend), CONTROL_VOXELS, shape)
        matrices, shifts, fields = [matrix], [shift], [common]
        for _ in range(count - 1):
            own, moved = random_affine(rng, self.own_turn, self.own_scale, self.own_shift, shape)
            matrices.append(own @ matrix)
            shifts.append(shift + moved)
            fields.append(common + smooth_field(rng, rng.uniform(0, self.own_bend), CONTROL_VOXELS, shape))
        found = warped(torch.cat((images, masks), 1), np.stack(matrices), np.stack(shifts), torch.stack(fields))
        images, masks = found[:, :1], found[:, 1:]
        group = rng.uniform(-1, 1)
        exponents = self.gamma ** (group + 0.25 * rng.uniform(-1, 1, count))
        images = images.clamp(0, 1) ** torch.from_numpy(exponents).to(images).view(-1, 1, 1, 1, 1)
        noise = torch.from_numpy(rng.standard_normal(tuple(images.shape), np.float32))
        amounts = torch.from_numpy(rng.uniform(0, self.noise, count)).to(images).view(-1, 1, 1, 1, 1)
        return (images + amounts * noise).clamp(0, 1), masks
