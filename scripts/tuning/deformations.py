"""Random affine maps and smooth fields, as coordinates to sample volumes at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch import Tensor


def random_affine(
    rng: np.random.Generator, turn: float, scale: float, shift: float, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (3, 3) about the middle of a volume, and a shift (3,), both in voxels.

    Args:
        rng: the draw.
        turn: largest rotation about each axis, degrees.
        scale: largest change of each axis's length, 0.1 for a tenth.
        shift: largest shift along each axis, as a part of its length.
        shape: (H, W, D).
    """
    turned = Rotation.from_euler("xyz", rng.uniform(-turn, turn, 3), degrees=True).as_matrix()
    return turned * (1 + rng.uniform(-scale, scale, 3)), rng.uniform(-shift, shift, 3) * np.array(shape)


def smooth_field(rng: np.random.Generator, amount: float, spacing: float, shape: Sequence[int]) -> Tensor:
    """Displacements (3, H, W, D): normal with a standard deviation of ``amount`` at control points, trilinear between.

    Args:
        rng: the draw.
        amount: in voxels.
        spacing: of the control points, in voxels.
        shape: (H, W, D).
    """
    points = [max(2, round(size / spacing) + 1) for size in shape]
    drawn = torch.from_numpy(rng.normal(0, amount, (1, 3, *points)).astype(np.float32))
    return F.interpolate(drawn, tuple(shape), mode="trilinear", align_corners=True)[0]


def warped(volumes: Tensor, matrices: np.ndarray, shifts: np.ndarray, fields: Tensor | None = None) -> Tensor:
    """Volumes (N, C, H, W, D) at ``matrix (voxel - middle) + middle + shift + field``, linearly; 0 outside.

    Args:
        volumes: what is sampled.
        matrices: (N, 3, 3).
        shifts: (N, 3) in voxels.
        fields: (N, 3, H, W, D) in voxels.
    """
    shape = volumes.shape[2:]
    half = torch.tensor(shape, dtype=torch.float32).flip(0) / 2  # grid_sample has the last axis first
    matrix = torch.from_numpy(np.ascontiguousarray(matrices[:, ::-1, ::-1])).float() * half / half[:, None]
    shift = torch.from_numpy(np.ascontiguousarray(shifts[:, ::-1])).float() / half
    theta = torch.cat((matrix, shift[..., None]), 2).to(volumes)
    grid = F.affine_grid(theta, [len(volumes), 1, *shape], align_corners=False)
    if fields is not None:
        grid = grid + (fields.flip(1).movedim(1, -1) / half).to(grid)
    return F.grid_sample(volumes, grid, align_corners=False)
