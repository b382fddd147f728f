"""From files to the network's grid and back: one preprocessing for training, inference and the apps.

RAS orientation, crop to the foreground box, isotropic resampling (aspect ratio and physical scale are kept:
the spacing is one per dataset or context set), percentile clip and min-max to [0, 1], centred padding to the
grid. Trilinear for images; a voxel's label is the one with the largest trilinear share. Everything but the intensity
scaling is undone by :meth:`Preprocessing.to_native` and :meth:`Preprocessing.to_native_labels`.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, ResizeWithPadOrCrop, ScaleIntensityRangePercentiles, SpatialPad, Transform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils.enums import MetaKeys
from torch import Tensor

from scripts.data.label_decision import TOUCHING, least_score
from scripts.data.label_numbers import label_numbers, without
from scripts.data.nnunet import Case
from scripts.data.resampling import (
    GridAxis,
    ScanSlabs,
    grid_affine,
    grid_axes,
    sample_labels,
    sample_linear,
    spline_coefficients,
    whole_scan,
)
from scripts.data.volumes import load_known, load_pair

PERCENTILES = (0.5, 99.5)
"""Intensities are clipped to these percentiles of a case, as in the published recipe."""

RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))

_SOURCE_AFFINE = "source_affine"
_GRID_AXES = "grid_axes"

Box = Sequence[tuple[int, int]]
"""First and one past the last voxel along each array axis."""


@dataclass(frozen=True)
class PlacedScores:
    """One label's scores on a grid over a scan or a part of it; outside of it the label is not.

    Attributes:
        scores: ``(h, w, d)``.
        target: ``(1, h, w, d)``, from :meth:`Preprocessing.target`: where in the scan they are.
    """

    scores: Tensor
    target: MetaTensor


class ForegroundMask(MapTransform):
    """Adds ``foreground``: voxels above the image's minimum, and any labelled voxel."""

    def __init__(self) -> None:
        super().__init__(("image", "label"), allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Dict with ``image`` ``(C, H, W, D)`` and perhaps ``label`` ``(1, H, W, D)``."""
        image = data["image"]
        mask = image > image.amin(dim=(1, 2, 3), keepdim=True)
        mask = mask.any(0, keepdim=True) if len(mask) > 1 else mask
        if "label" in data:
            mask |= data["label"] > 0
        if not mask.any():  # a constant image has no foreground to crop to
            mask |= True
        return {**data, "foreground": mask}


class Preprocessing:
    """Brings cases to one isotropic spacing, and predictions back to a case's own space.

    How much of a structure's border survives the way to the grid and back hangs on what is carried. Continuous
    scores keep it to a fraction of a voxel: the part of each grid voxel that a label covers, taken by
    :meth:`to_native_labels`, gives the label back with a Dice of at least 0.98 for compact structures of 1 cm³ or
    more at grid voxels up to 1.44 mm. Label numbers on the grid, as training and contexts have them, cannot: their
    border is known to a voxel only, and at 1.44 mm they come back with about 0.93 (nearest neighbours: 0.91).

    Args:
        spatial_size: the network's grid, three voxel counts (R, A, S).
        spacing_mm: isotropic voxel edge of the grid.
    """

    def __init__(self, spatial_size: Sequence[int], spacing_mm: float) -> None:
        self.spatial_size = tuple(int(n) for n in spatial_size)
        self.spacing_mm = float(spacing_mm)
        if len(self.spatial_size) != 3 or min(self.spatial_size) < 1 or not self.spacing_mm > 0:
            raise ValueError(f"need three sizes and a positive spacing, got {spatial_size} and {spacing_mm} mm")
        self._intensity = ScaleIntensityRangePercentiles(*PERCENTILES, 0.0, 1.0, clip=True)
        self._pad = SpatialPad(self.spatial_size)
        self._grid = ResizeWithPadOrCrop(self.spatial_size)

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the result would."""
        return json.dumps(["v2", self.spatial_size, round(self.spacing_mm, 6), PERCENTILES])

    def target(self, image: MetaTensor, box: Box | None = None) -> MetaTensor:
        """Orient, crop, resample and scale one image, and pad it where it is smaller than the grid.

        It is not cropped where it is larger. Padding is part of the result, for the network predicts in it, too: a
        task's input may be blank where its output is not.

        Args:
            image: ``(1, H, W, D)`` with the affine of its own space.
            box: what to crop to instead of the foreground box.

        Returns:
            ``(1, h, w, d)`` float32 in [0, 1], at least as large as the grid, with its place in the image noted for
            :meth:`to_native`.
        """
        axes, counts = self._lay_grid(image, box=box)
        voxels = self._intensity(sample_linear(image[0].as_tensor(), axes, counts)[None])
        axes = [
            GridAxis(a.axis, a.flipped, a.size, a.start, a.step, before=max(size - count, 0) // 2)
            for a, count, size in zip(axes, counts, self.spatial_size, strict=True)
        ]
        affine = np.asarray(image.affine, dtype=float)
        meta = _without_affine(image.meta) | {_SOURCE_AFFINE: affine, _GRID_AXES: _as_array(axes)}
        return MetaTensor(self._pad(voxels).as_tensor(), affine=torch.as_tensor(grid_affine(affine, axes)), meta=meta)

    def pair(
        self, image: MetaTensor, label: MetaTensor, box: Box | None = None, ignored: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """A labelled case on the network's grid.

        Args:
            image: ``(1, H, W, D)``.
            label: ``(1, H, W, D)``, label numbers.
            box: what to crop to instead of the foreground box.
            ignored: label numbers that do not count as foreground; they are in the result.

        Returns:
            Image in [0, 1] (float32) and label numbers (uint8, int32 or int64), each ``(1, *spatial_size)``.
        """
        foreground = label if box is not None or not ignored else without(label.as_tensor(), ignored)
        axes, counts = self._lay_grid(image, foreground, box)
        voxels = self._intensity(sample_linear(image[0].as_tensor(), axes, counts)[None])
        numbers = label_numbers(sample_labels(label[0].as_tensor(), axes, counts)[None])
        return self._grid(voxels).as_tensor(), self._grid(numbers).as_tensor()

    def image(self, image: MetaTensor) -> Tensor:
        """One image on the network's grid.

        Args:
            image: ``(1, H, W, D)``.

        Returns:
            ``(1, *spatial_size)`` float32 in [0, 1].
        """
        return self._grid(self.target(image).as_tensor()).as_tensor()

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
        first, second = (self._grid(self._intensity(one)).as_tensor() for one in self._on_one_box(image, output))
        return first, second

    def intensity_range(self, image: MetaTensor, output: MetaTensor) -> tuple[float, float]:
        """The intensities of ``output`` that :meth:`image_pair` makes 0 and 1."""
        _, output = self._on_one_box(image, output)
        low, high = (percentile(output, q) for q in PERCENTILES)
        return float(low), float(high)

    def to_native(self, scores: Tensor, target: MetaTensor, order: int = 1) -> MetaTensor:
        """Bring scores on a preprocessed target's voxels back to the target's own space.

        Args:
            scores: ``(K, h, w, d)`` on the voxels of ``target``.
            target: from :meth:`target`.
            order: of the splines, 1 (trilinear) or 3 (cubic, as :meth:`to_native_labels` has it).

        Returns:
            ``(K, H, W, D)`` float32, 0 outside the grid, with the source's affine and meta data. For label numbers,
            :meth:`to_native_labels` needs a fraction of the memory.

        Raises:
            ValueError: scores of other voxels than the target's.
        """
        slabs = _slabs_of(scores[0], target, order)
        native = np.zeros((len(scores), *slabs.shape), np.float32)
        for score, result in zip(scores, native, strict=True):
            spline = spline_coefficients(score) if order == 3 else score
            for part in slabs:
                slabs.put(slabs.interpolate(spline, part), part, result)
        return _in_source_space(torch.from_numpy(native), target)

    def to_native_labels(self, scores: Mapping[int, PlacedScores]) -> MetaTensor:
        """Bring scores back to the target's own space and give each voxel the label with the highest one.

        The scores are resampled by cubic splines, label by label and slab by slab. Voxels whose highest score is not
        above :func:`~scripts.data.label_decision.least_score` are background, and so are those outside of every grid.

        Args:
            scores: by label number; all of parts of one scan.

        Returns:
            ``(1, H, W, D)`` uint8 (int16, int32 or int64 where the numbers need it), with the source's affine and meta
            data. At equal scores the first label wins.

        Raises:
            ValueError: scores of other voxels than their target's.
        """
        target = next(iter(scores.values())).target
        slabs = whole_scan(target_axes(target))
        labels = {value: _LabelScores(slabs, placed) for value, placed in scores.items()}
        smallest = next(t for t in (np.uint8, np.int16, np.int32, np.int64) if max(scores) <= np.iinfo(t).max)
        kind = torch.int64 if smallest is np.int64 else torch.int32
        native = np.zeros(slabs.shape, smallest)
        for part in slabs:
            number = torch.zeros(slabs.shape_of(part), dtype=kind)
            best, second = torch.zeros(number.shape), torch.zeros(number.shape)
            for value, label in labels.items():
                region, score = label.on(part)
                if region is None:
                    continue
                number[region].masked_fill_(score > best[region], value)
                second[region] = torch.maximum(second[region], torch.minimum(best[region], score))
                best[region] = torch.maximum(best[region], score)
            number.masked_fill_(best <= least_score(second), 0)
            slabs.put(number, part, native)
        return _in_source_space(torch.from_numpy(native)[None], target)

    @staticmethod
    def label_on(label: MetaTensor, target: MetaTensor) -> Tensor:
        """A scan's label map on the voxels of a target that was made of it.

        Args:
            label: ``(1, H, W, D)``, label numbers on the scan's voxels.
            target: ``(1, h, w, d)``, from :meth:`target`.

        Returns:
            ``(1, h, w, d)``, label numbers; 0 where the grid goes beyond the scan.
        """
        axes, sizes = target_axes(target), target.shape[1:]
        ahead = [round(a.before) for a in axes]
        counts = [
            min(size - before, int((a.size - 1 - a.start) / a.step + 0.5) + 1)
            for a, size, before in zip(axes, sizes, ahead, strict=True)
        ]
        found = torch.zeros(sizes, dtype=label.dtype)
        inside = tuple(slice(before, before + count) for before, count in zip(ahead, counts, strict=True))
        found[inside] = sample_labels(label[0].as_tensor(), axes, counts)
        return found[None]

    def _lay_grid(
        self, image: MetaTensor, label: Tensor | None = None, box: Box | None = None
    ) -> tuple[list[GridAxis], list[int]]:
        if box is None:
            data = {"image": image.as_tensor()} | ({} if label is None else {"label": torch.as_tensor(label)})
            box = bounding_box(ForegroundMask()(data)["foreground"][0])
        return grid_axes(np.asarray(image.affine, dtype=float), image.shape[1:], box, self.spacing_mm)

    def _on_one_box(self, image: MetaTensor, output: MetaTensor) -> list[Tensor]:
        if image.shape != output.shape:
            raise ValueError(f"input and output image differ in shape: {tuple(image.shape)}, {tuple(output.shape)}")
        both = torch.cat((image.as_tensor(), output.as_tensor()))
        axes, counts = self._lay_grid(MetaTensor(both, affine=image.affine))
        return [sample_linear(one, axes, counts)[None] for one in both]


def _as_array(axes: Sequence[GridAxis]) -> np.ndarray:
    """``(3, 6)``: a form that goes through MONAI's collation."""
    return np.array([[a.axis, a.flipped, a.size, a.start, a.step, a.before] for a in axes], dtype=np.float64)


def bounding_box(mask: Tensor) -> list[tuple[int, int]]:
    """Box of the true voxels of a mask ``(H, W, D)`` that has some; MONAI's needs eight times the mask's memory."""
    flat, side = mask.any(2), mask.any(1)
    hits = [hit.nonzero() for hit in (flat.any(1), flat.any(0), side.any(0))]
    return [(int(hit[0]), int(hit[-1]) + 1) for hit in hits]


def target_axes(target: MetaTensor) -> list[GridAxis]:
    """Where a target ``(1, h, w, d)`` lies in its scan: its axes R, A, S.

    Raises:
        ValueError: it does not come from :meth:`Preprocessing.target`.
    """
    if _GRID_AXES not in target.meta:
        raise ValueError("the target does not come from Preprocessing.target: its own space is not known")
    rows = np.asarray(target.meta[_GRID_AXES], dtype=np.float64).reshape(3, 6)
    return [
        GridAxis(int(axis), bool(flipped), int(size), int(start), float(step), int(before))
        for axis, flipped, size, start, step, before in rows
    ]


def _slabs_of(score: Tensor, target: MetaTensor, order: int) -> ScanSlabs:
    axes = target_axes(target)
    if score.shape != target.shape[1:]:
        raise ValueError(f"scores of {tuple(score.shape)} voxels do not fit a target of {tuple(target.shape[1:])}")
    return ScanSlabs(axes, target.shape[1:], order)


def resampled(placed: PlacedScores, target: MetaTensor) -> Tensor:
    """Scores of a part of a scan on the voxels of another target of it, trilinearly; 0 outside of the part.

    Args:
        placed: scores, and where they are.
        target: ``(1, h, w, d)``, from :meth:`Preprocessing.target`.
    """
    found = placed.scores.float()
    for axis, (own, there, size, count) in enumerate(
        zip(target_axes(target), target_axes(placed.target), target.shape[1:], placed.scores.shape, strict=True)
    ):
        places = own.start + (torch.arange(size, dtype=torch.float64) - own.before) * own.step  # in the scan
        places = (places - there.start) / there.step + there.before
        away = (places[:, None] - torch.arange(count, dtype=torch.float64)).abs()
        found = torch.tensordot(found, (1 - away).clamp(min=0).float(), ([axis], [1])).movedim(-1, axis)
    return found


class _LabelScores:
    """One label's cubic spline on a scan's voxels, slab by slab.

    Args:
        scan: slabs of the whole scan.
        placed: its scores, and where they are.
    """

    def __init__(self, scan: ScanSlabs, placed: PlacedScores) -> None:
        self._scan = scan
        self._slabs = _slabs_of(placed.scores, placed.target, order=3)
        self._spline = spline_coefficients(placed.scores)
        self._counting = self._spline > TOUCHING

    def on(self, part: slice) -> tuple[tuple[slice, slice, slice] | None, Tensor | None]:
        """Region of a slab, in RAS order, with all scores that count, and the scores there; None if there are none."""
        places = self._scan.overlap(self._slabs, part)
        if places is None:
            return None, None
        here, there = places
        region = self._slabs.region(self._counting, there[2])
        if region is None:
            return None, None
        sides = [slice(a.start + b.start, a.start + b.stop) for a, b in zip(here[:2], region[:2], strict=True)]
        return (*sides, here[2]), self._slabs.interpolate(self._spline, there[2], region)


def _without_affine(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key != MetaKeys.AFFINE}


def _in_source_space(voxels: Tensor, target: MetaTensor) -> MetaTensor:
    meta = {
        key: value for key, value in _without_affine(target.meta).items() if key not in (_GRID_AXES, _SOURCE_AFFINE)
    }
    affine = torch.as_tensor(np.asarray(target.meta[_SOURCE_AFFINE]), dtype=torch.float64).reshape(4, 4)
    return MetaTensor(voxels, affine=affine, meta=meta)


class LoadCase(Transform):
    """Case dict of paths -> what is in it on the network's grid, as plain tensors."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, case: Case) -> dict[str, Tensor]:
        """Read and preprocess one case.

        Returns:
            ``image``, and ``label`` where the case has a ``label`` (label numbers) or an ``output`` (in [0, 1]);
            each ``(1, *spatial_size)``.

        Raises:
            VolumeError: a file cannot be read, or is not what it was (``digest``).
        """
        digest = case.get("digest")
        if "label" in case:
            image, label = load_pair(case["image"], case["label"], labels=True, digest=digest)
            image, label = self.preprocessing.pair(image, label, ignored=case.get("ignored", ()))
        elif "output" in case:
            pair = load_pair(case["image"], case["output"], labels=False, digest=digest)
            image, label = self.preprocessing.image_pair(*pair)
        else:
            return {"image": self.preprocessing.image(load_known(case["image"], digest))}
        return {"image": image, "label": label}


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
