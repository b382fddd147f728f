"""Volumes on working grids: voxels of one size along the axes nearest to right, anterior and superior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from scripts.registration import separable

AFFINE_DECIMALS = 6
"""Affines are rounded to 1e-6 mm, so that the same voxels stored in another order have the same affine."""


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: shape (H, W, D) and a 4x4 float64 affine from voxel indices to world (RAS, mm)."""

    shape: tuple[int, int, int]
    affine: Tensor

    @property
    def centre(self) -> Tensor:
        """World coordinates (3,) of the middle of the field of view."""
        middle = torch.tensor([(size - 1) / 2 for size in self.shape] + [1.0], dtype=torch.float64)
        return (self.affine @ middle)[:3]

    @property
    def spacing(self) -> Tensor:
        """Voxel size (3,) in mm."""
        return self.affine[:3, :3].norm(dim=0)

    @property
    def extent(self) -> Tensor:
        """Field of view (3,) in mm, along the grid's own axes."""
        return self.spacing * torch.tensor(self.shape, dtype=torch.float64)

    def sampling_matrix(self) -> Tensor:
        """4x4 from world to the coordinates of ``grid_sample``: last axis first, -1 and 1 at the outer edges."""
        size = torch.tensor(self.shape, dtype=torch.float64)
        normal = torch.eye(4, dtype=torch.float64)
        normal[:3, :3] = torch.diag(2 / size)
        normal[:3, 3] = 1 / size - 1
        return (normal @ torch.linalg.inv(self.affine))[[2, 1, 0, 3]]

    def points(self, like: Tensor) -> Tensor:
        """World coordinates (H * W * D, 3) of the voxel centres, relative to the grid's centre (float32 holds them)."""
        axes = [torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in self.shape]
        index = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return (index @ self.affine[:3, :3].T).to(like)

    def with_spacing(self, spacing_mm: float, shape: Sequence[int] | None = None) -> Grid:
        """Isotropic voxels from the same outer edge on; ``shape`` if given, otherwise what covers this grid."""
        ratio = spacing_mm / self.spacing
        if shape is None:
            shape = [max(1, ceil(size / step - 1e-3)) for size, step in zip(self.shape, ratio.tolist(), strict=True)]
        affine = self.affine.clone()
        affine[:3, :3] *= ratio
        affine[:3, 3] += self.affine[:3, :3] @ (ratio / 2 - 0.5)
        return Grid(tuple(shape), affine)


def grid_of(volume: MetaTensor) -> Grid:
    """Where the voxels of a volume lie, in the order nearest to RAS; no voxel is touched."""
    return _ordered(volume)[1]


def oriented(volume: MetaTensor) -> tuple[Tensor, Grid]:
    """Voxels (C, H, W, D), of their own type, in the order nearest to RAS, and where they lie."""
    orientation, grid = _ordered(volume)
    data = volume.as_tensor()
    flips = [axis + 1 for axis in range(3) if orientation[axis, 1] < 0]
    data = data.flip(flips) if flips else data
    return data.permute(0, *(int(axis) + 1 for axis in np.argsort(orientation[:, 0]))), grid


def _ordered(volume: MetaTensor) -> tuple[np.ndarray, Grid]:
    """Nibabel's orientation (3, 2) of a volume, and its grid in the order nearest to RAS."""
    affine = np.asarray(volume.affine.detach().cpu(), dtype=np.float64)
    orientation, shape = nib.io_orientation(affine), volume.shape[1:]
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    shape = tuple(shape[int(axis)] for axis in np.argsort(orientation[:, 0]))
    return orientation, Grid(shape, torch.from_numpy(affine.round(AFFINE_DECIMALS)))


def canonical(volume: MetaTensor) -> tuple[Tensor, Grid]:
    """As :func:`oriented`, float32 and contiguous; nothing is interpolated."""
    data, grid = oriented(volume)
    return data.contiguous().float(), grid


def resample(data: Tensor, old: Grid, new: Grid) -> Tensor:
    """Data (..., H, W, D) of a grid on another one of the same axes and edge; 0 outside."""
    ratio = (new.spacing / old.spacing).tolist()
    return separable.apply(data, separable.resampling(old.shape, new.shape, ratio, data))


def sample(data: Tensor, coordinates: Tensor, shape: Sequence[int], padding: str = "zeros") -> Tensor:
    """Linear interpolation of (K, C, H, W, D) at (K, N, 3) coordinates of ``grid_sample``: (K, C, *shape)."""
    grid = coordinates.unflatten(1, tuple(shape))
    return F.grid_sample(data, grid, mode="bilinear", padding_mode=padding, align_corners=False)
