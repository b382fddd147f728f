"""Training losses: that of Neuroverse3D (Hu et al., ICCV 2025), and one for small networks that builds on it."""

from __future__ import annotations

from functools import partial

import torch
from monai.losses import DiceLoss
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


class MaskImageLoss(SmoothL3L1Loss):
    """:class:`SmoothL3L1Loss`, plus soft Dice where the target is a mask and mean absolute error where it is an image.

    The cubic loss alone scores each voxel: a small or uncertain structure is best left out of the mask altogether,
    its values staying below the threshold. Dice (MONAI's ``DiceLoss``) scores the overlap, so a mask of about
    the right size in about the right place is better than none. And it hardly cares about the small errors that
    images are made of, down to which the absolute error goes on pulling. A mask is what has no values but 0 and 1.

    Args:
        beta: border between the cubic and the linear part, > 0.
        weight: factor on the mean of the first part.
        dice_weight: factor on the Dice loss of masks, which is within [0, 1].
        image_weight: factor on the mean absolute error of images.
    """

    def __init__(
        self, beta: float = 1.0, weight: float = 1.0, dice_weight: float = 1.0, image_weight: float = 1.0
    ) -> None:
        super().__init__(beta, weight)
        self.dice_weight, self.image_weight = float(dice_weight), float(image_weight)
        # outputs are linear; smoothing of one voxel, so that an empty mask wants an empty prediction
        self.dice = DiceLoss(
            other_act=partial(torch.clamp, min=0.0, max=1.0), reduction="none", smooth_nr=1.0, smooth_dr=1.0
        )

    def forward(self, pred: Tensor, target: Tensor, group_weight: Tensor | None = None) -> Tensor:
        """Two tensors ``(B, K, H, W, D)`` of one shape, targets within [0, 1] -> a scalar.

        Dice is taken of each element and channel. ``group_weight`` ``(B,)`` multiplies all of a batch element.
        """
        error = super().forward(pred, target, group_weight)
        dice = self.dice_weight * self.dice(pred, target).flatten(1).mean(1)
        absolute = self.image_weight * (pred - target).abs().flatten(1).mean(1)
        is_mask = ((target == 0) | (target == 1)).flatten(1).all(1)
        value = torch.where(is_mask, dice, absolute)
        return error + (value if group_weight is None else value * group_weight).mean()
