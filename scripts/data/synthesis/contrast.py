"""Images of tissue maps: any contrast, and what scanners do to it.

Contrast is domain-randomised as in SynthSeg (Billot et al. 2023, Medical Image Analysis 86): mean and spread per
tissue, bias field, blur, anisotropic resolution, noise and gamma; here also ghosting, and tissues that look alike. It
is nearly the same for all subjects of a cohort, and another one in every cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from torch import Tensor

from scripts.data.preprocessing import PERCENTILES
from scripts.data.synthesis.anatomy import AIR, Anatomy
from scripts.data.synthesis.seeded_draws import Draws

MIN_CONTRAST = 0.12
"""What the mean of a structure is kept away from those of other tissues, where there is room for it."""

_SUBJECT_MEAN = 0.03  # how far a subject's means may lie from the cohort's, either way
_ALIKE_SPREAD = 0.04  # standard deviation of means within a group of tissues that look alike
_GROUPED_PROB = 0.5
_KINDS_PROB = 0.6  # where tissue kinds are known: groups are the kinds
_REAL_PROB = 0.4  # where the means in T1-weighted scans are known
_T1_PROB = 0.6  # of these: T1; the others are T2-like or FLAIR-like, T1 turned round, and fluid bright or dark
_REAL_SPREAD = 0.06  # standard deviation of a tissue's mean over scanners, in SynthSeg's priors
_COARSE_PROB, _GHOST_PROB = 0.3, 0.08


@dataclass(frozen=True)
class Contrast:
    """What the images of a cohort have in common.

    Attributes:
        means: (T,) of the tissues, within [0, 1].
        spreads: (T,) standard deviations of the tissues' texture.
        coarseness: share of the texture that is smooth.
        blur: (3,) standard deviations in voxels.
        noise: standard deviation.
        bias: standard deviation of the logarithm of the bias field.
        gamma: exponent.
        coarse: axis and factor of a loss of resolution; factor 1 for none.
        ghost: axis, shift in voxels and strength of a ghost; strength 0 for none.
    """

    means: Tensor
    spreads: Tensor
    coarseness: float
    blur: Tensor
    noise: float
    bias: float
    gamma: float
    coarse: tuple[int, float]
    ghost: tuple[int, int, float]


def draw_contrast(draws: Draws, anatomy: Anatomy, size: Sequence[int], tissues: int) -> Contrast:
    """Draw the contrast of a cohort; ``tissues`` counts those of the anatomy and what was added to it."""
    means = _draw_means(draws, anatomy, tissues)
    spreads = draws.uniform(0, 0.06, tissues)
    if draws.chance(0.8):
        means[AIR], spreads[AIR] = draws.number(0, 0.05), 0.2 * spreads[AIR]  # air is dark in most modalities
    axis = draws.integer(0, 2)
    coarse = draws.number(1.5, 4.0) if draws.chance(_COARSE_PROB) else 1.0
    ghost = draws.number(0.03, 0.15) if draws.chance(_GHOST_PROB) else 0.0
    return Contrast(
        means=means,
        spreads=spreads,
        coarseness=draws.number(),
        blur=draws.uniform(0.0, 0.8, 3),
        noise=draws.log_number(0.005, 0.08),
        bias=draws.number(0.0, 0.15),
        gamma=draws.log_number(0.75, 1.33),
        coarse=(axis, coarse),
        ghost=(draws.integer(0, 2), draws.integer(3, max(3, min(size) // 2)), ghost),
    )


def _draw_means(draws: Draws, anatomy: Anatomy, tissues: int) -> Tensor:
    kinds = dict(anatomy.kinds)
    means = draws.uniform(0, 1, tissues)
    real = anatomy.t1_means and draws.chance(_REAL_PROB)
    grouped = not real and draws.chance(_GROUPED_PROB)
    if real:
        _set_real_means(draws, anatomy, means)
    elif grouped and kinds and draws.chance(_KINDS_PROB):
        names = sorted(set(kinds.values()))
        levels = _levels(draws, len(names))
        for tissue, kind in kinds.items():
            means[tissue] = levels[names.index(kind)]
        means += _ALIKE_SPREAD * draws.number() * draws.normal(tissues)
    elif grouped and kinds:
        groups = draws.integer(3, 6)
        levels = _levels(draws, groups)
        means = levels[(draws.uniform(0, groups, tissues)).long().clamp(max=groups - 1)]
        means = means + _ALIKE_SPREAD * draws.number() * draws.normal(tissues)
    elif not kinds:  # nothing but its look tells a structure of a procedural anatomy from its surroundings
        structures = {tissue for label in anatomy.labels for tissue in label}
        others = [t for t in range(tissues) if t not in structures]
        for tissue in sorted(structures):
            candidates = draws.uniform(0, 1, 6)
            gaps = (candidates[:, None] - means[others]).abs().amin(1)
            wide = (gaps >= MIN_CONTRAST).nonzero().flatten()
            means[tissue] = candidates[wide[0] if len(wide) else gaps.argmax()]
    for part, whole in anatomy.alike:
        means[part] = means[whole]
    return means.clamp(0, 1)


def _set_real_means(draws: Draws, anatomy: Anatomy, means: Tensor) -> None:
    """Means as T1-weighted scans have them, or roughly as T2-weighted ones or FLAIR."""
    tissues, t1 = zip(*anatomy.t1_means, strict=True)
    found, where = torch.tensor(t1), torch.tensor(tissues)
    if not draws.chance(_T1_PROB):
        fluid = torch.tensor([dict(anatomy.kinds).get(tissue) == "fluid" for tissue in tissues])
        found = torch.where(fluid, draws.number(0.85, 1.0) if draws.chance(0.5) else 0.1, 0.9 - found)
    means[where] = found + _REAL_SPREAD * draws.normal(len(where))


def _levels(draws: Draws, count: int) -> Tensor:
    """Means (count,) that keep apart, in random order."""
    return (torch.tensor(draws.order(count)) + draws.uniform(0.1, 0.9, count)) / count


def draw_image(draws: Draws, seen: Tensor, inside: Tensor, contrast: Contrast, supersampling: int) -> Tensor:
    """Image of one subject.

    Args:
        draws: of the subject.
        seen: tissue numbers (sH, sW, sD).
        inside: where there is a scan at all, (sH, sW, sD) bool.
        contrast: the cohort's.
        supersampling: s, points per voxel along each axis; a voxel is the mean of its points (partial volume).

    Returns:
        (H, W, D) float32 in [0, 1], clipped to the percentiles of the preprocessing, 0 where there is no scan.
    """
    device, s = seen.device, supersampling
    means = contrast.means + draws.uniform(-_SUBJECT_MEAN, _SUBJECT_MEAN, len(contrast.means))
    image = means.to(device)[seen.int()]
    if s > 1:
        image, seen, inside = F.avg_pool3d(image[None], s)[0], seen[::s, ::s, ::s], inside[::s, ::s, ::s]
    size = tuple(image.shape)
    texture = torch.lerp(
        draws.white_noise(*size), draws.smooth_noise(1, max(4, min(size) // 4), size)[0], contrast.coarseness
    )
    image = image + contrast.spreads.to(device)[seen.int()] * texture
    image = image * (contrast.bias * draws.smooth_noise(1, 3, size)[0]).exp()
    sigmas = contrast.blur * draws.uniform(0.8, 1.2, 3)
    kernels = [gaussian_1d(sigma, truncated=3, approx="sampled", normalize=True).to(device) for sigma in sigmas]
    image = separable_filtering(image[None, None], kernels, mode="replicate")[0, 0]
    axis, factor = contrast.coarse
    if factor > 1:
        thick = [max(2, round(n / factor)) if i == axis else n for i, n in enumerate(size)]
        image = F.interpolate(F.adaptive_avg_pool3d(image[None, None], thick), size, mode="trilinear")[0, 0]
    axis, shift, strength = contrast.ghost
    if strength > 0:
        image = image + strength * image.roll(shift, axis)
    image = image + contrast.noise * draws.number(0.7, 1.3) * draws.white_noise(*size)
    shown = image[inside]
    low, high = torch.quantile(
        shown[:: max(1, shown.numel() // 50_000)], torch.tensor(PERCENTILES, device=device) / 100
    )
    image = ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return image.pow(contrast.gamma * draws.log_number(0.93, 1.07)).masked_fill(~inside, 0)
