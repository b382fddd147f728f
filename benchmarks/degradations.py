"""Ways in which a scan can be worse than the contexts, for benchmarks: each spoils an image, and moves its label along.

Each takes image and label ``(H, W, D)``, a strength from 0 to 1, and a random generator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

Pair = tuple[np.ndarray, np.ndarray]
Degradation = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], Pair]


def noise(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Gaussian noise, standard deviation 5 to 40 % of the intensity range; magnitude image."""
    sigma = (0.05 + 0.35 * strength) * _range(image)
    return np.abs(image + rng.normal(0, sigma, image.shape)), label


def low_resolution(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Thick slices along one axis: 2 to 6 voxels, brought back linearly."""
    factors = np.ones(3)
    factors[rng.integers(3)] = 1 / (2 + 4 * strength)
    low = ndimage.zoom(image, factors, order=1)
    return ndimage.zoom(low, np.divide(image.shape, low.shape), order=1), label


def blur(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Gaussian blur of 1 to 3 voxels."""
    return ndimage.gaussian_filter(image, 1 + 2 * strength), label


def inverted(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Bright and dark exchanged, as between T1 and T2 weighting."""
    return image.max() + image.min() - image, label


def gamma(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Another contrast: exponent of up to 3.3, or 1 / 3.3."""
    exponent = np.exp((0.4 + 0.8 * strength) * rng.choice((-1, 1)))
    return ((image - image.min()) / _range(image)) ** exponent, label


def bias_field(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """A coil's brightness falling off exponentially in a random direction, e^1 to e^3 to each side."""
    direction = rng.normal(size=3)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    along = sum(d * g for d, g in zip(direction / np.linalg.norm(direction), grid, strict=True))
    return image * np.exp((1 + 2 * strength) * along), label


def rotated(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """Turned by 10 to 60 degrees in one plane."""
    plane, degrees = [(0, 1), (0, 2), (1, 2)][rng.integers(3)], 10 + 50 * strength
    turned = ndimage.rotate(image, degrees, plane, reshape=False, order=1, mode="nearest")
    return turned, ndimage.rotate(label, degrees, plane, reshape=False, order=0)


def shifted(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """A crop elsewhere: 3 to 12 voxels off in a random direction."""
    direction = rng.normal(size=3)
    offset = (3 + 9 * strength) * direction / np.linalg.norm(direction)
    return ndimage.shift(image, offset, order=1, mode="nearest"), ndimage.shift(label, offset, order=0)


def cut(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """A crop that lacks 15 to 45 % of the scan at one side."""
    axis = rng.integers(3)
    kept = image.shape[axis] - int((0.15 + 0.3 * strength) * image.shape[axis])
    part = np.arange(kept) + rng.choice((0, image.shape[axis] - kept))
    return image.take(part, axis), label.take(part, axis)


def mirrored(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Pair:
    """The wrong side: left and right exchanged."""
    return image[::-1], label[::-1]


DEGRADATIONS: tuple[Degradation, ...] = (
    noise,
    low_resolution,
    blur,
    inverted,
    gamma,
    bias_field,
    rotated,
    shifted,
    cut,
    mirrored,
)


def _range(image: np.ndarray) -> float:
    return float(np.ptp(image)) or 1.0
