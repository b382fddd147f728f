"""Training loss of Neuroverse3D (Hu et al., ICCV 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmoothL3L1Loss(nn.Module):
    """Mean of f(|pred - target|), cubic near zero and linear beyond beta.

    f(e) = 0.333 e^3 / beta^2 for e < beta, else e + 0.333 beta^3 - beta (the constants of the published
    recipe, which with beta = 1 join at e = 1 in value and nearly in slope). ``weight`` multiplies the mean;
    the published training uses 50.

    Args:
        beta: border between the cubic and the linear part, > 0.
        weight: factor on the mean.
    """

    def __init__(self, beta: float = 1.0, weight: float = 1.0) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        self.beta = float(beta)
        self.weight = float(weight)

    def forward(self, pred: Tensor, target: Tensor, group_weight: Tensor | None = None) -> Tensor:
        """Two tensors ``(B, ...)`` of one shape -> a scalar in the inputs' units of error.

        ``group_weight`` ``(B,)`` multiplies the error of each batch element.
        """
        if pred.shape != target.shape:
            raise ValueError(f"prediction and target differ in shape: {tuple(pred.shape)} and {tuple(target.shape)}")
        error = (pred - target).abs()
        cubic = 0.333 * error**3 / self.beta**2
        linear = error + 0.333 * self.beta**3 - self.beta
        value = torch.where(error < self.beta, cubic, linear)
        if group_weight is not None:
            value = value.flatten(1).mean(1) * group_weight
        return self.weight * value.mean()
