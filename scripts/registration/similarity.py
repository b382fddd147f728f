"""What is compared: images normalised by their surroundings, blind to contrast scale and bias; and how much they agree.

Two kinds of image: ``intensity`` compares the values themselves; ``edges`` compares lengths of gradients, which look
alike in scans of different contrast. 0 marks voxels where nothing is known: outside of the field of view, or constant
surroundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.registration import separable

FLOOR = 0.1
"""Local standard deviations below this share of the image's mean one are noise; they are not blown up."""
EDGES = "edges"
KINDS = ("intensity", EDGES)
VALUES = "values"
"""Of :func:`features`, beside :data:`KINDS`: the image itself."""


def locally_normalised(image: Tensor, inside: Tensor, window: float) -> Tensor:
    """Image less its local mean, over its local standard deviation.

    Args:
        image: (K, 1, H, W, D), of any scale.
        inside: (K, 1, H, W, D), 1 inside the field of view, 0 outside.
        window: width of the surroundings in voxels.
    """
    dims = (1, 2, 3, 4)
    count = inside.sum(dims, keepdim=True)
    image = (image - (image * inside).sum(dims, keepdim=True) / count) * inside
    image = image / (image.square().sum(dims, keepdim=True) / count).sqrt()
    sums = separable.apply(torch.stack((inside, image, image.square())), separable.box(image.shape[2:], window, image))
    weight = sums[0].clamp(min=1e-3)
    mean = sums[1] / weight
    variance = (sums[2] / weight - mean.square()).clamp(min=0)
    deviation = variance.sqrt()
    varies = (inside > 0.5) & (variance > 1e-6)
    usual = (deviation * varies).sum(dims, keepdim=True) / varies.sum(dims, keepdim=True).clamp(min=1)
    return torch.where(varies, (image - mean) / (variance + (FLOOR * usual).square()).sqrt(), 0.0)


def edge_length(image: Tensor) -> Tensor:
    """Length of the gradient, per voxel, of (K, 1, H, W, D)."""
    return gradient(image).square().sum(1, keepdim=True).sqrt()


def gradient(image: Tensor) -> Tensor:
    """Central differences (K, C * 3, H, W, D) per voxel of (K, C, H, W, D); 0 at the outer faces."""
    slopes = image.new_zeros(image.shape[0], image.shape[1], 3, *image.shape[2:])
    for axis in range(3):
        inner = image.shape[axis + 2] - 2
        if inner > 0:
            difference = image.narrow(axis + 2, 2, inner) - image.narrow(axis + 2, 0, inner)
            slopes[:, :, axis].narrow(axis + 2, 1, inner).copy_(difference.mul_(0.5))
    return slopes.flatten(1, 2)


def features(image: Tensor, inside: Tensor, kind: str, window: float) -> Tensor:
    """Locally normalised image of a kind, or the image itself, 0 outside of the field of view; (K, 1, H, W, D)."""
    if kind == VALUES:
        return image * (inside > 0.5)
    if kind == EDGES:
        image = edge_length(image)
    return locally_normalised(image, inside, window)


def correlation(target: Tensor, moved: Tensor) -> Tensor:
    """Correlation (K, C) of features (1, C, ...) and (K, C, ...) where both are known."""
    target, moved = target.flatten(2), moved.flatten(2)
    both = (target != 0) & (moved != 0)
    norms = (target.square() * both).sum(-1) * (moved.square() * both).sum(-1)
    return (target * moved).sum(-1) / norms.sqrt().clamp(min=1e-6)


def likeness(target: Tensor, moved: Tensor) -> Tensor:
    """Correlation (K,) of intensities (1, 1, ...) and (K, 1, ...) where neither is 0: high only in one contrast."""
    target, moved = target.flatten(1), moved.flatten(1)
    both = (target != 0) & (moved != 0)
    count = both.sum(1, keepdim=True).clamp(min=1)
    target, moved = ((v - (v * both).sum(1, keepdim=True) / count) * both for v in (target, moved))
    norms = target.square().sum(1) * moved.square().sum(1)
    return (target * moved).sum(1) / norms.sqrt().clamp(min=1e-12)


def local_correlation(target: Tensor, moved: Tensor, window: float) -> Tensor:
    """Correlation in windows around every voxel: (1, 1, H, W, D) and (K, 1, H, W, D) to (K, 1, H, W, D), -1 to 1.

    Voxels where the moved image is 0 count as they are; where nothing varies the correlation is 0.
    """
    matrices = separable.box(target.shape[2:], window, target)
    weight = separable.apply(torch.ones_like(target), matrices)

    def mean(volume: Tensor) -> Tensor:
        return separable.apply(volume, matrices) / weight

    target_mean, moved_mean = mean(target), mean(moved)
    target_variance = (mean(target.square()) - target_mean.square()).clamp(min=0)
    moved_variance = (mean(moved.square()) - moved_mean.square()).clamp(min=0)
    covariance = mean(target * moved) - target_mean * moved_mean
    return covariance / (target_variance * moved_variance + 1e-4).sqrt()
