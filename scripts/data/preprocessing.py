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
)
from scripts.data.volumes import load_known, load_pair

PERCENTILES = (0.5, 99.5)
"""Intensities are clipped to these percentiles of a case, as in the published recipe."""

RAS_LABELS = (("L", "R"), ("P", "A"), ("I", "S"))

_TOUCHING = 0.05
"""Scores up to this are noise: where a label has no more, it neither wins nor counts as a neighbour."""

_SOURCE_AFFINE = "source_affine"
_GRID_AXES = "grid_axes"

Box = Sequence[tuple[int, int]]
"""First and one past the last voxel along each array axis."""


@dataclass(frozen=True)
class FinerScores:
    """One label's scores on a finer grid over a part of a target.

    Attributes:
        scores: ``(h, w, d)``.
        target: ``(1, h, w, d)``, from :meth:`Preprocessing.target` for a box of the scan.
    """

    scores: Tensor
    target: MetaTensor


def least_score(rival: Tensor, threshold: float) -> Tensor:
    """What a label's score has to exceed for a voxel not to be background.

    Between two labels that touch, both scores fall below the threshold, and a gap would open. So the rival's score
    counts as not being background, and the threshold is for the share of what is left. For exclusive labels this is
    nearly the highest of all shares, the background's included.

    Args:
        rival: highest score of the other labels, any shape; up to 0.05 it counts as none.
        threshold: of a label on its own.

    Returns:
        ``threshold * (1 - rival)``, of the same shape.
    """
    return threshold * (1 - torch.where(rival > _TOUCHING, rival, 0))


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
    """Brings cases to one isotropic spacing, and answers back to a case's own space.

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

        It is not cropped where it is larger. Padding is part of the result, for the network's answer in it counts: a
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

    def to_native(
        self, scores: Tensor, target: MetaTensor, order: int = 1, finer: Sequence[FinerScores | None] = ()
    ) -> MetaTensor:
        """Bring scores on a preprocessed target's voxels back to the target's own space.

        Args:
            scores: ``(K, h, w, d)`` on the voxels of ``target``.
            target: from :meth:`target`.
            order: of the splines, 1 (trilinear) or 3 (cubic, as :meth:`to_native_labels` has it).
            finer: scores that take the place of the others where they reach, None for a channel without; of none if
                empty.

        Returns:
            ``(K, H, W, D)`` float32, 0 outside the grid, with the source's affine and meta data. For label numbers,
            :meth:`to_native_labels` needs a fraction of the memory.

        Raises:
            ValueError: scores of other voxels than the target's.
        """
        shape = _slabs_of(scores[0], target, order).shape
        native = np.zeros((len(scores), *shape), np.float32)
        for score, fine, result in zip(scores, finer or [None] * len(scores), native, strict=True):
            for one, its_target in [(score, target), *([(fine.scores, fine.target)] if fine else [])]:
                slabs, spline = _slabs_of(one, its_target, order), spline_coefficients(one) if order == 3 else one
                for part in slabs:
                    slabs.put(slabs.interpolate(spline, part), part, result)
        return _in_source_space(torch.from_numpy(native), target)

    def to_native_labels(
        self,
        scores: Tensor,
        target: MetaTensor,
        values: Sequence[int],
        threshold: float,
        finer: Mapping[int, FinerScores] | None = None,
    ) -> MetaTensor:
        """Bring scores back to the target's own space and give each voxel the label with the highest one.

        The scores are resampled by cubic splines, label by label and slab by slab. Voxels whose highest score is not
        above :func:`least_score` are background.

        Args:
            scores: ``(K, h, w, d)`` on the voxels of ``target``.
            target: from :meth:`target`.
            values: K label numbers.
            threshold: of a label on its own.
            finer: by label number, scores that take the place of the others where they reach.

        Returns:
            ``(1, H, W, D)`` uint8 (int16, int32 or int64 where the numbers need it), with the source's affine and meta
            data. At equal scores the first label wins.

        Raises:
            ValueError: scores of other voxels than the target's, or not one per label.
        """
        if len(values) != len(scores):
            raise ValueError(f"need one score per label, got {len(scores)} for {len(values)} labels")
        smallest = next(t for t in (np.uint8, np.int16, np.int32, np.int64) if max(values) <= np.iinfo(t).max)
        slabs = _slabs_of(scores[0], target, order=3)
        labels = [_LabelScores(slabs, score, (finer or {}).get(v)) for score, v in zip(scores, values, strict=True)]
        kind = torch.int64 if smallest is np.int64 else torch.int32
        native = np.zeros(slabs.shape, smallest)
        for part in slabs:
            number = torch.zeros(slabs.shape_of(part), dtype=kind)
            best, second = torch.zeros(number.shape), torch.zeros(number.shape)
            for label, value in zip(labels, values, strict=True):
                region, score = label.on(part)
                if region is None:
                    continue
                number[region].masked_fill_(score > best[region], value)
                second[region] = torch.maximum(second[region], torch.minimum(best[region], score))
                best[region] = torch.maximum(best[region], score)
            number.masked_fill_(best <= least_score(second, threshold), 0)
            slabs.put(number, part, native)
        return _in_source_space(torch.from_numpy(native)[None], target)

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


class _LabelScores:
    """One label's cubic spline on a scan's voxels, slab by slab, and the finer one's where there is one.

    Args:
        slabs: of the target.
        score: ``(h, w, d)`` on its voxels.
        finer: scores that take the place of these where they reach.
    """

    def __init__(self, slabs: ScanSlabs, score: Tensor, finer: FinerScores | None) -> None:
        self._slabs = slabs
        self._spline = spline_coefficients(score)
        self._counting = self._spline > _TOUCHING
        self._finer_slabs = _slabs_of(finer.scores, finer.target, order=3) if finer else None
        self._finer_spline = spline_coefficients(finer.scores) if finer else None

    def on(self, part: slice) -> tuple[tuple[slice, slice, slice] | None, Tensor | None]:
        """Region of a slab, in RAS order, with all scores that count, and the scores there; None if there are none."""
        region = self._slabs.region(self._counting, part)
        places = self._slabs.overlap(self._finer_slabs, part) if self._finer_slabs else None
        if places is None:
            return region, None if region is None else self._slabs.interpolate(self._spline, part, region)
        here, there = places
        both = here[:2] if region is None else list(map(_hull, here[:2], region[:2]))
        region = (*both, slice(None))
        score = self._slabs.interpolate(self._spline, part, region)
        right, anterior = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(here[:2], both, strict=True))
        score[right, anterior, here[2]] = self._finer_slabs.interpolate(self._finer_spline, there[2], there)
        return region, score


def _hull(a: slice, b: slice) -> slice:
    return slice(min(a.start, b.start), max(a.stop, b.stop))


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
            ``image``, and ``answer`` where the case has a ``label`` (label numbers) or an ``output`` (in [0, 1]);
            each ``(1, *spatial_size)``.

        Raises:
            VolumeError: a file cannot be read, or is not what it was (``digest``).
        """
        digest = case.get("digest")
        if "label" in case:
            image, label = load_pair(case["image"], case["label"], labels=True, digest=digest)
            image, answer = self.preprocessing.pair(image, label, ignored=case.get("ignored", ()))
        elif "output" in case:
            pair = load_pair(case["image"], case["output"], labels=False, digest=digest)
            image, answer = self.preprocessing.image_pair(*pair)
        else:
            return {"image": self.preprocessing.image(load_known(case["image"], digest))}
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
