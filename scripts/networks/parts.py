"""The three parts of Neuroverse3D, named as in the paper: target encoder, context U-Net, target decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise as neighbours

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scripts.networks.blocks import Down, Fusion, ResidualUnit, UpMerge, mean_over_pairs
from scripts.networks.kernels import pointwise


class Part(nn.Module):
    """A part of the network whose stages may recompute their activations in the backward pass."""

    activation_checkpointing = False

    def stage(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Run one stage; with activation checkpointing only its inputs are kept for the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)


class TargetEncoder(Part):
    """Encodes the target image once; its skips feed the context U-Net and the target decoder."""

    def __init__(self, in_channels: int, channels: Sequence[int], convs_per_block: int) -> None:
        super().__init__()
        self.embedding = nn.Conv3d(in_channels, channels[0], 1)
        self.residuals = nn.ModuleList(ResidualUnit(c, convs_per_block) for c in channels[:-1])
        self.downs = nn.ModuleList(Down(a, b) for a, b in neighbours(channels))

    def forward(self, target: Tensor) -> list[Tensor]:
        """``(B, C, H, W, D)`` -> one map per stage, finest first; the last one enters the bottleneck."""
        x = pointwise(target, self.embedding.weight, self.embedding.bias)
        maps = []
        for residual, down in zip(self.residuals, self.downs, strict=True):
            x = self.stage(residual, x)
            maps.append(x)
            x = down(x)
        return [*maps, x]


class ContextUNet(Part):
    """Encodes (image, label) pairs, each seen together with the target."""

    def __init__(self, in_channels: int, channels: Sequence[int], convs_per_block: int) -> None:
        super().__init__()
        self.embedding = nn.Conv3d(in_channels, channels[0], 1)
        self.residuals = nn.ModuleList(ResidualUnit(c, convs_per_block) for c in channels[:-1])
        self.fusions = nn.ModuleList(Fusion(c) for c in channels[:-1])
        self.downs = nn.ModuleList(Down(a, b) for a, b in neighbours(channels))
        self.bottleneck = ResidualUnit(channels[-1], convs_per_block)
        self.ups = nn.ModuleList(UpMerge(a, b) for a, b in neighbours(channels[::-1]))
        self.up_residuals = nn.ModuleList(ResidualUnit(c, convs_per_block) for c in channels[-2::-1])

    def stem(self, pairs: Tensor) -> Tensor:
        """First residual unit of the embedded pairs ``(N, C, H, W, D)``: all that does not depend on the target."""
        return self.residuals[0](pointwise(pairs, self.embedding.weight, self.embedding.bias))

    def forward(self, pairs: Tensor, target_maps: Sequence[Tensor], from_stem: bool = False) -> list[Tensor]:
        """Mean context features of one mini-context.

        Args:
            pairs: ``(B, l, C, H, W, D)``: image and label channels; or their :meth:`stem`.
            target_maps: from the target encoder.
            from_stem: ``pairs`` is the stem.

        Returns:
            One map ``(B, C_s, H_s, W_s, D_s)`` per stage, bottleneck first, averaged over the l pairs.
        """
        count, x = pairs.shape[1], pairs.flatten(0, 1)
        skips = []
        for stage, (target, down) in enumerate(zip(target_maps[:-1], self.downs, strict=True)):
            if from_stem and not stage:
                x = self.fusions[0].into_context(x, target, count)
            else:
                x = self.stage(partial(self._encode, stage, count), x, target)
            skips.append(x)
            x = down(x)
        x = self.stage(self.bottleneck, x)
        features = [mean_over_pairs(x, count)]
        for up, residual in zip(self.ups, self.up_residuals, strict=True):
            x = self.stage(lambda x, skip, u=up, r=residual: r(u(x, skip)), x, skips.pop())
            features.append(mean_over_pairs(x, count))
        return features

    def _encode(self, stage: int, count: int, x: Tensor, target: Tensor) -> Tensor:
        x = self.residuals[stage](x) if stage else self.stem(x)
        return self.fusions[stage].into_context(x, target, count)


class TargetDecoder(Part):
    """Turns the target's maps into the output, reading the mean context feature at every stage."""

    def __init__(self, out_channels: int, channels: Sequence[int], convs_per_block: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(ResidualUnit(c, convs_per_block) for c in channels[::-1])
        self.fusions = nn.ModuleList(Fusion(c) for c in channels[::-1])
        self.ups = nn.ModuleList(UpMerge(a, b) for a, b in neighbours(channels[::-1]))
        self.head = ResidualUnit(channels[0], convs_per_block)
        self.output = nn.Conv3d(channels[0], out_channels, 1)

    def forward(self, target_maps: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        """Target maps (finest first) and mean context features (bottleneck first) -> ``(B, K, H, W, D)``."""
        *skips, x = target_maps
        for stage, (residual, fusion, feature) in enumerate(zip(self.residuals, self.fusions, features, strict=True)):
            if stage:
                x = self.stage(self.ups[stage - 1], x, skips.pop())
            x = self.stage(lambda x, feature, r=residual, f=fusion: f.into_target(r(x), feature), x, feature)
        return self.stage(lambda x: pointwise(self.head(x), self.output.weight, self.output.bias), x)
