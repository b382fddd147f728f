"""How alike two preprocessed scans look: normalised cross-correlation of thumbnails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.transforms import ResizeWithPadOrCrop
from torch import Tensor

THUMBNAIL_SIZE = 16
"""Voxels along each axis of the thumbnails by which contexts are chosen."""


def thumbnail(image: Tensor, spatial_size: Sequence[int], size: int = THUMBNAIL_SIZE) -> Tensor:
    """Means over blocks of a scan on the grid, in 256 steps.

    Args:
        image: ``(1, h, w, d)`` in [0, 1]; padded or cropped around its centre to the grid, as contexts are.
        spatial_size: the grid, three voxel counts.
        size: voxels along each axis, fewer if the grid has fewer.

    Returns:
        ``(size, size, size)`` uint8 in host memory.
    """
    on_grid = ResizeWithPadOrCrop(spatial_size)(torch.as_tensor(image).float())
    sizes = [min(size, voxels) for voxels in spatial_size]
    small = torch.nn.functional.adaptive_avg_pool3d(torch.as_tensor(on_grid)[None], sizes)[0, 0]
    return (small.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def correlation(thumbnails: Tensor, other: Tensor) -> Tensor:
    """Normalised cross-correlation (Pearson's r over voxels) of several thumbnails with one.

    Args:
        thumbnails: ``(N, h, w, d)``.
        other: ``(h, w, d)``.

    Returns:
        ``(N,)`` float32 in [-1, 1]; 0 for a constant thumbnail, which is like nothing.
    """
    first, second = thumbnails.flatten(1).float(), other.flatten().float()
    first, second = first - first.mean(1, keepdim=True), second - second.mean()
    norms = first.norm(dim=1) * second.norm()
    return torch.where(norms > 0, first @ second / norms.clamp(min=1e-12), 0.0)
