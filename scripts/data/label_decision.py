"""Which label a voxel gets from the labels' scores: one rule for training, inference and self-test."""

from __future__ import annotations

import torch
from torch import Tensor

MASK_THRESHOLD = 0.5
"""A mask is where the (linear) score of a label on its own exceeds this."""

TOUCHING = 0.05
"""Scores up to this are noise: where a label has no more, it neither wins nor counts as a neighbour."""


def least_score(rival: Tensor, threshold: float = MASK_THRESHOLD) -> Tensor:
    """What a label's score has to exceed for a voxel not to be background.

    Between two labels that touch, both scores fall below the threshold, and a gap would open. So the rival's score
    counts as not being background, and the threshold is for the share of what is left. For exclusive labels this is
    nearly the highest of all shares, the background's included.

    Args:
        rival: highest score of the other labels, any shape; up to 0.05 it counts as none.
        threshold: of a label on its own.

    Returns:
        ``threshold * (1 - rival)``, of the same shape.
    """
    return threshold * (1 - torch.where(rival > TOUCHING, rival, 0))


def winning_label(scores: Tensor) -> Tensor:
    """Which label wins where, by the rule of ``Preprocessing.to_native_labels``.

    Args:
        scores: ``(K, h, w, d)``, one channel per label.

    Returns:
        ``(1, h, w, d)`` whole numbers: 0 for background, k + 1 for the label of channel k. At equal scores the first
        label wins.
    """
    best, channel = scores.max(dim=0, keepdim=True)
    rival = scores.topk(2, dim=0).values[1:] if len(scores) > 1 else torch.zeros_like(best)
    return torch.where(best > least_score(rival), channel + 1, 0)


def score_to_beat(scores: Tensor) -> Tensor:
    """What each label's score ``(K, ...)`` has to exceed to win: background, and every other label's score."""
    rival = torch.zeros_like(scores)
    if len(scores) > 1:
        best, second = scores.topk(2, dim=0).values
        rival = torch.where(scores == best, second, best)
    return torch.maximum(rival, least_score(rival))
