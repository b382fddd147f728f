"""The network written plainly from its description: what every speed and memory ratio is measured against.

Concatenations, 1³ convolutions and up-sampling stand where Hu et al. (ICCV 2025, arXiv 2503.02410) draw them, in
PyTorch's own layers and its default layout. It knows none of the rewrites of :mod:`scripts.networks`, but has its
parameter names, so that the weights of one load strictly into the other and both compute the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class ResidualUnit(nn.Module):
    """conv 3³ - GELU - ... - conv 3³, add the input, GELU."""

    def __init__(self, channels: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=1) for _ in range(convs))
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W, D)`` -> the same shape."""
        y = x
        for index, conv in enumerate(self.convs):
            if index:
                y = self.gelu(y)
            y = conv(y)
        return self.gelu(x + y)


class Down(nn.Module):
    """Halve the grid: conv 4³ stride 2 padding 1, or max-pool 2³ where the two widths are equal."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = (
            nn.MaxPool3d(2)
            if in_channels == out_channels
            else nn.Conv3d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W, D)`` -> ``(N, K, H/2, W/2, D/2)``."""
        return self.conv(x)


class UpMerge(nn.Module):
    """Trilinear up-sampling by two, concatenation of the skip, 1³ conv."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.conv = nn.Conv3d(in_channels + out_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``x (N, C, h, w, d)`` and ``skip (N, K, 2h, 2w, 2d)`` -> ``(N, K, 2h, 2w, 2d)``."""
        return self.conv(torch.cat((self.up(x), skip), dim=1))


class Fusion(nn.Module):
    """1³ conv over ``[context, target]``, added to one of the two, GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2 * channels, channels, kernel_size=1)
        self.gelu = nn.GELU()

    def forward(self, context: Tensor, target: Tensor, added_to: Tensor) -> Tensor:
        """All ``(N, C, H, W, D)``; ``added_to`` is the context or the target."""
        return self.gelu(added_to + self.conv(torch.cat((context, target), dim=1)))


class TargetEncoder(nn.Module):
    """The target's map at every stage."""

    def __init__(self, in_channels: int, channels: Sequence[int], convs: int) -> None:
        super().__init__()
        self.embedding = nn.Conv3d(in_channels, channels[0], kernel_size=1)
        self.residuals = nn.ModuleList(ResidualUnit(c, convs) for c in channels[:-1])
        self.downs = nn.ModuleList(Down(a, b) for a, b in pairwise(channels))

    def forward(self, target: Tensor) -> list[Tensor]:
        """``(B, C, H, W, D)`` -> one map per stage, finest first."""
        x = self.embedding(target)
        maps = []
        for residual, down in zip(self.residuals, self.downs, strict=True):
            x = residual(x)
            maps.append(x)
            x = down(x)
        maps.append(x)
        return maps


class ContextUNet(nn.Module):
    """Context features of (image, label) pairs, each seen with the target."""

    def __init__(self, in_channels: int, channels: Sequence[int], convs: int) -> None:
        super().__init__()
        self.embedding = nn.Conv3d(in_channels, channels[0], kernel_size=1)
        self.residuals = nn.ModuleList(ResidualUnit(c, convs) for c in channels[:-1])
        self.fusions = nn.ModuleList(Fusion(c) for c in channels[:-1])
        self.downs = nn.ModuleList(Down(a, b) for a, b in pairwise(channels))
        self.bottleneck = ResidualUnit(channels[-1], convs)
        self.ups = nn.ModuleList(UpMerge(a, b) for a, b in pairwise(channels[::-1]))
        self.up_residuals = nn.ModuleList(ResidualUnit(c, convs) for c in channels[-2::-1])

    def forward(self, images: Tensor, labels: Tensor, target_maps: Sequence[Tensor]) -> list[Tensor]:
        """``(B, l, C, H, W, D)`` and the target's maps -> mean feature over the l pairs per stage, coarsest first."""
        batch, pairs = images.shape[:2]
        x = self.embedding(torch.cat((images, labels), dim=2).flatten(0, 1))
        skips = []
        for residual, fusion, target, down in zip(
            self.residuals, self.fusions, target_maps[:-1], self.downs, strict=True
        ):
            x = residual(x)
            repeated = target.unsqueeze(1).expand(-1, pairs, -1, -1, -1, -1).flatten(0, 1)
            x = fusion(x, repeated, added_to=x)
            skips.append(x)
            x = down(x)
        x = self.bottleneck(x)
        features = [x]
        for up, residual, skip in zip(self.ups, self.up_residuals, reversed(skips), strict=True):
            x = residual(up(x, skip))
            features.append(x)
        return [feature.unflatten(0, (batch, pairs)).mean(dim=1) for feature in features]


class TargetDecoder(nn.Module):
    """The prediction from the target's maps and the mean context features."""

    def __init__(self, out_channels: int, channels: Sequence[int], convs: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(ResidualUnit(c, convs) for c in channels[::-1])
        self.fusions = nn.ModuleList(Fusion(c) for c in channels[::-1])
        self.ups = nn.ModuleList(UpMerge(a, b) for a, b in pairwise(channels[::-1]))
        self.head = ResidualUnit(channels[0], convs)
        self.output = nn.Conv3d(channels[0], out_channels, kernel_size=1)

    def forward(self, target_maps: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Target maps (finest first) and context features (coarsest first) -> ``(B, K, H, W, D)``."""
        x = target_maps[-1]
        for stage, (residual, fusion, feature) in enumerate(zip(self.residuals, self.fusions, features, strict=True)):
            if stage:
                x = self.ups[stage - 1](x, target_maps[-1 - stage])
            x = residual(x)
            x = fusion(feature, x, added_to=x)
        return self.output(self.head(x))


class BaselineNetwork(nn.Module):
    """Plain Neuroverse3D; arguments and shapes as in :class:`scripts.networks.Neuroverse3D`."""

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        convs_per_block: int = 2,
        spatial_size: Sequence[int] = (128, 128, 128),
    ) -> None:
        super().__init__()
        self.target_encoder = TargetEncoder(in_channels, channels, convs_per_block)
        self.context_unet = ContextUNet(in_channels + out_channels, channels, convs_per_block)
        self.target_decoder = TargetDecoder(out_channels, channels, convs_per_block)
        self.register_buffer("grid", torch.tensor(spatial_size))  # travels with the weights, otherwise unused

    def forward(self, target_in: Tensor, context_in: Tensor, context_out: Tensor, mini_context_size: int = 3) -> Tensor:
        """Adaptive parallel-sequential context processing, mini-contexts in order.

        Args:
            target_in: ``(B, in_channels, H, W, D)``.
            context_in: ``(B, L, in_channels, H, W, D)``, any device.
            context_out: ``(B, L, out_channels, H, W, D)``, any device.
            mini_context_size: pairs that run at once; with gradients on, only the last ones record them.

        Returns:
            ``(B, out_channels, H, W, D)``.
        """
        length = context_in.shape[1]
        pieces = list(zip(context_in.split(mini_context_size, 1), context_out.split(mini_context_size, 1), strict=True))
        target_maps = self.target_encoder(target_in)
        with_grad = torch.is_grad_enabled()
        features: list[Tensor] = []
        for index, (images, labels) in enumerate(pieces):
            last = index == len(pieces) - 1
            with torch.set_grad_enabled(with_grad and last):
                images, labels = images.to(target_in), labels.to(target_in)
                means = self.context_unet(images, labels, target_maps)
                if with_grad and last and len(pieces) > 1:
                    for mean in means:
                        mean.register_hook(lambda gradient: gradient * len(pieces))
                share = images.shape[1] / length
                features = [
                    mean * share if not features else features[stage] + mean * share for stage, mean in enumerate(means)
                ]
        return self.target_decoder(target_maps, features)
