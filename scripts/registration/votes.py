"""Votes: how much every context counts at every voxel, by how well it agrees with the target there."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.registration.similarity import EDGES, edge_length, local_correlation

BETA = 4.0
WINDOW_VOXELS = 5.0


def vote_weights(
    target: Tensor,
    warped: Tensor,
    kind: str = "intensity",
    aligned: Tensor | None = None,
    beta: float = BETA,
    window: float = WINDOW_VOXELS,
) -> Tensor:
    """Softmax over the contexts of ``beta`` times the local correlation with the target.

    Args:
        target: image (1, H, W, D).
        warped: the contexts' images on the same grid (K, 1, H, W, D).
        kind: what is compared, :data:`~scripts.registration.similarity.KINDS`.
        aligned: (K,) bool, contexts that count; None for all.
        beta: 0 averages, large values take the best context alone.
        window: width of the surroundings in voxels.

    Returns:
        Weights (K, 1, H, W, D) that sum to 1 over the contexts, 0 for those that do not count.

    Raises:
        ValueError: no context counts.
    """
    target = target[None]
    if kind == EDGES:
        target, warped = edge_length(target), edge_length(warped)
    scores = beta * local_correlation(_standardised(target), _standardised(warped), window)
    if aligned is not None:
        if not bool(aligned.any()):
            raise ValueError("no context is aligned with the target, so none can vote")
        scores = scores.masked_fill(~aligned.to(scores.device).view(-1, 1, 1, 1, 1), -torch.inf)
    return scores.softmax(0)


def vote(weights: Tensor, labels: Tensor) -> Tensor:
    """Soft masks (L, H, W, D) from weights (K, 1, H, W, D) and the contexts' soft masks (K, L, H, W, D)."""
    return (weights * labels).sum(0)


def _standardised(image: Tensor) -> Tensor:
    """Zero mean and unit standard deviation of each image, so that variances compare; constant images stay 0."""
    image = image - image.mean((1, 2, 3, 4), keepdim=True)
    return image / image.square().mean((1, 2, 3, 4), keepdim=True).sqrt().clamp(min=1e-12)
