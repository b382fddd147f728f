"""Coarse to fine: what the pass over the whole target found is looked at once more, label by label, at finer voxels.

Where a label is, with a margin, the target is brought to the grid anew at smaller voxels; so is every context about
its own label. To the network that is an episode like any other. The finer scores take the place of the others where
they reach (:class:`~scripts.data.preprocessing.FinerScores`), and labels compete voxel by voxel as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

from scripts.contexts import ContextSet
from scripts.data.label_numbers import label_boxes
from scripts.data.preprocessing import FinerScores, Preprocessing, bounding_box, target_axes
from scripts.data.resampling import box_about, grid_axes
from scripts.engine import MASK_THRESHOLD
from scripts.tensor_cache import TensorCache

logger = logging.getLogger(__name__)

REGION_SCORE = 0.25
"""A label's region is where its score exceeds this: half of what a mask needs, for the thin and the small score low."""

SMALL_PART = 0.1
"""Patches of a label that have less than this part of its largest one's voxels do not count for its region."""

MARGIN = 0.25
"""Added to a region on either side, as a part of its edge..."""

MARGIN_VOXELS = 2
"""...and at least so many voxels of the first pass, by which its border may be wrong."""

WORTHWHILE = 0.8
"""Voxels have to shrink at least to this part, or the label stays as it is."""

LEAST_MARGIN_VOXELS = 1
"""What is left of a target's margin if more of it would make its region larger than the grid, in the same voxels."""

MOST_GRIDS = 2
"""A target's region takes up to so many grids along an axis; voxels are made larger where it would be more."""

_READERS_SHOWN = 4


@dataclass(frozen=True)
class Region:
    """Where to look at a label again.

    Attributes:
        spacing_mm: voxel size of the second pass.
        ranges: first and one past the last voxel of the scan along R, A, S, in their direction, margin included.
    """

    spacing_mm: float
    ranges: tuple[tuple[int, int], ...]


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Refinement:
    """Second passes with one context set.

    Every label has its own region, so that a small structure gets small voxels whatever lies around it. The voxels are
    so large that the contexts' regions fit the grid; never smaller than the scan's own smallest edge; and the same for
    all targets whose scans have equal voxels, so that the contexts' crops serve them all. A target's region that is
    larger than the grid is tiled. A crop is as large as the grid where the scan is: what lies about a structure helps
    to find it, and costs nothing.

    Args:
        context: the contexts.
        budget_bytes: host memory for crops of the contexts that are kept for the next target. What does not fit is
            cropped from the files again.

    Attributes:
        found: by label of the last target, for ``report.json``: ``spacing_mm``, ``region_mm`` (edges along R, A and
            S), and ``centre_mm`` of its second pass, or why it was ``kept`` as it was.
    """

    def __init__(self, context: ContextSet, budget_bytes: int) -> None:
        self.context = context
        self.found: dict[int, dict[str, Any]] = {}
        self._crops = TensorCache(budget_bytes)
        self._extents: dict[int, dict[int, np.ndarray]] = {}

    def __call__(
        self,
        scores: Mapping[int, Tensor],
        target: MetaTensor,
        scan: MetaTensor,
        members: Mapping[int, Sequence[int]],
        predict: Predict,
    ) -> dict[int, FinerScores]:
        """Look at every label again that gains by it.

        Args:
            scores: of the first pass, by label ``(h, w, d)``, on the voxels of ``target``.
            target: ``(1, h, w, d)``, the scan as preprocessed for it.
            scan: ``(1, H, W, D)``.
            members: numbers of the contexts to use, by label.
            predict: image ``(1, h, w, d)``, context images and masks, each ``(L, 1, *grid)`` -> scores ``(h, w, d)``.

        Returns:
            Finer scores by label; the others stay as they are.
        """
        self.found, regions, finer = {}, {}, {}
        for value, score in scores.items():
            region = self.region(value, score, target, members[value])
            if isinstance(region, str):
                self._keep(value, region)
            else:
                regions[value] = region
        self._prepare({value: (region.spacing_mm, members[value]) for value, region in regions.items()})
        for value, region in regions.items():
            image, box = self._crop_target(scan, target, region)
            crops = torch.stack([self._crop(i, value, region.spacing_mm) for i in members[value]]).float()
            score = predict(image.as_tensor(), crops[:, :1], crops[:, 1:])
            if (scores[value] > MASK_THRESHOLD).any() and not (score > MASK_THRESHOLD).any():
                self._keep(value, f"nothing was found at {region.spacing_mm:g} mm")
                continue
            finer[value] = FinerScores(score, image)
            self.found[value] = {"spacing_mm": region.spacing_mm} | _place(scan, box)
            logger.info(
                "label %d at %g mm instead of %.3g mm, in a region of %s mm about %s",
                value,
                region.spacing_mm,
                self.context.preprocessing.spacing_mm,
                _by(self.found[value]["region_mm"]),
                tuple(self.found[value]["centre_mm"]),
            )
        return finer

    def region(self, value: int, score: Tensor, target: MetaTensor, chosen: Sequence[int]) -> Region | str:
        """Where to look at a label again, and how finely.

        Args:
            value: the label.
            score: ``(h, w, d)``.
            target: as for a call.
            chosen: numbers of the contexts to use.

        Returns:
            The region, or the reason why there is none.
        """
        if not chosen:
            return "there is no context for it"
        box = found_box(score.numpy())
        if box is None:
            return "the pass over the whole scan did not find it"
        preprocessing, axes = self.context.preprocessing, target_axes(target)
        spacing, grid = preprocessing.spacing_mm, np.array(preprocessing.spatial_size)
        low, high = np.array([(part.start, part.stop) for part in box]).T
        wanted = np.max([self._extent(i, value) for i in chosen], axis=0)
        margin = _margin((high - low) * spacing, spacing)
        needed = (high - low) * spacing + 2 * margin
        own = spacing / max(a.step for a in axes)
        finest = float(np.max([wanted / grid, needed / (MOST_GRIDS * grid)]))
        if max(own, finest) > WORTHWHILE * spacing:
            if own > finest:
                return f"the scan's own voxels of {own:.3g} mm are hardly smaller than the grid's of {spacing:.3g} mm"
            return f"its region of {_by(needed)} mm (contexts: {_by(wanted)} mm) needs the grid as it is"
        fine = round(max(own, finest), 3)
        room = np.maximum((grid - 1) * fine / spacing - (high - low), 2 * LEAST_MARGIN_VOXELS) / 2
        ranges = []
        for a, first, last, beside in zip(axes, low, high - 1, np.minimum(margin / spacing, room), strict=True):
            begin, end = (a.start + (place - a.before) * a.step for place in (first - beside, last + beside))
            begin = min(max(int(np.floor(begin)), 0), a.size - 1)
            ranges.append((begin, min(max(int(np.ceil(end)), begin), a.size - 1) + 1))
        return Region(fine, tuple(ranges))

    def _extent(self, number: int, value: int) -> np.ndarray:
        """Edges in mm (R, A, S) of a context's region of a label, margins included."""
        spacing = self.context.preprocessing.spacing_mm
        if number not in self._extents:
            labels = self.context.pairs([number])[1][0, 0].numpy()
            self._extents[number] = {
                found: np.array([part.stop - part.start for part in box]) * spacing
                for found, box in label_boxes(labels).items()
            }
        extent = self._extents[number][value]
        return extent + 2 * _margin(extent, spacing)

    def _crop_target(
        self, scan: MetaTensor, target: MetaTensor, region: Region
    ) -> tuple[MetaTensor, list[tuple[int, int]]]:
        fine, coarse = self._at(region.spacing_mm), self.context.preprocessing
        axes = [replace(a, step=a.step * region.spacing_mm / coarse.spacing_mm) for a in target_axes(target)]
        box = box_about(axes, region.ranges, fine.spatial_size)
        return fine.target(scan, box), box

    def _prepare(self, wanted: Mapping[int, tuple[float, Sequence[int]]]) -> None:
        """Crop every context for all labels at once, as far as there is room, for reading scans takes time."""
        crop_bytes = 4 * int(np.prod(self.context.preprocessing.spatial_size))
        missing: dict[int, list[tuple[int, float]]] = {}
        planned = 0
        for value, (spacing, chosen) in wanted.items():
            for number in chosen:
                if self._crops.get((number, value, spacing)) is None and self._crops.has_room(planned + crop_bytes):
                    missing.setdefault(number, []).append((value, spacing))
                    planned += crop_bytes
        few = len(missing) <= _READERS_SHOWN
        for number, labels in tqdm(missing.items(), "contexts at finer voxels", leave=False, disable=few):
            image, answer = self.context.native(number)
            found = label_boxes(answer[0].as_tensor().numpy())
            for value, spacing in labels:
                box = [(part.start, part.stop) for part in found[value]]
                self._crops.put((number, value, spacing), self._crop_pair(image, answer, value, spacing, box))

    def _crop(self, number: int, value: int, spacing_mm: float) -> Tensor:
        crop = self._crops.get((number, value, spacing_mm))
        if crop is None:
            image, answer = self.context.native(number)
            box = bounding_box(answer[0].as_tensor() == value)
            crop = self._crop_pair(image, answer, value, spacing_mm, box)
        return crop

    def _crop_pair(
        self, image: MetaTensor, answer: MetaTensor, value: int, spacing_mm: float, box: list[tuple[int, int]]
    ) -> Tensor:
        """Image and mask about a context's label, which lies in the box: ``(2, *grid)`` float16."""
        mask = MetaTensor((answer.as_tensor() == value).to(torch.uint8), affine=answer.affine)
        axes, _ = grid_axes(np.asarray(image.affine), image.shape[1:], box, spacing_mm)
        fine = self._at(spacing_mm)
        ranges = [(a.start, a.start + box[a.axis][1] - box[a.axis][0]) for a in axes]
        both = fine.pair(image, mask, box_about(axes, ranges, fine.spatial_size))
        return torch.cat([part.half() for part in both])

    def _at(self, spacing_mm: float) -> Preprocessing:
        return Preprocessing(self.context.preprocessing.spatial_size, spacing_mm)

    def _keep(self, value: int, reason: str) -> None:
        self.found[value] = {"kept": reason}
        logger.info("label %d stays as it is: %s", value, reason)


def found_box(score: np.ndarray) -> tuple[slice, slice, slice] | None:
    """Box of what was found of a label, without specks; None if nothing was.

    Args:
        score: ``(h, w, d)``.
    """
    patches, count = ndimage.label(score > REGION_SCORE)
    if not count:
        return None
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0
    return ndimage.find_objects((sizes >= SMALL_PART * sizes.max())[patches].astype(np.uint8))[0]


def _margin(extent_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    return np.maximum(MARGIN * extent_mm, MARGIN_VOXELS * spacing_mm)


def _place(scan: MetaTensor, box: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    """Edges along R, A, S and centre of a box of a scan, in mm."""
    affine = np.asarray(scan.affine, dtype=float)
    low, high = np.array(box).T
    axes, _ = grid_axes(affine, scan.shape[1:], box, 1.0)
    edges = ((high - low) * nib.affines.voxel_sizes(affine))[[a.axis for a in axes]]
    centre = nib.affines.apply_affine(affine, (low + high - 1) / 2)
    return {"region_mm": edges.round(1).tolist(), "centre_mm": centre.round(1).tolist()}


def _by(edges_mm: Sequence[float]) -> str:
    return " x ".join(f"{edge:.0f}" for edge in edges_mm)
