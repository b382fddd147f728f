"""Neuroverse3D: a 3D in-context learning network (Hu et al., ICCV 2025, arXiv 2503.02410).

A target encoder, a context U-Net shared by all context pairs, and a target decoder (:mod:`scripts.networks.parts`),
composed by the adaptive parallel-sequential context processing (APSP), whose memory depends on the mini-context size
and not on the number of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scripts.networks.blocks import pairwise
from scripts.networks.execution import slabwise_for
from scripts.networks.parts import ContextUNet, Part, TargetDecoder, TargetEncoder


class Neuroverse3D(nn.Module):
    """The in-context network: a target, L (image, label) pairs in; the target's prediction out.

    Args:
        in_channels: channels of an image.
        out_channels: channels of a prediction (and of a context label).
        channels: width of each stage, finest first; at least two stages.
        convs_per_block: 3³ convolutions in a residual unit.
        spatial_size: the grid the weights are trained for (one int or three). It travels with the weights
            as the buffer ``grid``; the network itself runs on any grid divisible by :attr:`divisor`.
        activation_checkpointing: keep only the stages' inputs for the backward pass and recompute the rest (Chen et
            al. 2016, arXiv 1604.06174): the same gradients with less memory and about a third more time.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        convs_per_block: int = 2,
        spatial_size: int | Sequence[int] = 128,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 1 or convs_per_block < 1:
            raise ValueError(
                f"need at least two positive channel widths and one conv per block, got channels={tuple(channels)}, "
                f"convs_per_block={convs_per_block}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.channels = tuple(int(c) for c in channels)
        self.convs_per_block = convs_per_block
        self.target_encoder = TargetEncoder(in_channels, self.channels, convs_per_block)
        self.context_unet = ContextUNet(in_channels + out_channels, self.channels, convs_per_block)
        self.target_decoder = TargetDecoder(out_channels, self.channels, convs_per_block)
        for part in self.parts():
            part.activation_checkpointing = bool(activation_checkpointing)
        size = (spatial_size,) * 3 if isinstance(spatial_size, int) else tuple(spatial_size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"spatial_size must be one or three positive numbers of voxels, got {spatial_size}")
        if any(n % self.divisor for n in size):
            raise ValueError(
                f"spatial_size must be divisible by {self.divisor} for {len(self.channels)} stages, got {spatial_size}"
            )
        self.register_buffer("grid", torch.tensor(size, dtype=torch.int64))

    def parts(self) -> tuple[Part, Part, Part]:
        """Target encoder, context U-Net, target decoder."""
        return self.target_encoder, self.context_unet, self.target_decoder

    def compile_parts(self, **options: Any) -> None:
        """Compile the parts with ``torch.compile`` and its options, in place; names of parameters stay as they are.

        The loop over mini-contexts stays outside, for its length and its use of gradients vary.
        """
        for part in self.parts():
            part.compile(**options)

    @property
    def divisor(self) -> int:
        """Every spatial size must be divisible by this: 2 to the number of down-samplings."""
        return 2 ** (len(self.channels) - 1)

    def forward(self, target_in: Tensor, context_in: Tensor, context_out: Tensor, mini_context_size: int = 3) -> Tensor:
        """Predict the target's output from the context pairs.

        The L pairs are cut into n mini-contexts of at most ``mini_context_size`` pairs. The pairs of one
        mini-context run in parallel, the mini-contexts one after another into a running mean. While
        gradients are on, only the last mini-context records them, and its share is multiplied by n, which
        keeps the expected gradient while memory stays that of one mini-context. In training mode the order
        of the mini-contexts is drawn anew at every call (from PyTorch's global CPU generator).

        Args:
            target_in: ``(B, in_channels, H, W, D)``, usually in [0, 1].
            context_in: ``(B, L, in_channels, H, W, D)``; any device: it is moved piece by piece.
            context_out: ``(B, L, out_channels, H, W, D)``, likewise.
            mini_context_size: pairs that run at once, at least 1.

        Returns:
            ``(B, out_channels, H, W, D)``, linear; a mask is ``output > 0.5``.

        Raises:
            ValueError: a shape is not as above, L is 0, or a size is not divisible by :attr:`divisor`.
        """
        self._check(target_in, context_in, context_out, mini_context_size)
        # MONAI's MetaTensors do bookkeeping at every operation
        target_in, context_in, context_out = (x.as_subclass(Tensor) for x in (target_in, context_in, context_out))
        length = context_in.shape[1]
        order = list(torch.arange(length).split(mini_context_size))
        if self.training:
            order = [order[i] for i in torch.randperm(len(order))]
        target_maps = self.encode_target(target_in)
        features: list[Tensor] = []
        for index, numbers in enumerate(order):
            piece = slice(int(numbers[0]), int(numbers[-1]) + 1)
            pairs = torch.cat([x[:, piece].to(target_in, non_blocking=True) for x in (context_in, context_out)], 2)
            if torch.is_grad_enabled() and index == len(order) - 1:
                means = [_scale_gradient(mean, len(order)) for mean in self.context_unet(pairs, target_maps)]
                features = _weighted_sum(features, means, len(numbers) / length)
            else:
                features = self.read_contexts(features, pairs, target_maps, length)
        return self.decode(target_maps, features)

    def encode_target(self, target_in: Tensor) -> list[Tensor]:
        """``(B, in_channels, H, W, D)`` -> the target's map at every stage, finest first. No label has a part in it."""
        if chosen := slabwise_for(self.target_encoder, target_in):
            slabwise, part = chosen
            return slabwise.encode_target(part, target_in)
        return self.target_encoder(target_in)

    def encode_stems(self, pairs: Tensor) -> Tensor:
        """``(B, l, in_channels + out_channels, H, W, D)`` -> what of the pairs' encoding no target has a part in.

        Returns:
            ``(B, l, C_0, H, W, D)``, for :meth:`read_contexts`.
        """
        chosen, flat = slabwise_for(self.context_unet, pairs), pairs.flatten(0, 1)
        if chosen:
            slabwise, part = chosen
            return pairwise(slabwise.encode_stem(part, flat), pairs.shape[1])
        return pairwise(self.context_unet.stem(flat), pairs.shape[1])

    @torch.no_grad()
    def read_contexts(
        self,
        features: list[Tensor],
        pairs: Tensor,
        target_maps: Sequence[Tensor],
        length: int,
        from_stems: bool = False,
    ) -> list[Tensor]:
        """Take one mini-context into the running mean of the context features.

        Args:
            features: of the mini-contexts before it, none for the first; changed in place.
            pairs: ``(B, l, in_channels + out_channels, H, W, D)``, or their :meth:`encode_stems`.
            target_maps: from :meth:`encode_target`.
            length: L, the pairs of all mini-contexts.
            from_stems: ``pairs`` are encoded.

        Returns:
            One map per stage, bottleneck first.
        """
        if chosen := slabwise_for(self.context_unet, pairs):
            slabwise, part = chosen
            return slabwise.read_contexts(part, features, pairs, target_maps, length, from_stems)
        return _weighted_sum(features, self.context_unet(pairs, target_maps, from_stems), pairs.shape[1] / length)

    def decode(self, target_maps: list[Tensor], features: list[Tensor], keep_target: bool = False) -> Tensor:
        """Target maps and mean context features -> ``(B, out_channels, H, W, D)``.

        Without gradients both may be overwritten, the target maps unless ``keep_target``.
        """
        if chosen := slabwise_for(self.target_decoder, target_maps[0]):
            slabwise, part = chosen
            return slabwise.decode_target(part, target_maps, features, overwrite=not keep_target)
        return self.target_decoder(target_maps, features)

    def _check(self, target_in: Tensor, context_in: Tensor, context_out: Tensor, mini_context_size: int) -> None:
        # Shapes only: a look at values would wait for the device.
        spatial = tuple(target_in.shape[2:])
        if target_in.ndim != 5 or target_in.shape[1] != self.in_channels:
            raise ValueError(
                f"target_in must be (B, {self.in_channels}, H, W, D) with batch and channel axes, "
                f"got {tuple(target_in.shape)}"
            )
        for name, x, width in (
            ("context_in", context_in, self.in_channels),
            ("context_out", context_out, self.out_channels),
        ):
            if x.ndim != 6 or x.shape[0] != target_in.shape[0] or x.shape[2] != width or tuple(x.shape[3:]) != spatial:
                raise ValueError(
                    f"{name} must be (B, L, {width}, H, W, D) = ({target_in.shape[0]}, L, {width}, "
                    f"{', '.join(map(str, spatial))}) to go with the target, got {tuple(x.shape)}"
                )
        if context_in.shape[1] != context_out.shape[1]:
            raise ValueError(
                f"context_in and context_out must hold the same number of pairs, "
                f"got {context_in.shape[1]} and {context_out.shape[1]}"
            )
        if context_in.shape[1] == 0:
            raise ValueError("at least one context pair is needed (L >= 1), got L = 0")
        if any(n < self.divisor or n % self.divisor for n in spatial):
            raise ValueError(
                f"spatial sizes must be positive multiples of {self.divisor} for {len(self.channels)} stages, "
                f"got {spatial}"
            )
        if mini_context_size < 1:
            raise ValueError(f"mini_context_size must be at least 1, got {mini_context_size}")


class _GradientScale(torch.autograd.Function):
    """Identity forward, gradient times ``factor`` backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else _GradientScale.apply(x, factor)


def _weighted_sum(totals: list[Tensor], means: list[Tensor], share: float) -> list[Tensor]:
    if share == 1:
        return means
    # a sum of many small shares would lose digits in 16 bits
    shares = [mean.to(torch.promote_types(mean.dtype, torch.float32)) * share for mean in means]
    return [total + more for total, more in zip(totals, shares, strict=True)] if totals else shares
