"""Deformable registration: symmetric demons on locally normalised images, without autograd.

Thirion 1998 (forces from both images' gradients); Vercauteren et al. 2009 (updates composed, so that small smooth
steps add up to a map that does not fold).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.registration import separable
from scripts.registration.affine import Level
from scripts.registration.grids import sample
from scripts.registration.similarity import gradient

STEP_LIMIT = 0.5
"""Longest update of a voxel in one iteration, in voxels: with it a smooth update cannot fold."""


def demons(level: Level, affine: Tensor, start: Tensor, iterations: int, fluid: float, elastic: float) -> Tensor:
    """Refines displacements.

    Args:
        level: features.
        affine: (K, 4, 4) float64, world of the target to world of the context; applied after the displacement.
        start: (K, 3, h, w, d), displacement on the level's grid, in voxels along its axes.
        iterations: how many.
        fluid: sigma in voxels that smooths updates.
        elastic: sigma in voxels that smooths the displacement.
    """
    grid, target = level.grid, level.target
    maps = voxel_maps(level, affine).to(target)
    index = voxel_indices(grid.shape, target)
    smooth_update = separable.gaussian(grid.shape, fluid, target)
    smooth_field = separable.gaussian(grid.shape, elastic, target)
    half_slope = gradient(target) / 2
    known = target != 0
    found = torch.empty_like(start)
    for k in range(len(start)):  # one by one, so that a context's maps stay in the processor's cache
        context, place, displacement = level.contexts[k : k + 1], maps[k : k + 1], start[k : k + 1]
        for _ in range(iterations):
            moved = warp_features(context, place, index + displacement)
            difference = (target - moved).mul_(known & (moved != 0))
            slope = gradient(moved).mul_(0.5).add_(half_slope)
            strength = slope.square().sum(1, keepdim=True).addcmul_(difference, difference).clamp_(min=1e-3)
            update = separable.apply(slope.mul_(difference.div_(strength)), smooth_update)
            longest = update.square().sum(1, keepdim=True).sqrt_()
            update.mul_(STEP_LIMIT / longest.clamp_(min=STEP_LIMIT))
            displacement = separable.apply(compose(displacement, update), smooth_field)
        found[k] = displacement[0]
    return found


def voxel_indices(shape: tuple[int, int, int], like: Tensor) -> Tensor:
    """Voxel indices (1, 3, h, w, d)."""
    axes = [torch.arange(size, device=like.device, dtype=like.dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def voxel_maps(level: Level, affine: Tensor) -> Tensor:
    """(K, 3, 4), voxel indices of the target's grid to ``grid_sample`` coordinates of the contexts."""
    return (level.matrices @ affine @ level.grid.affine)[:, :3]


def warp_features(volumes: Tensor, maps: Tensor, position: Tensor) -> Tensor:
    """Volumes (K, C, ...) at positions (1 or K, 3, h, w, d) in target voxels."""
    flat = position.flatten(2)
    coordinates = torch.baddbmm(maps[..., 3:], maps[..., :3], flat.expand(len(maps), -1, -1))
    return sample(volumes, coordinates.transpose(1, 2), position.shape[2:])


def compose(displacement: Tensor, update: Tensor) -> Tensor:
    """Displacement (K, 3, h, w, d) of ``x -> (x + update) -> + displacement there``, in voxels.

    To first order in the update, which is short against the smoothness of the displacement: a warp costs more.
    """
    composed = displacement + update
    for axis in range(2, 5):
        inner = displacement.shape[axis] - 2
        if inner > 0:  # slopes are 0 at the outer faces, as in gradient()
            difference = displacement.narrow(axis, 2, inner) - displacement.narrow(axis, 0, inner)
            along = update[:, axis - 2 : axis - 1].narrow(axis, 1, inner)
            composed.narrow(axis, 1, inner).addcmul_(difference, along, value=0.5)
    return composed


def folded_share(displacement: Tensor) -> Tensor:
    """Share (K,) of voxels where ``x + displacement`` (K, 3, h, w, d), in voxels, turns space inside out."""
    slopes = gradient(displacement).unflatten(1, (3, 3))  # component, axis
    a, b, c = (slopes[:, i] for i in range(3))
    determinant = (1 + a[:, 0]) * ((1 + b[:, 1]) * (1 + c[:, 2]) - b[:, 2] * c[:, 1])
    determinant += a[:, 1] * (b[:, 2] * c[:, 0] - b[:, 0] * (1 + c[:, 2]))
    determinant += a[:, 2] * (b[:, 0] * c[:, 1] - (1 + b[:, 1]) * c[:, 0])
    return (determinant <= 0).float().mean((1, 2, 3))
