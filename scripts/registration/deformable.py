"""Deformable registration: symmetric demons on locally normalised images, all contexts at once, without autograd.

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
    target_slope = gradient(target)
    known = target != 0
    displacement = start
    for _ in range(iterations):
        moved = warp_features(level.contexts, maps, index + displacement)
        difference = (target - moved) * (known & (moved != 0))
        slope = (target_slope + gradient(moved)) / 2
        length = slope.square().sum(1, keepdim=True)
        update = difference * slope / (length + difference.square()).clamp(min=1e-3)
        update = separable.apply(update, smooth_update)
        longest = update.square().sum(1, keepdim=True).sqrt()
        update = update * (STEP_LIMIT / longest.clamp(min=STEP_LIMIT))
        displacement = separable.apply(compose(displacement, update, index), smooth_field)
    return displacement


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


def compose(displacement: Tensor, update: Tensor, index: Tensor) -> Tensor:
    """Displacement (K, 3, h, w, d) of ``x -> (x + update) -> + displacement there``, in voxels."""
    shape = displacement.shape[2:]
    size = torch.tensor(shape, dtype=index.dtype, device=index.device).view(1, 3, 1, 1, 1)
    coordinates = (2 * (index + update) + 1) / size - 1
    return update + sample(displacement, coordinates.flatten(2).transpose(1, 2).flip(-1), shape, padding="border")


def folded_share(displacement: Tensor) -> Tensor:
    """Share (K,) of voxels where ``x + displacement`` (K, 3, h, w, d), in voxels, turns space inside out."""
    columns = [torch.gradient(displacement, dim=axis)[0] for axis in (2, 3, 4)]
    jacobian = torch.stack(columns, 2).permute(0, 3, 4, 5, 1, 2) + torch.eye(3).to(displacement)
    return (torch.linalg.det(jacobian) <= 0).float().mean((1, 2, 3))
