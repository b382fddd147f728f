"""Whether a scan looks like the contexts: layout, intensities and sharpness against the contexts' own spread."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from scripts.inference.thumbnails import correlation, thumbnail

SAMPLE = 100_000
"""Voxels that quantiles are taken of, at most."""

LAYOUT_SIZE = 12
"""Voxels per axis of the low resolution at which layouts are compared."""

QUANTILES = torch.linspace(0, 1, 33)

OUTLIER_PROBABILITY = 0.002
"""How rarely a scan of the contexts' own kind would be called unlike in one measure, if distances were normal."""

MIN_IMAGES = 3
"""Fewer images have no spread to compare with."""

MEASURES = ("layout", "intensities", "sharpness")

NEGLIGIBLE = (0.05, 0.02, 0.01)
"""Distances in these measures that are like enough, however close the contexts are to each other."""


class Resemblance(NamedTuple):
    """How a scan compares with the contexts.

    Attributes:
        similarity: correlation of its coarse layout with that of the most similar context, -1 to 1.
        unlike: the measures in which it is farther from every context than they are from each other.
    """

    similarity: float
    unlike: list[str]


class ContextSimilarity:
    """Compares a scan with every context in three measures, and takes the nearest one in each.

    - layout: 1 less the normalised cross-correlation of thumbnails of 12³ voxels;
    - intensities: mean difference of the quantiles of the foreground (1-Wasserstein distance of the histograms);
    - sharpness: the same for the gradient's magnitude, which noise raises and blur lowers.

    A scan is unlike the contexts in a measure if its distance lies above the prediction interval (Student's t) of
    the distances that the contexts themselves have to their nearest fellow, and is not negligible.

    Args:
        images: ``(L, 1, H, W, D)`` in [0, 1].
    """

    def __init__(self, images: Tensor) -> None:
        self._known = [_descriptors(image) for image in images]
        count = len(self._known)
        self._limits = [float("inf")] * len(MEASURES)
        if count >= MIN_IMAGES:
            own = np.array(
                [self._nearest(one, self._known[:i] + self._known[i + 1 :]) for i, one in enumerate(self._known)]
            )
            reach = student.ppf(1 - OUTLIER_PROBABILITY, count - 1) * np.sqrt(1 + 1 / count)
            self._limits = np.maximum(own.mean(0) + reach * own.std(0, ddof=1), NEGLIGIBLE).tolist()

    def __call__(self, image: Tensor) -> Resemblance:
        """Compare a scan ``(1, H, W, D)`` in [0, 1], on the contexts' grid."""
        distances = self._nearest(_descriptors(image), self._known)
        unlike = [name for name, far, limit in zip(MEASURES, distances, self._limits, strict=True) if far > limit]
        return Resemblance(1 - distances[0], unlike)

    @staticmethod
    def _nearest(one: tuple[Tensor, ...], others: list[tuple[Tensor, ...]]) -> list[float]:
        """Distance to the nearest of the others in each measure."""
        layout, *quantiles = one
        away = [(1 - correlation(torch.stack([other[0] for other in others]), layout)).tolist()]
        away += [[float((own - other[1 + i]).abs().mean()) for other in others] for i, own in enumerate(quantiles)]
        return [min(distances) for distances in away]


def _descriptors(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thumbnail of the image, quantiles of its foreground and of the gradient's magnitude there."""
    image = image.float()
    sharpness = sum(slope.square() for slope in torch.gradient(image[0])).sqrt()
    foreground = image[0] > 0
    return (
        thumbnail(image, image.shape[1:], LAYOUT_SIZE),
        _quantiles(image[0][foreground]),
        _quantiles(sharpness[foreground]),
    )


def _quantiles(values: Tensor) -> Tensor:
    if not len(values):  # a constant image
        return torch.zeros_like(QUANTILES)
    ordered = values[:: len(values) // SAMPLE + 1].sort().values
    return ordered[(QUANTILES * (len(ordered) - 1)).round().long().to(ordered.device)].cpu()
