"""Global intensity non-linear augmentation (GIN): another, random contrast for a group of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.transforms import ScaleIntensity
from torch import Tensor


class GlobalIntensityNonlinear:
    """Shows images through a shallow convolutional network with random weights.

    After Ouyang et al., Causality-inspired Single-source Domain Generalization for Medical Image Segmentation (IEEE
    TMI 2022, arXiv 2111.12525). Weights and biases are standard normal, kernels 1³ or 3³ (drawn per layer), with a
    leaky ReLU between layers. The result is ``alpha * network(x) + (1 - alpha) * x``, brought to the Frobenius
    norm of x: alpha weighs the network's output, as in their code. They draw it from [0, 1], the recipe of Neuroverse3D
    (Hu et al., ICCV 2025) from [0.7, 1], so that most of the result is the new contrast.

    Nothing is learnt and nothing kept between calls: a seed is a network.

    Args:
        layers: number of convolutions.
        channels: between them.
        kernel_sizes: drawn from for each layer; odd.
        alpha: range of the network's share.
        unit_range: scale each result to [0, 1] at the end, the range of all images that the network gets in use.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        layers: int = 4,
        channels: int = 10,
        kernel_sizes: Sequence[int] = (1, 3),
        alpha: tuple[float, float] = (0.7, 1.0),
        unit_range: bool = True,
    ) -> None:
        if layers < 1 or channels < 1:
            raise ValueError(f"layers and channels must be at least 1, got {layers} and {channels}")
        if not kernel_sizes or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd numbers, got {kernel_sizes!r}")
        if len(alpha) != 2 or not 0 <= alpha[0] <= alpha[1] <= 1:
            raise ValueError(f"alpha must be a range (low, high) within [0, 1], got {alpha!r}")
        self.widths = (1, *[channels] * (layers - 1), 1)
        self.kernel_sizes = tuple(kernel_sizes)
        self.alpha = tuple(alpha)
        self.unit_range = bool(unit_range)

    @torch.no_grad()
    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """One network for all images, which pass it one at a time: memory is that of a single one.

        Args:
            images: ``(N, 1, H, W, D)``, floating point.
            seed: from 0 to 2⁶⁴ - 1; decides the network, on any device.

        Returns:
            Of the same shape, device and type, in [0, 1]; without ``unit_range`` each image has its own Frobenius norm
            as before, and values of any sign.

        Raises:
            ValueError: images of another shape or type, or a negative seed.
        """
        if images.ndim != 5 or images.shape[1] != 1 or not images.is_floating_point():
            raise ValueError(
                f"images must be (N, 1, H, W, D) of floating point, got {tuple(images.shape)} of {images.dtype}"
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}: a group of seed -1 gets no GIN")
        network, alpha = self._draw(seed, images.device)
        shown = torch.cat([_show(image, network, alpha) for image in images.split(1)])
        return torch.cat([ScaleIntensity(0.0, 1.0)(image) for image in shown.split(1)]) if self.unit_range else shown

    def _draw(self, seed: int, device: torch.device) -> tuple[list[tuple[Tensor, Tensor]], float]:
        """Weights and biases of each layer, and alpha; drawn on the CPU, whose numbers no device changes."""
        generator = torch.Generator().manual_seed(seed)
        network = []
        for narrow, wide in pairwise(self.widths):
            size = self.kernel_sizes[int(torch.randint(len(self.kernel_sizes), (), generator=generator))]
            weight = torch.randn((wide, narrow, size, size, size), generator=generator)
            network.append((weight.to(device), torch.randn(wide, generator=generator).to(device)))
        low, high = self.alpha
        return network, low + (high - low) * torch.rand((), generator=generator).item()


def _show(image: Tensor, network: list[tuple[Tensor, Tensor]], alpha: float) -> Tensor:
    source = image.float()  # half precision would overflow in the sums over channels and voxels
    seen = source
    for number, (weight, bias) in enumerate(network):
        seen = F.conv3d(F.leaky_relu(seen, inplace=True) if number else seen, weight, bias, padding="same")
    seen.mul_(alpha).add_(source, alpha=1 - alpha)
    seen.mul_(source.norm() / seen.norm().clamp_min(torch.finfo(seen.dtype).tiny))
    return seen.to(image.dtype)
