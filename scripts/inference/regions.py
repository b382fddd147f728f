"""Which labels share a region, and how fine its voxels are: decided by the context set alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import nibabel as nib
import numpy as np
from torch import Tensor

GRIDS = 2.0
"""A region has about so many times the voxels of the training grid at most; voxels are larger where it would have
more."""

MARGIN = 0.15
"""Added to a region on either side, as a part of its edge..."""

MARGIN_MM = 8.0
"""...and at least so much: contexts' borders lie within it after an affine registration."""

COARSER = 1.3
"""Labels share a region if its voxels are no more than this times as large as either would have alone..."""

MORE = 1.2
"""...and no more than this times as many as both would have alone."""

_DIRECTIONS = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if any(d)], dtype=np.float32)


@dataclass(frozen=True)
class LabelGroup:
    """Labels that are predicted in one region.

    Attributes:
        values: label numbers.
        spacing_mm: voxel edge of the region.
        margin_mm: beyond where the contexts' labels come to lie.
        voxels: of the region, about.
    """

    values: tuple[int, ...]
    spacing_mm: float
    margin_mm: float
    voxels: float


def extreme_points(mask: Tensor, affine: Tensor) -> np.ndarray:
    """The outermost voxels of a mask ``(H, W, D)`` in 26 directions, ``(26, 3)`` in world coordinates (RAS, mm)."""
    voxels = mask.nonzero().numpy()
    world = nib.affines.apply_affine(np.asarray(affine), voxels).astype(np.float32)
    return np.asarray(world[(world @ _DIRECTIONS.T).argmax(0)], dtype=np.float64)


def overlap_of_boxes(points: Sequence[Mapping[int, np.ndarray]], value: int) -> float:
    """Mean Jaccard index of a label's bounding boxes over all pairs of contexts; 1 where fewer than two have it.

    Args:
        points: of each context, by label, from :func:`extreme_points`, all in one world.
        value: the label.
    """
    boxes = [(cloud.min(0), cloud.max(0)) for cloud in (p[value] for p in points if value in p)]
    found = []
    for (low, high), (other_low, other_high) in itertools.combinations(boxes, 2):
        both = np.prod(np.maximum(np.minimum(high, other_high) - np.maximum(low, other_low) + 1, 0))
        found.append(both / (np.prod(high - low + 1) + np.prod(other_high - other_low + 1) - both))
    return float(np.mean(found)) if found else 1.0


def group_labels(
    points: Sequence[Mapping[int, np.ndarray]], values: Sequence[int], voxel_mm: float, grid_voxels: int
) -> list[LabelGroup]:
    """Labels that lie close to each other share a region; others, and those that need larger voxels, have their own.

    Args:
        points: of each context, by label, from :func:`extreme_points`.
        values: labels that are asked for.
        voxel_mm: the contexts' own voxel edge; regions have no smaller one.
        grid_voxels: of the training grid.
    """

    def edges_of(labels: Sequence[int]) -> np.ndarray:
        found = [np.ptp(np.concatenate([p[v] for v in labels if v in p]), 0) for p in points if set(labels) & p.keys()]
        return np.max(found, axis=0) if found else np.zeros(3)

    @cache
    def group(labels: tuple[int, ...]) -> LabelGroup:
        edges = edges_of(labels)
        margin = np.maximum(MARGIN * edges, MARGIN_MM)
        volume = float(np.prod(edges + 2 * margin))
        spacing = round(max(voxel_mm, (volume / (GRIDS * grid_voxels)) ** (1 / 3)), 3)
        return LabelGroup(labels, spacing, float(margin.max()), volume / spacing**3)

    def price(a: LabelGroup, b: LabelGroup, both: LabelGroup) -> float:
        """Of sharing a region; it is worth it up to 1."""
        coarser = both.spacing_mm / min(a.spacing_mm, b.spacing_mm)
        return max(coarser / COARSER, both.voxels / (MORE * (a.voxels + b.voxels)))

    place = {value: i for i, value in enumerate(values)}
    groups = [group((value,)) for value in values]
    while len(groups) > 1:
        joined = [
            (price(a, b, both), i, j, both)
            for (i, a), (j, b) in itertools.combinations(enumerate(groups), 2)
            for both in (group(tuple(sorted((*a.values, *b.values), key=place.__getitem__))),)
        ]
        least, i, j, both = min(joined, key=lambda one: one[:3])
        if least > 1:
            break
        groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [both]
    return sorted(groups, key=lambda g: place[g.values[0]])
