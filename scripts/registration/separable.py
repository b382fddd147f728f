"""Filters and resampling along the three axes: one small matrix for each axis, multiplied in turn.

On a CPU that is several times faster than pooling or convolving, windows may be fractions of a voxel, and the
borders need no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def apply(volume: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiplies the three last axes of a volume (..., H, W, D) by matrices (H', H), (W', W), (D', D)."""
    first, second, third = matrices
    volume = second @ (volume @ third.T)
    return (first @ volume.flatten(-2)).unflatten(-1, volume.shape[-2:])


def gaussian(shape: Sequence[int], sigma: float, like: Tensor) -> list[Tensor]:
    """Gaussian smoothing, sigma in voxels; weights are renormalised at the borders."""
    matrices = []
    for size in shape:
        position = torch.arange(size, dtype=torch.float64)
        distance = (position[:, None] - position).abs() / sigma
        weight = torch.exp(-0.5 * distance**2) * (distance < 4)  # no denormal numbers, which are very slow
        matrices.append((weight / weight.sum(1, keepdim=True)).to(like))
    return matrices


def box(shape: Sequence[int], window: float, like: Tensor) -> list[Tensor]:
    """Sums over windows of so many voxels, cut at the borders; a window may cover parts of voxels."""
    return [_overlap(size, size, window, 1.0, 1.0).to(like) for size in shape]


def resampling(old: Sequence[int], new: Sequence[int], ratio: Sequence[float], like: Tensor) -> list[Tensor]:
    """From ``old`` to ``new`` voxels that start at the same edge.

    New voxels of at least the old size take the mean of what they cover, smaller ones are interpolated linearly.
    What lies outside of the old volume counts as 0.

    Args:
        old: old shape.
        new: new shape.
        ratio: new voxel size over old, per axis.
        like: tensor that gives device and type.
    """
    matrices = []
    for old_size, new_size, step in zip(old, new, ratio, strict=True):
        if step >= 1:
            weight = _overlap(new_size, old_size, step, step, 1.0) / step
        else:
            centre = (torch.arange(new_size, dtype=torch.float64) + 0.5) * step - 0.5
            inside = (centre > -0.5) & (centre < old_size - 0.5)
            distance = centre.clamp(0, old_size - 1)[:, None] - torch.arange(old_size, dtype=torch.float64)
            weight = (1 - distance.abs()).clamp(min=0) * inside[:, None]
        matrices.append(weight.to(like))
    return matrices


def _overlap(rows: int, columns: int, width: float, row_step: float, column_step: float) -> Tensor:
    """How much of every window (width, around the centre of the row's cell) lies in every column's cell."""
    centre = (torch.arange(rows, dtype=torch.float64)[:, None] + 0.5) * row_step
    edge = torch.arange(columns, dtype=torch.float64) * column_step
    low, high = torch.maximum(centre - width / 2, edge), torch.minimum(centre + width / 2, edge + column_step)
    return (high - low).clamp(min=0)
