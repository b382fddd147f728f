"""Building blocks of Neuroverse3D (Hu et al., ICCV 2025, arXiv 2503.02410).

Feature maps are ``(N, C, H, W, D)``; N is the batch, or batch times context pairs. There is no
normalisation layer anywhere and every GELU is the exact (erf) one.

A 1³ convolution over a concatenation ``[a, b]`` equals the sum of one 1³ convolution on ``a`` and one on
``b``. The blocks that the paper draws with a concatenation (:class:`Fusion`, :class:`UpMerge`) use the sum:
the same parameters and the same function, but nothing is concatenated, and a part that is shared by all
pairs is computed once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.networks.kernels import conv3d, pointwise


def pairwise(x: Tensor, pairs: int) -> Tensor:
    """View ``(B * pairs, C, ...)`` as ``(B, pairs, C, ...)``."""
    return x.unflatten(0, (-1, pairs))


def mean_over_pairs(x: Tensor, pairs: int) -> Tensor:
    """Mean of ``(B * pairs, C, H, W, D)`` over the pairs, ``(B, C, H, W, D)``, at least in float32.

    Channels come last for as long as there is an axis of pairs: else results and gradients would lie otherwise in
    memory than all other maps, and what reads both would be ten times slower.
    """
    mean = pairwise(x.movedim(1, -1), pairs).mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean.movedim(-1, 1)


class ResidualUnit(nn.Module):
    """conv 3³ - GELU - ... - conv 3³, add the input, GELU."""

    def __init__(self, channels: int, convs: int = 2) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W, D)`` -> the same shape."""
        y = x
        for index, conv in enumerate(self.convs):
            y = conv3d(F.gelu(y) if index else y, conv.weight, conv.bias)
        return F.gelu(x + y)


class Down(nn.Module):
    """Halve the grid: conv 4³ stride 2 padding 1, or max-pool 2³ where the two widths are equal."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = None if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W, D)`` -> ``(N, K, H/2, W/2, D/2)``."""
        if self.conv is not None:
            return conv3d(x, self.conv.weight, self.conv.bias, stride=2)
        return F.max_pool3d(x, 2).to(x.dtype)  # autocast pools in float32


class UpMerge(nn.Module):
    """Trilinear up-sampling by two, then a 1³ conv over ``[up-sampled, skip]``.

    The 1³ conv commutes with the interpolation (its weights sum to one), so the up-sampled half is
    applied on the coarse grid, where it costs an eighth.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels + out_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``x (N, C, h, w, d)`` and ``skip (N, K, 2h, 2w, 2d)`` -> ``(N, K, 2h, 2w, 2d)``."""
        from_x, from_skip = self.conv.weight.split((x.shape[1], skip.shape[1]), dim=1)
        up = F.interpolate(pointwise(x, from_x), scale_factor=2, mode="trilinear", align_corners=False)
        return pointwise(skip, from_skip, self.conv.bias) + up


class Fusion(nn.Module):
    """Exchange between context and target: 1³ conv over ``[context, target]``, added to one of them, GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2 * channels, channels, 1)

    def from_context(self, context: Tensor) -> Tensor:
        """The context's half of the 1³ conv; the bias is on the target's side."""
        return pointwise(context, self.conv.weight.chunk(2, dim=1)[0])

    def from_target(self, target: Tensor) -> Tensor:
        """The target's half of the 1³ conv, bias included."""
        return pointwise(target, self.conv.weight.chunk(2, dim=1)[1], self.conv.bias)

    def into_context(self, context: Tensor, target: Tensor, pairs: int) -> Tensor:
        """Target-to-context fusion.

        Args:
            context: ``(B * pairs, C, H, W, D)``.
            target: ``(B, C, H, W, D)``; its half of the 1³ conv is the same for every pair and computed once.
            pairs: context pairs per batch element.

        Returns:
            ``(B * pairs, C, H, W, D)``.
        """
        fused = pairwise((context + self.from_context(context)).movedim(1, -1), pairs)
        of_target = self.from_target(target).movedim(1, -1)[:, None]  # channels last: see mean_over_pairs
        return F.gelu(fused + of_target).flatten(0, 1).movedim(-1, 1)

    def into_target(self, target: Tensor, context: Tensor) -> Tensor:
        """Context-to-target fusion of the mean context feature; both ``(B, C, H, W, D)``."""
        return F.gelu(target + self.from_context(context.to(target.dtype)) + self.from_target(target))
