"""Evidence: an image of how much each voxel's intensity speaks for a structure, by what contexts show of it.

Atlases segment by the same two facts: where a structure lies, and how bright it is (Fischl et al. 2002, Neuron 33;
Puonti et al. 2016, NeuroImage 143). Aligned contexts tell where; the histograms of their intensities inside of the
structure and around it tell how bright. Seen through them, target and contexts have one contrast, in which the
structure is bright and its surroundings are dark.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from scripts.data.label_decision import MASK_THRESHOLD

BINS = 48
"""Of the histograms, over intensities from 0 to 1."""

SURROUNDINGS = 5
"""How far the surroundings of a structure reach, in voxels."""

_SMOOTHING = 1.5  # standard deviation in bins
_LEAST = 1e-4  # density where neither is seen


def evidence_table(images: Tensor, masks: Tensor) -> Tensor:
    """The part of each intensity that is inside of a structure, were inside and surroundings of one size.

    Args:
        images: ``(n, 1, H, W, D)`` in [0, 1], 0 where there is no scan.
        masks: the same shape, 0 to 1.

    Returns:
        ``(BINS,)`` from 0 to 1; 0.5 for intensities that are seen neither inside nor around.
    """
    inside = masks > MASK_THRESHOLD
    if not inside.any():
        return torch.full((BINS,), 0.5)
    first, last = generate_spatial_bounding_box(inside.any(0), margin=SURROUNDINGS, allow_smaller=True)
    near = (..., *(slice(low, high) for low, high in zip(first, last, strict=True)))
    inside, images = inside[near], images[near]
    around = _reached(inside) & ~inside & (images > 0)
    bins = (images.clamp(0, 1) * (BINS - 1)).round().long()
    found = torch.stack([bins[part].bincount(minlength=BINS) for part in (inside, around)]).float()
    kernel = gaussian_1d(torch.tensor(_SMOOTHING), truncated=4, normalize=True).to(found)
    wide = F.pad((found / found.sum(1, keepdim=True).clamp(min=1))[:, None], (len(kernel) // 2,) * 2, mode="replicate")
    density = F.conv1d(wide, kernel[None, None])[:, 0] + _LEAST
    return density[0] / density.sum(0)


def evidence(image: Tensor, table: Tensor) -> Tensor:
    """An image in [0, 1] of any shape, seen through :func:`evidence_table`: the same shape, 0 to 1."""
    table = table.to(image)
    place = image.clamp(0, 1) * (len(table) - 1)
    low = place.long()
    return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], place - low)


def _reached(inside: Tensor) -> Tensor:
    """Where a structure is no farther than its surroundings reach, along each axis."""
    reached = inside.float()
    for axis in range(3):
        width = [1, 1, 1]
        width[axis] = 2 * SURROUNDINGS + 1
        reached = F.max_pool3d(reached, width, 1, [n // 2 for n in width])
    return reached > 0
