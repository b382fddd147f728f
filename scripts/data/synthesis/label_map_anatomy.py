"""Anatomies from label maps of real subjects: whole, or crops at a random scale, with labels merged and cut at random.

The images of such maps are synthesised (SynthSeg, Billot et al. 2023, Medical Image Analysis 86), so that a few
segmented subjects give any contrast.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.transforms import Orientation
from torch import Tensor

from scripts.data.label_numbers import count_labels
from scripts.data.preprocessing import RAS_LABELS
from scripts.data.synthesis.anatomy import Anatomy, NoRoomError
from scripts.data.synthesis.seeded_draws import Draws
from scripts.data.volumes import load_labels, strip_ending

TISSUE_KINDS = {
    "white": (2, 7, 16, 28, 41, 46, 60, 85),
    "grey": (3, 8, 10, 11, 12, 13, 17, 18, 26, 42, 47, 49, 50, 51, 52, 53, 54, 58),
    "fluid": (4, 5, 14, 15, 24, 43, 44),
}
"""Values of FreeSurfer's table that look alike in most scans; other maps do without."""

T1_MEANS = (
    (0.17, (4, 5, 14, 15, 24, 43, 44)),
    (0.63, (2, 41, 85)),
    (0.38, (3, 11, 17, 18, 26, 42, 50, 53, 54, 58)),
    (0.53, (7, 46)),
    (0.35, (8, 47)),
    (0.51, (10, 16, 49)),
    (0.49, (12, 51)),
    (0.60, (13, 52)),
    (0.56, (28, 60)),
    (0.34, (30, 62)),
    (0.50, (502,)),
    (0.07, (506,)),
    (0.37, (507, 516)),
    (0.46, (508,)),
    (0.27, (509, 512)),
    (0.45, (511,)),
    (0.19, (514,)),
    (0.12, (515,)),
    (0.57, (530,)),
)
"""Mean intensities in T1-weighted scans, as parts of 255, of FreeSurfer's values and those of SynthSeg's maps (from
500 on what is around the brain): ``prior_means_t1`` of SynthSeg (Billot et al. 2023)."""

_WHOLE = 0.15  # share of the cohorts that show all there is
_FIELD_MM = (32.0, 110.0)  # longest side of a crop
_ANCHOR_VOXELS = 300  # a label that crops are centred on has as many at least
_LABEL_SHARE = (0.006, 0.4)  # of the voxels in view that a structure to segment has, in every subject
_WITHIN_VIEW = 0.75  # share of the cohorts whose structures to segment have more than half of them in view
_REACH = 1.7  # of a crop around its view, for turned and shifted views
_MERGED, _CUT = 0.2, 0.35  # shares of the labels
_ATTEMPTS = 30


@dataclass(frozen=True)
class _Subject:
    """A map (H, W, D) of bytes in RAS, its voxel edges in mm, and voxel count and centroid of every tissue."""

    tissues: Tensor
    spacing_mm: Tensor
    counts: Tensor
    centroids: Tensor


class LabelMaps:
    """Label maps of a folder, in memory: read once, cropped to what is labelled, a byte per voxel.

    Args:
        folder: with files that ``scripts.data.volumes`` reads, one per subject.
        held_out: names of files, without ending, that are left out.

    Raises:
        FileNotFoundError: no such folder, or no file in it.
        ValueError: a name of ``held_out`` is not there, or there are too many different labels.
    """

    def __init__(self, folder: str | os.PathLike, held_out: Sequence[str] = ()) -> None:
        files = _files(folder)
        if missing := sorted(set(held_out) - set(files)):
            raise ValueError(f"held_out_maps: {', '.join(missing)} not in {folder} (there: {', '.join(files)})")
        self.names = tuple(name for name in files if name not in set(held_out))
        if not self.names:
            raise ValueError(f"held_out_maps leaves no label map of {folder}")
        maps = [_read(files[name]) for name in self.names]
        self.values = np.unique(np.concatenate([[0], *(list(count_labels(torch.from_numpy(m))) for m, _ in maps)]))
        if len(self.values) > 240:
            raise ValueError(f"{folder}: {len(self.values)} different labels; at most 240 can be used")
        self.subjects = [self._subject(*map_) for map_ in maps]
        numbers = {int(value): number for number, value in enumerate(self.values)}
        self.kinds = tuple((numbers[v], kind) for kind, values in TISSUE_KINDS.items() for v in values if v in numbers)
        self.t1_means = tuple((numbers[v], mean) for mean, values in T1_MEANS for v in values if v in numbers)

    def _subject(self, values: np.ndarray, spacing_mm: np.ndarray) -> _Subject:
        tissues = np.searchsorted(self.values, values).astype(np.uint8)
        counts = np.bincount(tissues.ravel(), minlength=len(self.values))
        sums = []
        for axis, length in enumerate(tissues.shape):  # of the coordinate, plane by plane
            planes = np.moveaxis(tissues, axis, 0).reshape(length, -1)
            sums.append(sum(i * np.bincount(plane, minlength=len(self.values)) for i, plane in enumerate(planes)))
        centroids = np.stack(sums, -1) / np.maximum(counts, 1)[:, None]
        return _Subject(*(torch.as_tensor(x) for x in (tissues, spacing_mm, counts, centroids)))

    def draw(self, draws: Draws, size: Sequence[int], num_labels: int, subjects: int) -> Anatomy:
        """Draw the anatomy of a cohort; its subjects are different people as far as there are enough.

        Args:
            draws: decides everything.
            size: the cohort's grid (H, W, D).
            num_labels: how many labels.
            subjects: how many subjects.

        Returns:
            An anatomy with a map for each subject.

        Raises:
            NoRoomError: no place of these maps shows so many labels.
        """
        people = draws.order(len(self.subjects))
        chosen = [self.subjects[people[i % len(people)]] for i in range(subjects)]
        extent = torch.tensor(size) / max(size)
        for _ in range(_ATTEMPTS):
            field_mm, centres = self._place(draws, chosen)
            views = [
                _View(person, centre, field_mm / 2 / person.spacing_mm, extent)
                for person, centre in zip(chosen, centres, strict=True)
            ]
            low, high = _LABEL_SHARE
            shares = torch.stack([view.shares for view in views])
            shares[:, 0] = 0
            fitting = (shares.amin(0) > low) & (shares.amax(0) < high)
            if draws.chance(_WITHIN_VIEW):
                fitting &= torch.stack([view.inside for view in views]).amin(0) > 0.5
            found = fitting.nonzero().flatten().tolist()
            labels, alike, tissues = self._labels(draws, views, found, num_labels)
            if len(labels) == num_labels:
                break
        else:
            raise NoRoomError(f"no place of these label maps shows {num_labels} labels")
        maps, centres = [view.map.to(draws.device) for view in views], [view.centre for view in views]
        per_unit = [view.voxels_per_unit for view in views]
        return Anatomy(maps, centres, per_unit, labels, tissues, alike, self.kinds, self.t1_means)

    def _place(self, draws: Draws, chosen: Sequence[_Subject]) -> tuple[float, list[Tensor]]:
        """Length of the grid's longest side in mm, and the voxel of each person that its middle shows."""
        if draws.chance(_WHOLE):
            lengths = [float((torch.tensor(p.tissues.shape) * p.spacing_mm).max()) for p in chosen]
            return max(lengths) * draws.number(0.7, 1.1), [torch.tensor(p.tissues.shape) / 2 for p in chosen]
        field_mm = draws.log_number(*_FIELD_MM)
        counts = torch.stack([p.counts for p in chosen]).amin(0)
        large = (counts >= min(_ANCHOR_VOXELS, int(counts[1:].max()))).nonzero().flatten()
        anchor = int(large[draws.integer(0, len(large) - 1)])
        # a voxel of the first person, and what lies as far from the structure's middle in the others
        places = np.flatnonzero(chosen[0].tissues.numpy() == anchor)
        place = torch.tensor(np.unravel_index(places[draws.integer(0, len(places) - 1)], chosen[0].tissues.shape))
        offset_mm = (place - chosen[0].centroids[anchor]) * chosen[0].spacing_mm
        return field_mm, [p.centroids[anchor] + offset_mm / p.spacing_mm for p in chosen]

    def _labels(
        self, draws: Draws, views: Sequence[_View], found: list[int], num_labels: int
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...], int]:
        """Tissues of each label; parts that were cut off others; the number of tissues then."""
        found = [found[i] for i in draws.order(len(found))]
        labels: list[tuple[int, ...]] = []
        alike: list[tuple[int, int]] = []
        tissues = len(self.values)
        while found and len(labels) < num_labels:
            tissue = found.pop()
            if found and draws.chance(_MERGED):
                labels.append((tissue, found.pop()))
            elif num_labels - len(labels) >= 2 and draws.chance(_CUT):
                _cut(draws, views, tissue, tissues)
                labels += [(tissue,), (tissues,)]
                alike.append((tissues, tissue))
                tissues += 1
            else:
                labels.append((tissue,))
        return tuple(labels), tuple(alike), tissues


class _View:
    """A crop of a person's map around what the grid shows of it."""

    def __init__(self, person: _Subject, centre: Tensor, voxels_per_unit: Tensor, extent: Tensor) -> None:
        size = torch.tensor(person.tissues.shape)
        reach = _REACH * voxels_per_unit * extent.max()
        low = (centre - reach).floor().long().clamp(min=0)
        low = torch.minimum(low, size - 1)
        high = torch.maximum(torch.minimum((centre + reach).ceil().long() + 1, size), low + 1)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        self.map = torch.nn.functional.pad(person.tissues[box], (1,) * 6)  # beyond the map there is nothing
        self.centre = (centre - low + 1).float()
        self.voxels_per_unit = voxels_per_unit.float()
        half = voxels_per_unit * extent
        first = (self.centre - half).round().long().clamp(min=0)
        last = (self.centre + half).round().long()
        self.shown = tuple(slice(int(a), max(int(b), int(a) + 1)) for a, b in zip(first, last, strict=True))
        counts = self.map[self.shown].flatten().bincount(minlength=len(person.counts))
        self.shares = counts / (2 * half).prod()  # of the shown voxels, that each tissue has
        self.inside = counts / person.counts.clamp(min=1)  # of each tissue, that is shown


def map_names(folder: str | os.PathLike) -> tuple[str, ...]:
    """Names of the label maps in a folder, as ``held_out`` has them.

    Raises:
        FileNotFoundError: no such folder, or no file in it.
    """
    return tuple(_files(folder))


def _files(folder: str | os.PathLike) -> dict[str, Path]:
    files = {strip_ending(path): path for path in sorted(Path(folder).glob("*")) if strip_ending(path)}
    if not files:
        raise FileNotFoundError(f"no label maps in {folder}: --label_maps takes a folder of NIfTI files")
    return files


def _cut(draws: Draws, views: Sequence[_View], tissue: int, number: int) -> None:
    """Give a part of a tissue a number of its own: on one side of a plane at the same share of it in every person."""
    share, across = draws.number(0.3, 0.7), draws.chance(0.7)
    normal = draws.normal(3)
    for index, view in enumerate(views):
        inside = torch.from_numpy(np.argwhere(view.map.numpy() == tissue))
        shown = [s.indices(n) for s, n in zip(view.shown, view.map.shape, strict=True)]
        seen = torch.stack([(inside[:, i] >= a) & (inside[:, i] < b) for i, (a, b, _) in enumerate(shown)]).all(0)
        points = inside / view.voxels_per_unit
        if index == 0 and across and seen.sum() > 3:  # across its longest axis in the first person
            normal = torch.linalg.eigh(torch.cov(points[seen].T)).eigenvectors[:, -1]
        height = points @ normal
        border = torch.quantile(height[seen][:: max(1, int(seen.sum()) // 10_000)], share)
        view.map[tuple(inside[height > border].T)] = number


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Label values (H, W, D) in RAS, cropped to what is not 0, and voxel edges in mm."""
    volume = Orientation("RAS", labels=RAS_LABELS)(load_labels(path))
    values = volume[0].numpy()
    if values.max() == 0:
        raise ValueError(f"{path} is no label map: it has no value above 0")
    inside, box = values > 0, []
    for axis in range(3):
        there = np.flatnonzero(inside.any(tuple(other for other in range(3) if other != axis)))
        box.append(slice(int(there[0]), int(there[-1]) + 1))
    return values[tuple(box)].astype(np.result_type(values, np.int32)), np.asarray(volume.pixdim, dtype=np.float32)
