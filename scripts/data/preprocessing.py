"""From files to the network's grid and back: one preprocessing for training, inference and the apps.

RAS orientation, crop to the foreground box, isotropic resampling (aspect ratio and physical scale are kept:
the spacing is one per dataset or context set), percentile clip and min-max to [0, 1], centred padding to the
grid. Trilinear for images, nearest neighbour for labels. Everything but the intensity scaling is undone by
:meth:`Preprocessing.to_native`, through MONAI's invertible transforms.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    DeleteItemsd,
    MapTransform,
    Orientationd,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    Transform,
)
from monai.transforms.utils_pytorch_numpy_unification import percentile
from torch import Tensor

from scripts.data.nnunet import Case
from scripts.data.volumes import load_volume

PERCENTILES = (0.5, 99.5)
"""Intensities are clipped to these percentiles of a case, as in the published recipe."""

_KEYS = ("image", "label")
RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))


class ForegroundMask(MapTransform):
    """Adds ``foreground``: voxels above the image's minimum, and any labelled voxel."""

    def __init__(self) -> None:
        super().__init__(_KEYS, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Dict with ``image`` ``(C, H, W, D)`` and perhaps ``label`` ``(1, H, W, D)``."""
        image = data["image"]
        mask = (image > image.amin(dim=(1, 2, 3), keepdim=True)).any(0, keepdim=True)
        if "label" in data:
            mask = mask | (data["label"] > 0)
        if not mask.any():  # a constant image has no foreground to crop to
            mask = mask | True
        return {**data, "foreground": mask}


class Preprocessing:
    """Brings cases to one isotropic spacing, and answers back to a case's own space.

    Args:
        spatial_size: the network's grid, three voxel counts (R, A, S).
        spacing_mm: isotropic voxel edge of the grid.
    """

    def __init__(self, spatial_size: Sequence[int], spacing_mm: float) -> None:
        self.spatial_size = tuple(int(n) for n in spatial_size)
        self.spacing_mm = float(spacing_mm)
        if len(self.spatial_size) != 3 or min(self.spatial_size) < 1 or not self.spacing_mm > 0:
            raise ValueError(f"need three sizes and a positive spacing, got {spatial_size} and {spacing_mm} mm")
        self._geometry = Compose(
            [
                Orientationd(_KEYS, axcodes="RAS", labels=RAS_LABELS, allow_missing_keys=True),
                ForegroundMask(),
                CropForegroundd(_KEYS, "foreground", allow_smaller=True, allow_missing_keys=True),
                DeleteItemsd("foreground"),
                Spacingd(
                    _KEYS,
                    pixdim=(self.spacing_mm,) * 3,
                    mode=("bilinear", "nearest"),
                    padding_mode="border",
                    allow_missing_keys=True,
                ),
            ]
        )
        self._intensity = ScaleIntensityRangePercentilesd("image", *PERCENTILES, 0.0, 1.0, clip=True)
        self._grid = ResizeWithPadOrCropd(_KEYS, self.spatial_size, allow_missing_keys=True)

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the result would."""
        return json.dumps(["v1", self.spatial_size, round(self.spacing_mm, 6), PERCENTILES])

    def target(self, image: MetaTensor) -> MetaTensor:
        """Orient, crop, resample and scale one image; not padded, for it may be larger than the grid.

        Args:
            image: ``(1, H, W, D)`` with the affine of its own space.

        Returns:
            ``(1, h, w, d)`` float32 in [0, 1], with its operations recorded for :meth:`to_native`.
        """
        return self._intensity(self._geometry({"image": image}))["image"]

    def pair(self, image: MetaTensor, label: MetaTensor) -> tuple[Tensor, Tensor]:
        """A labelled case on the network's grid.

        Args:
            image: ``(1, H, W, D)``.
            label: ``(1, H, W, D)``, label numbers.

        Returns:
            Image in [0, 1] (float32) and label numbers (uint8 or int32), each ``(1, *spatial_size)``.
        """
        data = self._grid(self._intensity(self._geometry({"image": image, "label": label})))
        label = data["label"].as_tensor().round()
        return data["image"].as_tensor().float(), label.to(torch.uint8 if label.max() < 256 else torch.int32)

    def image(self, image: MetaTensor) -> Tensor:
        """One image on the network's grid.

        Args:
            image: ``(1, H, W, D)``.

        Returns:
            ``(1, *spatial_size)`` float32 in [0, 1].
        """
        return self._grid({"image": self.target(image)})["image"].as_tensor().float()

    def image_pair(self, image: MetaTensor, output: MetaTensor) -> tuple[Tensor, Tensor]:
        """A pair of images (input and wanted output of a generation task) on the network's grid.

        Args:
            image: ``(1, H, W, D)``.
            output: the same voxels.

        Returns:
            Both in [0, 1], each ``(1, *spatial_size)`` float32.

        Raises:
            ValueError: the two are not on the same voxels.
        """
        both = self._same_geometry(image, output)
        first, second = (self._grid(self._intensity({"image": one}))["image"] for one in both)
        return first.as_tensor().float(), second.as_tensor().float()

    def intensity_range(self, image: MetaTensor, output: MetaTensor) -> tuple[float, float]:
        """The intensities of ``output`` that :meth:`image_pair` makes 0 and 1."""
        _, output = self._same_geometry(image, output)
        low, high = (percentile(output, q) for q in PERCENTILES)
        return float(low), float(high)

    def _same_geometry(self, image: MetaTensor, output: MetaTensor) -> Sequence[MetaTensor]:
        if image.shape != output.shape:
            raise ValueError(f"input and output image differ in shape: {tuple(image.shape)}, {tuple(output.shape)}")
        return self._geometry({"image": MetaTensor(torch.cat((image, output)), affine=image.affine)})["image"].split(1)

    def to_native(self, scores: Tensor, target: MetaTensor) -> MetaTensor:
        """Bring per-label scores on a preprocessed target's voxels back to the target's own space.

        Args:
            scores: ``(K, h, w, d)`` on the voxels of ``target``.
            target: from :meth:`target` of this very object.

        Returns:
            ``(K, H, W, D)``, trilinearly resampled, 0 outside the foreground box, with the source's affine.
        """
        answer = MetaTensor(scores, affine=target.affine, applied_operations=list(target.applied_operations))
        return self._geometry.inverse({"image": answer})["image"]


class LoadCase(Transform):
    """Case dict of paths -> what is in it on the network's grid, as plain tensors."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, case: Case) -> dict[str, Tensor]:
        """Read and preprocess one case.

        Returns:
            ``image``, and ``answer`` where the case has a ``label`` (label numbers) or an ``output`` (in [0, 1]);
            each ``(1, *spatial_size)``.

        Raises:
            VolumeError: a file cannot be read.
        """
        image = load_volume(case["image"])
        if "label" in case:
            image, answer = self.preprocessing.pair(image, load_volume(case["label"]))
        elif "output" in case:
            image, answer = self.preprocessing.image_pair(image, load_volume(case["output"]))
        else:
            return {"image": self.preprocessing.image(image)}
        return {"image": image, "answer": answer}


def fit_spacing(cases: Sequence[Case], spatial_size: Sequence[int]) -> float:
    """Isotropic voxel size in mm at which the largest case just fits the grid.

    Resampling goes from the first to the last voxel's centre and gives ``round((extent - voxel) / spacing + 1)``
    voxels, which at ``extent / size`` is one too many if voxels are less than half as large as those of the grid.

    Args:
        cases: inspected cases (``extent_mm``, and ``voxel_mm`` where known).
        spatial_size: three voxel counts (R, A, S).
    """
    return max(
        max(extent / size, (extent - voxel) / (size - 0.500001))
        for case in cases
        for extent, voxel, size in zip(
            case["extent_mm"], case.get("voxel_mm") or case["extent_mm"], spatial_size, strict=True
        )
    )
