"""Brings the contexts of a set to a target, and cuts the regions where their labels then lie.

A target is registered to one context by search, and through the transforms between the contexts, which are found
once, to all others (:mod:`scripts.registration`). Where the labels of the contexts that agree with it come to lie are
its regions; there target and contexts are sampled from their own voxels, at a voxel size that the context set
decides, and registered again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from scripts.data.label_numbers import count_labels
from scripts.data.preprocessing import Preprocessing, bounding_box
from scripts.data.resampling import grid_axes
from scripts.inference.aligned_view import AlignedView, EmptyView
from scripts.inference.contexts import ContextSet, listing
from scripts.inference.regions import LabelGroup, extreme_points, group_labels, overlap_of_boxes
from scripts.inference.target import Target
from scripts.inference.tensor_cache import TensorCache
from scripts.registration import Alignment, align
from scripts.registration.alignment import working_spacing
from scripts.registration.grids import canonical, grid_of, resample
from scripts.registration.similarity import EDGES, KINDS
from scripts.runtime.atomic_files import write_json

__all__ = ["MODES", "AlignedContexts"]

logger = logging.getLogger(__name__)

MODES = ("affine", "deformable")
"""How far contexts are brought to a target."""

BATCH = 8
"""Contexts that are registered at once."""

COARSE_VOXELS = 250_000
"""Of the volumes that whole scans are registered with, about."""

COARSE_STEP = 2.0
"""Voxels of a registration of whole scans over the contexts' own, at least: noise says little in larger ones."""

SCATTERED = 0.2
"""Mean overlap (Jaccard index) of a label's boxes in pairs of contexts, below which they tell nothing of its place."""

REACH = 0.15
"""Contexts whose similarity on the whole scan is farther than this below the best one's say nothing of regions."""

DOUBTFUL = 0.05
"""Whole scans' similarity this far below the best one's may mean a wrong place: they are searched for themselves."""

DISAGREEING = 0.38
"""Median similarity of contexts in regions, below which edges are compared alone: of one contrast they reach 0.40 to
0.62, intensities of different ones 0.28 in wrong places (development cases)."""

ENOUGH = 5
"""So many contexts that one of them may be disregarded where a region ends."""

REFERENCES = 2
"""Contexts that a target is registered to by search; the others start from there."""

PRESELECTED = 3
"""Contexts, per one that serves a target, that are aligned where a set chooses."""

CROP_MARGIN_MM = 30.0
"""Around a context's labels: what is kept of it in memory for targets to come."""

REGION_MARGIN_MM = 8.0
"""Around a target's region in a context, for the deformation to reach into."""


@dataclass(frozen=True)
class _Known:
    """What is remembered of a context pair: a coarse image, and where its labels end, in its world (RAS, mm)."""

    image: MetaTensor
    points: Mapping[int, np.ndarray]
    voxel_mm: float


@dataclass(frozen=True)
class _Brought:
    """How a context was brought to a whole scan: ``affine`` from the scan's world to its own, RAS in mm."""

    affine: Tensor
    similarity: float
    aligned: bool
    words: str


@dataclass
class _Looked:
    """A target with its contexts brought there: regions, labels that lie outside, and by number how they agree."""

    views: list[AlignedView] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)
    similarity: dict[int, float] = field(default_factory=dict)
    words: dict[int, str] = field(default_factory=dict)

    @property
    def agreement(self) -> float:
        """Median similarity of the contexts that serve; -1 if none does."""
        return float(np.median(list(self.similarity.values()))) if self.similarity else -1.0


class AlignedContexts:
    """The contexts of a set, brought to one target after the other.

    Args:
        context: the context set.
        mode: ``affine`` or ``deformable``.
        device: where to register.
        divisor: the network takes sizes divisible by this.
        budget_bytes: host memory for crops of the contexts that are kept; what does not fit is read again.
        record: JSON file to remember transforms between contexts in; None remembers nothing.
        evidence: as :class:`~scripts.inference.aligned_view.AlignedView`.
    """

    def __init__(
        self,
        context: ContextSet,
        mode: str,
        device: torch.device,
        divisor: int,
        budget_bytes: int,
        record: str | Path | None = None,
        evidence: bool = True,
    ) -> None:
        self.context = context
        self.mode = mode
        self.device = device
        self.divisor = divisor
        self.evidence = evidence
        self._record = None if record is None else Path(record)
        self._known: dict[int, _Known] = {}
        self._from_first: dict[int, np.ndarray | None] = {}
        self._groups: dict[tuple[int, ...], list[LabelGroup]] = {}
        self._scattered_of: dict[tuple[int, ...], list[int]] = {}
        self._crops = TensorCache(budget_bytes)
        self._lock = threading.Lock()
        self._read_record()

    # --- what is found once

    def describe(self, values: Sequence[int]) -> None:
        """Look at every context and find the transforms between them now, rather than with the first target.

        Args:
            values: labels that will be asked for.
        """
        with self._lock:
            if tuple(values) not in self._scattered_of:
                self._describe(values)

    def _describe(self, values: Sequence[int]) -> None:
        started, count = time.monotonic(), len(self.context)
        for number in tqdm(range(count), "looking at contexts", unit="pair", disable=count <= BATCH):
            self._know(number)
        new = [number for number in range(count) if number not in self._from_first]
        for part in tqdm(_batches(new), "aligning contexts", disable=len(new) <= BATCH):
            self._relate(part)
        scattered = self._scattered(values)
        self.groups([value for value in values if value not in scattered])
        if new:
            self._write_record()
            logger.info("%d contexts brought to each other in %.1f s", len(new), time.monotonic() - started)

    def _scattered(self, values: Sequence[int]) -> list[int]:
        """Labels that lie elsewhere in every context, as lesions do, once the contexts are brought to each other.

        Where they lie in the contexts says nothing of where they are in a target, so they have no region.
        """
        key = tuple(values)
        if self.context.generation:
            self._scattered_of[key] = []
        if key not in self._scattered_of:
            points = [
                {v: nib.affines.apply_affine(np.linalg.inv(matrix), p) for v, p in self._know(number).points.items()}
                for number, matrix in sorted(self._from_first.items())
                if matrix is not None
            ]
            found = self._scattered_of[key] = [value for value in values if overlap_of_boxes(points, value) < SCATTERED]
            if found:
                logger.info("labels %s lie elsewhere in every context: scans are shown as they are", found)
        return self._scattered_of[key]

    def groups(self, values: Sequence[int]) -> list[LabelGroup]:
        """Labels that share a region, by the context set alone."""
        key = tuple(values)
        if key not in self._groups:
            known = [self._know(number) for number in range(len(self.context))]
            if self.context.generation:
                points = [{1: extreme_points(torch.ones(k.image.shape[1:]), k.image.affine)} for k in known]
            else:
                points = [k.points for k in known]
            grid_voxels = int(np.prod(self.context.preprocessing.spatial_size))
            self._groups[key] = group_labels(points, values, float(np.median([k.voxel_mm for k in known])), grid_voxels)
            for group in self._groups[key]:
                logger.info("labels %s: regions at %.3g mm", listing(list(map(str, group.values))), group.spacing_mm)
        return self._groups[key]

    def take_over(self, other: AlignedContexts, same: Mapping[int, int]) -> None:
        """Take what another set has found of pairs that both have.

        Args:
            other: the other set's.
            same: number there -> number here.
        """
        for number, here in same.items():
            if number in other._known:
                self._known[here] = other._known[number]
            for kind in ("image", "label"):
                kept = other._crops.get((kind, number))
                if kept is not None:
                    self._crops.put((kind, here), kept)
        if 0 in same.values():  # transforms are from the world of the first context here
            first = other._from_first.get(next(there for there, here in same.items() if here == 0))
            if first is not None:
                known = {here: other._from_first.get(there) for there, here in same.items()}
                self._from_first |= {n: m @ np.linalg.inv(first) for n, m in known.items() if m is not None}

    def _know(self, number: int) -> _Known:
        if number not in self._known:
            image, label = self.context.native(number)
            voxel_mm = float(nib.affines.voxel_sizes(np.asarray(image.affine)).min())
            points = {} if self.context.generation else {
                value: extreme_points(label[0].as_tensor() == value, label.affine)
                for value in count_labels(label.as_tensor())
            }  # fmt: skip
            self._known[number] = _Known(coarser(image, COARSE_VOXELS), points, voxel_mm)
            self._keep_crop(number, image, label)
        return self._known[number]

    def _relate(self, numbers: Sequence[int]) -> None:
        """Transforms from the world of the first context to those of others; None where they do not align."""
        self._from_first[0] = np.eye(4)
        for part in _batches([number for number in numbers if number != 0]):
            found = self._coarsely(self._on_device(0), part)
            for k, number in enumerate(part):
                sure = bool(found.aligned[k]) and found.similarity[k] > found.similarity.max() - DOUBTFUL
                self._from_first[number] = found.affine[k].numpy() if sure else None

    def _coarsely(
        self, scan: MetaTensor, numbers: Sequence[int], start: Tensor | None = None, kinds: Sequence[str] = KINDS
    ) -> Alignment:
        """Affine transforms from a scan to contexts, as good as finding the regions needs them."""
        contexts = [self._on_device(number) for number in numbers]
        of_contexts = [grid_of(context) for context in contexts]
        finest = min(float(grid.spacing.min()) for grid in of_contexts)
        spacing = max(working_spacing(grid_of(scan), of_contexts), COARSE_STEP * finest)
        return align(scan, contexts, "affine", start, spacing, kinds)

    def _on_device(self, number: int) -> MetaTensor:
        return self._know(number).image.to(self.device)

    # --- a target

    def prepare(self, target: Target, values: Sequence[int], eligible: Mapping[int, Sequence[int]]) -> None:
        """Bring contexts to a target: its ``views``, the contexts ``aligned``, and its ``alignment``.

        Where no context can be aligned, the target is shown as it is, and said not to be trusted. Labels that lie
        outside of the scan are background.

        Args:
            target: a target.
            values: labels.
            eligible: by label, numbers of the contexts that come into question.
        """
        self.describe(values)  # whichever target comes first: what is known of the contexts is the same
        numbers = self._preselected(target, eligible)
        scattered = self._scattered(values)
        followed = [value for value in values if value not in scattered]
        if scattered or not numbers:
            target.show_as_it_is(scattered if numbers else values, self.context)
        if not (numbers and followed):
            return
        scan = coarser(target.scan, COARSE_VOXELS).to(self.device)
        found = self._looked(target, scan, numbers, followed, KINDS)
        if found.agreement < DISAGREEING:  # outlines alone may agree where contrasts differ, in a wrong place
            found = max(found, self._looked(target, scan, numbers, followed, (EDGES,)), key=lambda one: one.agreement)
        views, words, outside = found.views, found.words, found.outside
        target.aligned = dict(found.similarity)
        left_out = sorted(number for number in numbers if number not in target.aligned)
        target.alignment = {
            "mode": self.mode,
            "contexts": {
                self.context.names[n]: {"similarity": round(target.aligned[n], 3), "transform": words[n]}
                for n in sorted(target.aligned)
            },
            "left_out": [self.context.names[n] for n in left_out],
            "regions": [view.facts for view in views],
            "as_it_is": scattered,
        }
        if target.doubt:
            target.warnings.append(target.doubt)
        if not target.aligned:
            target.show_as_it_is(followed, self.context)
            return
        if left_out:
            target.warnings.append(f"not aligned and left out: {listing(target.alignment['left_out'])}")
        if outside:
            target.warnings.append(f"outside of the scan and left empty: label {listing(list(map(str, outside)))}")
        served = {value for view in views for value in view.values}
        rest = [value for value in followed if value not in served]
        if lost := [value for value in rest if value not in outside]:
            which = listing(list(map(str, lost)))
            target.warnings.append(f"no context aligned where it lies, left empty: label {which}")
        target.views += [*views, *([EmptyView(target.image, rest)] if rest else [])]

    def _looked(
        self, target: Target, scan: MetaTensor, numbers: Sequence[int], values: Sequence[int], kinds: Sequence[str]
    ) -> _Looked:
        """Contexts brought to a target, first to a coarse ``scan`` of all of it, by what may be compared."""
        whole = self._whole(scan, numbers, kinds)
        starts = {number: one.affine for number, one in whole.items()}
        best = max(one.similarity for one in whole.values())
        near = [number for number in numbers if whole[number].similarity >= best - REACH]
        found = _Looked()
        for group in self.groups(values):
            box = self._box(target.scan, group, starts, near)
            if box is None:
                found.outside.extend(group.values)
                continue
            view = self._view(target, group, box, starts, kinds)
            if view is not None:
                found.views.append(view)
                found.words |= view.words
                for number, value in view.similarity.items():
                    found.similarity[number] = max(value, found.similarity.get(number, -1.0))
        if len(found.outside) == len(values):  # no region to compare in
            found.similarity |= {number: one.similarity for number, one in whole.items() if one.aligned}
            found.words |= {number: one.words for number, one in whole.items()}
        return found

    def _preselected(self, target: Target, eligible: Mapping[int, Sequence[int]]) -> list[int]:
        """Contexts that may serve some label, the ones that look most like the target as they are first."""
        alike = self.context.similarity(target.image).tolist()
        most = PRESELECTED * self.context.serving if self.context.chooses else len(self.context)
        ranked = {n for pool in eligible.values() for n in sorted(pool, key=lambda n: (-alike[n], n))[:most]}
        return sorted(ranked, key=lambda n: (-alike[n], n))

    def _whole(self, scan: MetaTensor, numbers: Sequence[int], kinds: Sequence[str]) -> dict[int, _Brought]:
        """Contexts brought to a whole scan by affine transforms."""
        related = [number for number in numbers if self._from_first[number] is not None]
        references = related[:REFERENCES]
        brought: dict[int, _Brought] = {}
        if len(related) > len(references):
            first = self._coarsely(scan, references, kinds=kinds)
            for k, reference in enumerate(references):  # one of them may have been found in a wrong place
                to_first = np.linalg.inv(self._from_first[reference]) @ first.affine[k].numpy()
                starts = {number: torch.from_numpy(self._from_first[number] @ to_first) for number in related}
                _keep_better(brought, self._brought_from(scan, starts, kinds))
        least = max((one.similarity for one in brought.values()), default=1.0) - DOUBTFUL
        lost = [n for n in numbers if n not in brought or brought[n].similarity < least]
        _keep_better(brought, self._brought_from(scan, dict.fromkeys(lost), kinds))
        return brought

    def _brought_from(
        self, scan: MetaTensor, starts: Mapping[int, Tensor | None], kinds: Sequence[str]
    ) -> dict[int, _Brought]:
        """Contexts brought to a whole scan from transforms that are about right, or by search where these are None."""
        brought = {}
        for part in _batches(list(starts)):
            near = None if starts[part[0]] is None else torch.stack([starts[number] for number in part])
            found = self._coarsely(scan, part, near, kinds)
            for k, number in enumerate(part):
                similar, aligned = float(found.similarity[k]), bool(found.aligned[k])
                brought[number] = _Brought(found.affine[k], similar, aligned, found.describe(k))
        return brought

    def _view(
        self,
        target: Target,
        group: LabelGroup,
        box: Sequence[tuple[int, int]],
        starts: Mapping[int, Tensor],
        kinds: Sequence[str],
    ) -> AlignedView | None:
        """A region with the contexts that align there; None if none does."""
        affine, shape = np.asarray(target.scan.affine, dtype=float), target.scan.shape[1:]
        _, counts = grid_axes(affine, shape, box, group.spacing_mm)
        plain = Preprocessing((1, 1, 1), group.spacing_mm).target(target.scan, box)
        sizes = [-(-count // self.divisor) * self.divisor for count in counts]
        padded = Preprocessing(sizes, group.spacing_mm).target(target.scan, box)
        if plain.min() == plain.max():
            return None
        view = AlignedView(padded, group.values, self.context.generation, self._window(), self.evidence)
        region = plain.to(self.device)
        for numbers in _batches(list(starts)):
            crops = {n: self._crop(n, region, starts[n]) for n in numbers}
            numbers = [n for n in numbers if crops[n] is not None]
            if not numbers:
                continue
            images = [crops[n][0].to(self.device) for n in numbers]
            start = torch.stack([starts[n] for n in numbers])
            spacing = min(group.spacing_mm, working_spacing(grid_of(region), [grid_of(image) for image in images]))
            found = align(region, images, self.mode, start, spacing, kinds)
            for k, number in enumerate(numbers):
                if bool(found.aligned[k]):
                    view.add(number, found, k, *crops[number])
        return view.close(target.scan, box)

    def _window(self) -> list[int]:
        """Largest region that the network sees at once: half as much again as the training grid, along each axis."""
        return [-(-3 * size // (2 * self.divisor)) * self.divisor for size in self.context.preprocessing.spatial_size]

    def _box(
        self, scan: MetaTensor, group: LabelGroup, starts: Mapping[int, Tensor], near: Sequence[int]
    ) -> list[tuple[int, int]] | None:
        """Box of scan voxels where the labels of the contexts come to lie, with a margin; None outside of the scan."""
        if self.context.generation:
            return bounding_box(scan[0].as_tensor() > scan.min())
        clouds = []
        for number in near:
            points = [self._know(number).points[v] for v in group.values if v in self._know(number).points]
            if points:
                back = np.linalg.inv(np.asarray(scan.affine, dtype=float)) @ np.linalg.inv(starts[number].numpy())
                clouds.append(nib.affines.apply_affine(back, np.concatenate(points)))
        if not clouds:
            return None
        zooms = nib.affines.voxel_sizes(np.asarray(scan.affine, dtype=float))
        odd = int(len(clouds) >= ENOUGH)  # on each side one may be far off
        low = np.sort([cloud.min(0) for cloud in clouds], axis=0)[odd] - group.margin_mm / zooms
        high = np.sort([cloud.max(0) for cloud in clouds], axis=0)[-1 - odd] + group.margin_mm / zooms
        # rounded, for what is left of a reorientation is in the last digits
        low, high = np.floor(np.round(low, 3)).astype(int), np.ceil(np.round(high, 3)).astype(int) + 1
        low, high = np.maximum(low, 0), np.minimum(high, scan.shape[1:])
        return None if (high - low < 2).any() else [(int(a), int(b)) for a, b in zip(low, high, strict=True)]

    def _keep_crop(self, number: int, image: MetaTensor, label: MetaTensor) -> None:
        """Keep what lies around a context's labels, its intensities from 0 to 1, as far as there is room."""
        if self.context.generation:
            box = [(0, size) for size in image.shape[1:]]
        elif not (label > 0).any():
            return
        else:
            margin = np.ceil(CROP_MARGIN_MM / nib.affines.voxel_sizes(np.asarray(image.affine))).astype(int)
            box = [
                (max(low - m, 0), min(high + m, size))
                for (low, high), m, size in zip(
                    bounding_box(label[0].as_tensor() > 0), margin, image.shape[1:], strict=True
                )
            ]
        low, high = image.min(), image.max()
        cut = cropped((image - low) / (high - low), box)
        self._crops.put(("image", number), MetaTensor(cut.as_tensor().half(), affine=cut.affine))
        kept = cropped(label, box)
        self._crops.put(("label", number), MetaTensor(kept.as_tensor().clone(), affine=kept.affine))

    def _crop(self, number: int, region: MetaTensor, start: Tensor) -> tuple[MetaTensor, MetaTensor] | None:
        """What of a context lies around a target's region: image and label; None if hardly anything does."""
        pair = [self._crops.get((kind, number)) for kind in ("image", "label")]
        if any(part is None for part in pair):
            pair = list(self.context.native(number))
        image, label = pair
        corners = np.array(np.meshgrid(*[(0, size - 1) for size in region.shape[1:]])).reshape(3, -1).T
        to_voxels = np.linalg.inv(np.asarray(image.affine)) @ start.numpy() @ np.asarray(region.affine.cpu())
        reached = nib.affines.apply_affine(to_voxels, corners)
        margin = REGION_MARGIN_MM / nib.affines.voxel_sizes(np.asarray(image.affine))
        low = np.maximum(np.floor(np.round(reached.min(0) - margin, 3)).astype(int), 0)
        high = np.minimum(np.ceil(np.round(reached.max(0) + margin, 3)).astype(int) + 1, image.shape[1:])
        if (high - low < 4).any():
            return None
        box = list(zip(low.tolist(), high.tolist(), strict=True))
        image, label = cropped(image, box), cropped(label, box)
        image = MetaTensor(image.as_tensor().float(), affine=image.affine)
        return None if image.min() == image.max() else (image, label)

    # --- between runs

    def _key(self) -> str:
        return hashlib.sha256(self.context.fingerprint.encode()).hexdigest()

    def _read_record(self) -> None:
        if self._record is None or not self._record.is_file():
            return
        try:
            content = json.loads(self._record.read_text(encoding="utf-8"))
            if content["contexts"] == self._key():
                found = {
                    int(n): np.asarray(m, dtype=np.float64).reshape(4, 4) for n, m in content["transforms"].items()
                }
                self._from_first = {n: m for n, m in found.items() if np.isfinite(m).all() and np.linalg.det(m) > 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._from_first = {}  # damaged: found anew

    def _write_record(self) -> None:
        if self._record is not None:
            transforms = {str(n): matrix.tolist() for n, matrix in self._from_first.items() if matrix is not None}
            write_json({"contexts": self._key(), "transforms": transforms}, self._record)


def cropped(volume: MetaTensor, box: Sequence[tuple[int, int]]) -> MetaTensor:
    """A part of a volume ``(1, H, W, D)``, with the affine that it has there; a view of the same memory."""
    affine = np.array(volume.affine, dtype=np.float64)
    affine[:3, 3] = nib.affines.apply_affine(affine, [low for low, _ in box])
    part = volume.as_tensor()[:, *(slice(low, high) for low, high in box)]
    return MetaTensor(part, affine=torch.from_numpy(affine))


def coarser(volume: MetaTensor, voxels: int) -> MetaTensor:
    """A volume averaged to about so many isotropic voxels along the axes nearest to R, A and S, never to finer ones."""
    data, own = canonical(volume)
    spacing = max(float(own.spacing.min()), float(own.extent.prod() / voxels) ** (1 / 3))
    grid = own.with_spacing(spacing)
    inside = resample(torch.ones_like(data), own, grid)
    return MetaTensor(resample(data, own, grid) / inside.clamp(min=0.5), affine=grid.affine)


def _keep_better(kept: dict[int, _Brought], found: Mapping[int, _Brought]) -> None:
    for number, one in found.items():
        if number not in kept or one.similarity > kept[number].similarity:
            kept[number] = one


def _batches(numbers: Sequence[int]) -> list[list[int]]:
    return [list(numbers[start : start + BATCH]) for start in range(0, len(numbers), BATCH)]
