"""What a network is asked for: from a clean image and what belongs to it to the input and the wanted output.

The tasks are those of Hu et al. (ICCV 2025, arXiv 2503.02410). One network serves all of them: the output of the
examples decides the task. All members of a group share one *setting* (which structures, how strong a corruption of
which kind), for it is what the examples have to show; the noise, field or mask itself differs from member to member.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from monai.transforms import RandBiasField, RandGaussianNoise, Resize, ScaleIntensityRangePercentiles
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor
from torch import Tensor

from scripts.data.preprocessing import PERCENTILES

Setting = dict[str, Any]

MIN_CELL_VOXELS = 4
"""Least edge of a lattice cell of an inpainting mask: below that, holes are specks and no blobs."""


class Task(ABC):
    """One kind of question.

    Attributes:
        name: as in collection files and on the command line.
        reads: what is needed besides the image: ``"label"`` (a label map), ``"output"`` (a second image of the
            same voxels) or ``"image"`` (nothing).
    """

    name: ClassVar[str]
    reads: ClassVar[str]

    @property
    def generation(self) -> bool:
        """Whether the output is an image; else it is a mask."""
        return True

    def setting(self, rng: np.random.Generator) -> Setting:
        """Draw what the members of a group have in common.

        Returns:
            Plain values that JSON can say.
        """
        return {}

    def __call__(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """One member of a group.

        Args:
            image: clean image (1, H, W, D) in [0, 1].
            other: label map (whole numbers) or second image in [0, 1], as ``reads`` says, on the same voxels.
            setting: the group's.
            rng: of this member.

        Returns:
            Input and wanted output, each (1, H, W, D); float32, but a mask is uint8: a quarter of the bytes on their
            way through loading processes. The arguments are not changed, but may be returned.

        Raises:
            ValueError: a wrong shape, no ``other`` although the task reads one, or a setting that is incomplete or
                out of range.
        """
        if image.ndim != 4 or image.shape[0] != 1:
            raise ValueError(f"{self.name}: the image must be (1, H, W, D), got {tuple(image.shape)}")
        if self.reads != "image":
            what = "a label map" if self.reads == "label" else "a second image"
            if other is None:
                raise ValueError(f"{self.name} needs {what} besides the image, got None")
            if other.shape != image.shape:
                raise ValueError(
                    f"{self.name} needs {what} of the image's shape {tuple(image.shape)}, got {tuple(other.shape)}"
                )
            other = convert_to_tensor(other, track_meta=False)
        return self._pair(convert_to_tensor(image, dtype=torch.float32, track_meta=False), other, setting, rng)

    @abstractmethod
    def _pair(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Input and output of arguments that are sound, apart from the setting."""

    def _of(self, setting: Setting, key: str) -> Any:
        if key not in setting:
            raise ValueError(f"{self.name}: the setting needs {key!r}, got {sorted(setting)}")
        return setting[key]


# --- tasks whose output is in the data


class _LabelTask(Task):
    """A task of the union of some labels. The caller adds their ``values`` to the setting: they hang on the dataset."""

    reads = "label"

    def _mask(self, label: Tensor, setting: Setting) -> Tensor:
        values = [int(value) for value in self._of(setting, "values")]
        if not values:
            raise ValueError(f"{self.name}: the setting's 'values' is empty: give at least one label value")
        return _is_one_of(label, values)


def _is_one_of(label: Tensor, values: Sequence[int]) -> Tensor:
    """1 (uint8) where a label map has one of the values, else 0.

    NumPy compares whole numbers far faster than PyTorch on a processor.
    """
    numbers = label.numpy()
    mask = np.zeros(numbers.shape, bool)
    for value in values:
        mask |= numbers == value
    return torch.from_numpy(mask.view(np.uint8))


class Segmentation(_LabelTask):
    """Mask of one or more merged structures (Hu et al. 2025): 1 where the label is one of the setting's ``values``."""

    name = "segmentation"

    @property
    def generation(self) -> bool:
        """False: the output is a mask."""
        return False

    def _pair(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        return image, self._mask(other, setting)


class SkullStripping(_LabelTask):
    """The image inside the brain and 0 elsewhere (Hu et al. 2025); the setting's ``values`` make up the brain."""

    name = "skull_stripping"

    def _pair(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        return image, image * self._mask(other, setting)


class ModalityTransfer(Task):
    """The same anatomy in another modality, such as T2 from T1 (Hu et al. 2025)."""

    name = "modality_transfer"
    reads = "output"

    def _pair(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        return image, other.float()


# --- tasks whose input is made by spoiling the image


class Corruption(Task):
    """A task that asks for the clean image; the input is a corrupted one, with padding left at 0.

    Attributes:
        limits: lowest and highest sensible value of every severity; whole numbers if these are.
        ranges: lowest and highest value that is drawn.

    Args:
        ranges: of every severity.

    Raises:
        ValueError: a range is not two numbers in order within the limits.
    """

    reads = "image"
    limits: ClassVar[dict[str, tuple[float, float]]]

    def __init__(self, **ranges: Sequence[float]) -> None:
        self.ranges = {name: self._checked_range(name, bounds) for name, bounds in ranges.items()}

    def setting(self, rng: np.random.Generator) -> Setting:
        """Draw every severity uniformly from its range."""
        return {
            name: int(rng.integers(low, high + 1)) if isinstance(low, int) else float(rng.uniform(low, high))
            for name, (low, high) in self.ranges.items()
        }

    def corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        """The corrupted scan as it comes from the scanner, in the image's units and of any range.

        Args:
            image: clean image (1, H, W, D) in [0, 1].
            setting: the group's.
            rng: of this member.

        Returns:
            (1, H, W, D) float32. Around the box of the voxels above 0 there is padding of the grid, or what was
            masked out: no scan, so it stays 0.

        Raises:
            ValueError: a setting that is incomplete or out of range.
        """
        for name, (low, high) in self.limits.items():
            if not _is_number(value := self._of(setting, name), low) or not low <= value <= high:
                raise ValueError(f"{self.name}: the setting's {name} must be from {low} to {high}, got {value!r}")
        corrupted = torch.zeros_like(image)
        if image.any():
            box = _scan_box(image)
            corrupted[box] = convert_to_tensor(self._corrupt(image[box], setting, rng), track_meta=False)
        return corrupted

    def _pair(
        self, image: Tensor, other: Tensor | None, setting: Setting, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        corrupted = self.corrupt(image, setting, rng)
        if image.any():  # training has to show the scale that the preprocessing gives to a corrupted file
            box = _scan_box(image)
            corrupted[box] = ScaleIntensityRangePercentiles(*PERCENTILES, 0.0, 1.0, clip=True)(corrupted[box])
        return corrupted, image

    @abstractmethod
    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        """Corrupted image (1, H, W, D), of any range; the image is the scan without padding."""

    def _checked_range(self, name: str, bounds: Sequence[float]) -> tuple[float, float]:
        low, high = self.limits[name]
        pair = tuple(bounds) if isinstance(bounds, (list, tuple)) else ()
        if len(pair) != 2 or not all(_is_number(b, low) for b in pair) or not low <= pair[0] <= pair[1] <= high:
            kind = "whole numbers" if isinstance(low, int) else "numbers"
            raise ValueError(
                f"{self.name}: {name} must be two {kind} (lowest, highest) from {low} to {high}, got {bounds!r}"
            )
        return tuple(int(b) if isinstance(low, int) else float(b) for b in pair)


class BiasCorrection(Corruption):
    """Remove a smooth multiplicative field, such as a receive coil's.

    The field is the exponential of a sum of Legendre polynomials (Van Leemput et al. 1999, IEEE TMI 18), by MONAI's
    ``RandBiasField``.

    Args:
        strength: the coefficients are uniform on ±strength (no unit: of the logarithm of the field).
        degree: highest total degree of the polynomials.
    """

    name = "bias_correction"
    limits = {"strength": (0.0, 2.0), "degree": (1, 6)}

    def __init__(self, strength: Sequence[float] = (0.1, 0.4), degree: Sequence[int] = (1, 3)) -> None:
        super().__init__(strength=strength, degree=degree)

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        strength = setting["strength"]
        field = RandBiasField(degree=setting["degree"], coeff_range=(-strength, strength), prob=1.0)
        return field.set_random_state(_seed(rng))(image)


class GaussianDenoising(Corruption):
    """Remove white Gaussian noise (Hu et al. 2025), by MONAI's ``RandGaussianNoise``.

    Args:
        sigma: standard deviation, as a share of the image's intensity range.
    """

    name = "gaussian_denoising"
    limits = {"sigma": (0.0, 1.0)}

    def __init__(self, sigma: Sequence[float] = (0.03, 0.2)) -> None:
        super().__init__(sigma=sigma)

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        noise = RandGaussianNoise(prob=1.0, std=setting["sigma"], sample_std=False)
        return noise.set_random_state(_seed(rng))(image)


class SaltPepperDenoising(Corruption):
    """Remove impulse noise: single voxels set to the highest (salt) or lowest (pepper) intensity (Hu et al. 2025).

    Args:
        fraction: share of the voxels that are hit.
        salt: share of salt among them.
    """

    name = "salt_pepper_denoising"
    limits = {"fraction": (0.0, 1.0), "salt": (0.0, 1.0)}

    def __init__(self, fraction: Sequence[float] = (0.02, 0.15), salt: Sequence[float] = (0.3, 0.7)) -> None:
        super().__init__(fraction=fraction, salt=salt)

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        # MONAI has no impulse noise
        drawn = torch.from_numpy(rng.random(image.shape, dtype=np.float32)).to(image.device)
        pepper = image.masked_fill(drawn < setting["fraction"], 0.0)
        return pepper.masked_fill(drawn < setting["fraction"] * setting["salt"], 1.0)


class Inpainting(Corruption):
    """Fill in holes, as lesions or lost signal leave them; the input is 0 there.

    The holes are where Perlin noise (Perlin 1985, "An image synthesizer", SIGGRAPH) is highest.

    Args:
        fraction: share of the voxels above 0 that lie in holes; empty background needs no filling in.
        frequency: lattice cells along the longest axis of the grid: the more, the smaller the holes. A cell is at
            least ``MIN_CELL_VOXELS`` wide, whatever is drawn.
    """

    name = "inpainting"
    limits = {"fraction": (0.0, 0.9), "frequency": (1.0, 32.0)}

    def __init__(self, fraction: Sequence[float] = (0.1, 0.35), frequency: Sequence[float] = (2.0, 8.0)) -> None:
        super().__init__(fraction=fraction, frequency=frequency)

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        size = tuple(image.shape[1:])
        cell_voxels = max(max(size) / setting["frequency"], MIN_CELL_VOXELS)
        # MONAI's SmoothField interpolates values, which peak on its lattice; gradient noise has no such pattern
        noise = perlin_noise(size, cell_voxels, rng)
        present = noise[(image[0] > 0).cpu().numpy()]
        if not present.size:
            return image
        hole = noise > np.quantile(present, 1 - setting["fraction"])
        return image.masked_fill(torch.from_numpy(hole).to(image.device), 0.0)


class SuperResolution(Corruption):
    """Restore the detail of a scan with thick slices, or with large voxels (Hu et al. 2025).

    The image is averaged over blocks, as a thick slice averages over its depth, and interpolated back to its grid.

    Args:
        factor: how many times larger the coarse voxels are.
        isotropic_prob: probability that all axes are coarse; else it is one axis.
    """

    name = "super_resolution"
    limits = {"factor": (1.0, 8.0)}

    def __init__(self, factor: Sequence[float] = (2.0, 4.0), isotropic_prob: float = 0.25) -> None:
        super().__init__(factor=factor)
        if not _is_number(isotropic_prob, 0.0) or not 0 <= isotropic_prob <= 1:
            raise ValueError(f"{self.name}: isotropic_prob must be from 0 to 1, got {isotropic_prob!r}")
        self.isotropic_prob = isotropic_prob

    def setting(self, rng: np.random.Generator) -> Setting:
        """Draw the factor and which of the axes 0, 1, 2 are coarse."""
        drawn = super().setting(rng)
        isotropic = rng.random() < self.isotropic_prob
        return drawn | {"axes": [0, 1, 2] if isotropic else [int(rng.integers(3))]}

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        axes = self._of(setting, "axes")
        if not axes or not set(axes) <= {0, 1, 2}:
            raise ValueError(f"{self.name}: the setting's axes must be some of 0, 1, 2, got {axes!r}")
        size = tuple(image.shape[1:])
        coarse = [max(1, round(n / setting["factor"])) if axis in axes else n for axis, n in enumerate(size)]
        # MONAI's RandSimulateLowResolution always takes all axes and draws its own factor
        return Resize(size, mode="trilinear")(Resize(coarse, mode="area")(image))


class SlicesToVolume(Corruption):
    """Restore a volume of which only every k-th slice is there (2D-to-3D); the input is 0 between them.

    Hu et al. 2025 name the task; how far apart the slices lie is a choice made here.

    Args:
        every: k, in voxels.
        axis: the lowest and the highest axis across which the slices may lie.
    """

    name = "2d_to_3d"
    limits = {"every": (2, 16), "axis": (0, 2)}

    def __init__(self, every: Sequence[int] = (2, 6), axis: Sequence[int] = (0, 2)) -> None:
        super().__init__(every=every, axis=axis)

    def setting(self, rng: np.random.Generator) -> Setting:
        """Draw k, the axis and the first slice."""
        drawn = super().setting(rng)
        return drawn | {"offset": int(rng.integers(drawn["every"]))}

    def _corrupt(self, image: Tensor, setting: Setting, rng: np.random.Generator) -> Tensor:
        every, offset = setting["every"], self._of(setting, "offset")
        if not _is_number(offset, 0) or not 0 <= offset < every:
            raise ValueError(f"{self.name}: the setting's offset must be from 0 to {every - 1}, got {offset!r}")
        kept = [slice(None)] * 4
        kept[setting["axis"] + 1] = slice(offset, None, every)
        sparse = torch.zeros_like(image)
        sparse[tuple(kept)] = image[tuple(kept)]
        return sparse


def perlin_noise(size: Sequence[int], cell_voxels: float, rng: np.random.Generator) -> np.ndarray:
    """Gradient noise (Perlin 1985, "An image synthesizer", SIGGRAPH).

    Every node of a lattice has a random direction g. At distance d from it, in cells, its part is (g · d) times
    s(1 - abs(d_i)) of every axis i, with s(t) = 3t² - 2t³. Both factors are products over the axes, so that the sum
    over the nodes is three small matrix products and needs no gathering of nodes for each voxel.

    Args:
        size: H, W, D in voxels.
        cell_voxels: edge of a lattice cell.
        rng: draws the directions and where the lattice begins.

    Returns:
        (H, W, D) float32, about 0 on average and within ±1.
    """
    fades, ramps = [], []
    for n in size:
        position = (np.arange(n) + 0.5) / cell_voxels + rng.random()
        distance = position[:, None] - np.arange(math.floor(position[-1]) + 2)
        near = np.clip(1 - np.abs(distance), 0, None)
        fades.append((near**2 * (3 - 2 * near)).astype(np.float32))
        ramps.append((fades[-1] * distance).astype(np.float32))
    directions = rng.standard_normal((3, *(fade.shape[1] for fade in fades)), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    parts = (
        [ramp if i == axis else fade for i, (fade, ramp) in enumerate(zip(fades, ramps, strict=True))]
        for axis in range(3)
    )
    return sum(
        np.einsum("abc,xa,yb,zc->xyz", direction, *factors, optimize=True)
        for direction, factors in zip(directions, parts, strict=True)
    )


def find_task(name: str) -> Task:
    """The task of this name, with its default severities.

    Raises:
        ValueError: there is none; the message names the nearest one.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown task {name!r}: did you mean {near}? (known: {', '.join(TASKS)})")


def _scan_box(image: Tensor) -> tuple[slice, ...]:
    start, end = generate_spatial_bounding_box(image, allow_smaller=True)
    return (slice(None), *(slice(a, b) for a, b in zip(start, end, strict=True)))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


def _is_number(value: Any, like: float) -> bool:
    """Whether a value is a number, a whole one if ``like`` is; NaN is one, but lies in no range."""
    return not isinstance(value, bool) and isinstance(value, Integral if isinstance(like, int) else Real)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Segmentation(),
        ModalityTransfer(),
        BiasCorrection(),
        GaussianDenoising(),
        SaltPepperDenoising(),
        Inpainting(),
        SuperResolution(),
        SlicesToVolume(),
        SkullStripping(),
    )
}
"""Every task with its default severities, by name."""
