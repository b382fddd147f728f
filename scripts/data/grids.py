"""Whether two volumes lie on one grid, by where its corners are, and volumes stored along other axes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

CORNER_TOLERANCE = 0.1
"""Two grids are the same if no corner of one is further from the other's, in edges of the smallest voxel."""


def corner_distance_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance between the corners of two grids.

    Args:
        affine: ``(4, 4)``, voxel to mm.
        other: of the other grid.
        shape: ``(H, W, D)`` of both.
    """
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((-0.5, size - 0.5) for size in shape))])
    apart = corners @ (np.asarray(affine, dtype=float) - np.asarray(other, dtype=float)).T
    return float(np.linalg.norm(apart[:, :3], axis=1).max())


def same_place(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put a grid in the same place: within a tenth of a voxel at its corners.

    Args:
        affine: ``(4, 4)``, voxel to mm.
        other: the same.
        shape: ``(H, W, D)``.
    """
    smallest_mm = min(nib.affines.voxel_sizes(np.asarray(a, dtype=float)).min() for a in (affine, other))
    return corner_distance_mm(affine, other, shape) <= CORNER_TOLERANCE * smallest_mm


def grid_difference(volume: MetaTensor, reference: MetaTensor) -> str | None:
    """How the grids of two volumes ``(1, H, W, D)`` differ, for a message; None if they are the same."""
    shape, wanted = tuple(volume.shape[1:]), tuple(reference.shape[1:])
    if shape != wanted:
        return f"in shape: {wanted} and {shape}"
    if same_place(volume.affine, reference.affine, shape):
        return None
    apart = corner_distance_mm(volume.affine, reference.affine, shape)
    return f"in affine: their corners lie up to {apart:.3g} mm apart"


def on_axes_of(volume: MetaTensor, reference: MetaTensor) -> MetaTensor:
    """A volume with its axes in the order and direction of another's, where that puts both on one grid.

    Nothing is resampled: axes are swapped and turned round, which loses nothing. Where it would not lead to the same
    grid, the volume itself is returned.

    Args:
        volume: ``(1, H, W, D)``.
        reference: ``(1, H, W, D)``.
    """
    shape = tuple(volume.shape[1:])
    affine, wanted = (np.asarray(v.affine, dtype=float) for v in (volume, reference))
    if shape == tuple(reference.shape[1:]) and same_place(affine, wanted, shape):
        return volume
    turn = io_orientation(np.linalg.inv(wanted) @ affine)
    if np.isnan(turn).any():
        return volume
    turned = np.ascontiguousarray(apply_orientation(volume[0].as_tensor().numpy(), turn))
    affine = affine @ inv_ornt_aff(turn, shape)
    if turned.shape != tuple(reference.shape[1:]) or not same_place(affine, wanted, turned.shape):
        return volume
    meta = {key: value for key, value in volume.meta.items() if key != "affine"}
    return MetaTensor(torch.from_numpy(turned)[None], affine=torch.as_tensor(affine), meta=meta)
