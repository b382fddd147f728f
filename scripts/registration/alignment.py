"""Bringing contexts to a target: search, affine, deformable, one after the other, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation
from torch import Tensor

from scripts.registration import separable
from scripts.registration.affine import Level, gauss_newton, plausible, rigid_basis
from scripts.registration.deformable import demons, folded_share, voxel_indices, voxel_maps, warp_features
from scripts.registration.grids import Grid, canonical, resample, sample
from scripts.registration.search import search
from scripts.registration.similarity import EDGES, KINDS, VALUES, correlation, features, likeness

MODES = ("search", "affine", "deformable")
VOXEL_BUDGET = 100_000
"""Voxels of the working grid, about, unless a spacing is asked for."""
FINEST = 0.75
"""Smallest voxels of the working grid, over those of the finest context: scans agree to parts of a voxel."""
SEARCH_VOXELS = 18
"""Of the smallest volume along an axis, about, in the search."""
CANDIDATES = 4
"""Starts of each context that are refined after the search."""
GOOD_START = 0.33
"""Correlation after a coarse affine registration from where scans lie, from which on nothing is searched: scans in
place reach 0.36 to 0.54, misaligned ones that were not found stay below 0.27 (hippocampus, development cases)."""
ALIGNED = 0.25
"""Correlation below which a context counts as not aligned."""
WINDOW_VOXELS = 5.0
SEARCH_WINDOW_VOXELS = 4.0
"""Widths of the surroundings that images are normalised by."""
MARGIN = 0.15
"""Share of the target's size that is taken of the contexts around it, where a start is given."""
AFFINE_ITERATIONS = (20, 4)
DEFORMABLE_ITERATIONS = (40, 8)
"""With voxels of twice the working size, then of the working size."""
FLUID_VOXELS = 0.7
ELASTIC_VOXELS = 1.0
"""Sigma of what smooths updates and displacements."""
FINISHING_ITERATIONS = 20
FINISHING_ELASTIC_VOXELS = 0.5
"""In the end displacements may bend more. How much images agree is judged before: so bent, they agree somehow in any
place."""
ALIKE = 0.73
"""Likeness (median over the contexts) from which intensities may bend scans more in the end; edges always may. Bent by
the intensities of another contrast, structures move to where they do not belong. In one contrast it is 0.76 and more,
in different ones up to 0.70 (development cases)."""


@dataclass(frozen=True)
class Alignment:
    """Transforms from a target's world to the worlds of its contexts.

    Attributes:
        grid: working grid on the target; its spacing is what displacements are smoothed in.
        affine: (K, 4, 4) float64, world of the target to world of each context (RAS, mm).
        displacement: (K, 3, h, w, d) on the working grid, in mm along its axes, applied before the affine; None for
            affine alignments.
        similarity: (K,) correlation of the locally normalised images, -1 to 1, after alignment.
        cover: (K,) share of the target that each context's field of view covers.
        folded: (K,) share of working voxels where the transform turns space inside out.
        kind: what was compared, ``intensity`` or ``edges``.
        searched: (K,) bool, contexts that were searched for.
    """

    grid: Grid
    affine: Tensor
    displacement: Tensor | None
    similarity: Tensor
    cover: Tensor
    folded: Tensor
    kind: str
    searched: Tensor

    @property
    def aligned(self) -> Tensor:
        """(K,) bool: contexts that agree with the target well enough to be used, and are not stretched to do so."""
        return (self.similarity >= ALIGNED) & (self.folded < 0.01) & plausible(self.affine)

    def warp(
        self,
        volume: MetaTensor,
        k: int,
        shape: Sequence[int] | None = None,
        affine: Tensor | None = None,
        mode: str = "deformable",
    ) -> Tensor:
        """A volume of context ``k`` on a grid of the target's world, sampled from its own voxels in one go.

        Args:
            volume: (C, H, W, D) image, or masks of several labels, one per channel.
            k: number of the context.
            shape: of the wanted grid; None for the working grid.
            affine: of the wanted grid, voxels to world.
            mode: ``affine`` leaves the displacement away.

        Returns:
            (C, *shape), linearly interpolated; 0 outside of the context's field of view.
        """
        grid = self.grid if shape is None else Grid(tuple(shape), torch.as_tensor(affine, dtype=torch.float64).cpu())
        data, own = canonical(volume)
        points = grid.points(data)
        centre = grid.centre
        if mode == "deformable" and self.displacement is not None:
            look = self.grid.sampling_matrix()[:3]
            coordinates = points @ look[:, :3].T.to(points) + (look[:, :3] @ centre + look[:, 3]).to(points)
            moved = sample(self.displacement[k : k + 1].to(data), coordinates[None], grid.shape, padding="border")
            directions = self.grid.affine[:3, :3] / self.grid.spacing
            points = points + moved[0].flatten(1).T @ directions.T.to(points)
        matrix = (own.sampling_matrix() @ self.affine[k])[:3]
        coordinates = points @ matrix[:, :3].T.to(points) + (matrix[:, :3] @ centre + matrix[:, 3]).to(points)
        return sample(data[None], coordinates[None], grid.shape)[0]

    def describe(self, k: int) -> str:
        """The affine transform of a context in words: rotation, shift, scale, and the longest displacement."""
        matrix = self.affine[k].numpy()
        left, stretch, right = np.linalg.svd(matrix[:3, :3])
        turn = np.rad2deg(Rotation.from_matrix(left @ right).magnitude())
        centre = self.grid.centre.numpy()
        shift = matrix[:3, :3] @ centre + matrix[:3, 3] - centre
        sides = ("left", "right"), ("back", "front"), ("down", "up")
        moves = [(abs(amount), names[int(amount > 0)]) for amount, names in zip(shift, sides, strict=True)]
        way = ", ".join(f"{amount:.0f} mm {name}" for amount, name in moves if amount >= 0.5)
        words = [f"turned by {turn:.0f}°", f"shifted {way}" if way else "not shifted"]
        words.append(f"scaled by {stretch.min():.2f} to {stretch.max():.2f}")
        if self.displacement is not None:
            words.append(f"bent by up to {float(self.displacement[k].square().sum(0).sqrt().max()):.1f} mm")
        return "; ".join(words)


def align(
    target: MetaTensor,
    contexts: Sequence[MetaTensor],
    mode: str = "deformable",
    start: Tensor | None = None,
    spacing_mm: float | None = None,
    kinds: Sequence[str] = KINDS,
) -> Alignment:
    """Finds where every voxel of a target lies in each context.

    Args:
        target: image (1, H, W, D) with its affine.
        contexts: images alike.
        mode: the last step: ``search`` (coarse, affine), ``affine`` or ``deformable``.
        start: (K, 4, 4) transforms that are about right, as in :attr:`Alignment.affine`; nothing is searched then.
        spacing_mm: voxel size of the working grid; None is that of :func:`working_spacing`.
        kinds: what may be compared, of :data:`~scripts.registration.similarity.KINDS`.

    Raises:
        ValueError: an unknown mode; no context; an image that is constant, not finite, or of more than one channel.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not contexts:
        raise ValueError("there is no context to align")
    _check(target, "the target")
    for number, context in enumerate(contexts, 1):
        _check(context, f"context {number}")
    image, own = canonical(target)
    pairs = [canonical(context) for context in contexts]
    spacing = spacing_mm or working_spacing(own, [grid for _, grid in pairs])
    scans = [_Scan(voxels, grid) for voxels, grid in pairs]
    if start is None:
        return _register(_Scan(image, own), scans, mode, spacing, kinds)
    start = torch.as_tensor(start, dtype=torch.float64).cpu()
    brought = [_brought(scan, own, before, spacing) for scan, before in zip(scans, start, strict=True)]
    found = _register(_Scan(image, own), brought, mode, spacing, kinds, near=True)
    return replace(found, affine=start @ found.affine)


def working_spacing(target: Grid, contexts: Sequence[Grid]) -> float:
    """Voxel size in mm: somewhat finer than the finest context's, unless the target would take more than the budget."""
    finest = min(float(grid.spacing.prod()) ** (1 / 3) for grid in contexts)
    return max(FINEST * finest, float(target.extent.prod() / VOXEL_BUDGET) ** (1 / 3))


def _check(image: Tensor, name: str) -> None:
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"{name} must be one 3D image (1, H, W, D), got shape {tuple(image.shape)}")
    low, high = torch.aminmax(image.as_tensor() if isinstance(image, MetaTensor) else image)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite voxels")
    if bool(low == high):
        raise ValueError(f"{name} is constant")


@dataclass(frozen=True)
class _Scan:
    """Voxels (1, H, W, D), where they lie, and which of them are inside the field of view; None for all."""

    image: Tensor
    grid: Grid
    inside: Tensor | None = None

    def on(self, frame: Grid) -> tuple[Tensor, Tensor]:
        """Image and share inside the field of view, each (1, 1, h, w, d), on voxels from the same edge on."""
        inside = torch.ones_like(self.image) if self.inside is None else self.inside
        both = resample(torch.stack((self.image * inside, inside)), self.grid, frame)
        return both[:1] / both[1:].clamp(min=1e-3), both[1:]


def _brought(scan: _Scan, target: Grid, start: Tensor, spacing: float) -> _Scan:
    """A context on the target's axes with a margin around it, through a transform that is about right."""
    ratio = (spacing / scan.grid.spacing).floor().clamp(min=1)
    if bool((ratio > 1).any()):  # means over whole voxels, so that sampling skips none
        affine = scan.grid.affine.clone()
        affine[:3, :3] *= ratio
        affine[:3, 3] += scan.grid.affine[:3, :3] @ (ratio / 2 - 0.5)
        shape = (torch.tensor(scan.grid.shape) / ratio).ceil().int().tolist()
        coarse = Grid(tuple(shape), affine)
        scan = _Scan(scan.on(coarse)[0][0], coarse)
    frame = target.with_spacing(spacing)
    margin = [round(MARGIN * size) + 2 for size in frame.shape]
    affine = frame.affine.clone()
    affine[:3, 3] -= affine[:3, :3] @ torch.tensor(margin, dtype=torch.float64)
    frame = Grid(tuple(size + 2 * more for size, more in zip(frame.shape, margin, strict=True)), affine)
    matrix = (scan.grid.sampling_matrix() @ start)[:3]
    centre = matrix[:, :3] @ frame.centre + matrix[:, 3]
    coordinates = frame.points(scan.image) @ matrix[:, :3].T.to(scan.image) + centre.to(scan.image)
    volumes = torch.stack((scan.image, torch.ones_like(scan.image)), 1)
    image, inside = sample(volumes, coordinates[None], frame.shape)[0].split(1)
    inside = (inside > 0.99).to(image)
    return _Scan(image, frame, inside)


def _register(
    target: _Scan, contexts: Sequence[_Scan], mode: str, spacing: float, kinds: Sequence[str], near: bool = False
) -> Alignment:
    """All steps; ``near`` contexts are not searched for."""
    every = torch.arange(len(contexts))
    affine = torch.eye(4, dtype=torch.float64).repeat(len(contexts), 1, 1)
    searched = torch.zeros(len(contexts), dtype=torch.bool)
    if near:
        kind = _better_kind(_level(target, contexts, 2 * spacing, kinds, SEARCH_WINDOW_VOXELS), affine, kinds)
    else:
        affine, kind, searched = _coarse(target, contexts, spacing, kinds)
    half = _level(target, contexts, 2 * spacing, (kind,), WINDOW_VOXELS)
    if mode != "search":
        affine, _, _ = gauss_newton(half, affine, every, AFFINE_ITERATIONS[0])
    still = torch.zeros(len(contexts), 3, *half.grid.shape).to(half.target)
    if mode == "deformable":
        judged = _level(target, contexts, spacing, (kind,), WINDOW_VOXELS)
        bent = demons(half, affine, still, DEFORMABLE_ITERATIONS[0], FLUID_VOXELS, ELASTIC_VOXELS)
        bent = 2 * separable.apply(bent, _upsampling(half.grid.shape, judged.grid.shape, bent))
        bent = demons(judged, affine, bent, DEFORMABLE_ITERATIONS[1], FLUID_VOXELS, ELASTIC_VOXELS)
    else:
        judged, bent = half, still  # only bent scans agree down to the finest detail
        if mode == "affine":
            level = _level(target, contexts, spacing, (kind,), WINDOW_VOXELS)
            affine, _, _ = gauss_newton(level, affine, every, AFFINE_ITERATIONS[1])
    moved = _moved(judged, affine, bent)
    known = judged.target != 0
    if mode == "deformable" and (kind == EDGES or _alike(target, contexts, affine, bent, spacing)):
        bent = demons(judged, affine, bent, FINISHING_ITERATIONS, FLUID_VOXELS, FINISHING_ELASTIC_VOXELS)
    return Alignment(
        grid=judged.grid,
        affine=affine,
        displacement=bent * spacing if mode == "deformable" else None,
        similarity=correlation(judged.target, moved).mean(1).cpu(),
        cover=((known & (moved != 0)).flatten(1).sum(1) / known.sum()).cpu(),
        folded=folded_share(bent).cpu(),
        kind=kind,
        searched=searched,
    )


def _coarse(
    target: _Scan, contexts: Sequence[_Scan], finest: float, kinds: Sequence[str]
) -> tuple[Tensor, str, Tensor]:
    """Affine transforms (K, 4, 4) from where scans lie or from the search, what compares better, who was searched.

    Each kind of image is registered by itself: under another contrast the intensities would push scans apart.
    """
    sizes = [float(scan.grid.extent.prod()) ** (1 / 3) for scan in (target, *contexts)]
    spacing = max(min(sizes) / SEARCH_VOXELS, max(sizes) / (2 * SEARCH_VOXELS), finest)
    every = torch.arange(len(contexts))
    in_place = torch.eye(4, dtype=torch.float64).repeat(len(contexts), 1, 1)
    starts = torch.stack((in_place, _centred(target, contexts)), 1)
    levels = {kind: _level(target, contexts, spacing, (kind,), SEARCH_WINDOW_VOXELS) for kind in kinds}
    found = {kind: _refined(level, starts, every) for kind, level in levels.items()}
    far = {kind: score < GOOD_START for kind, (_, score) in found.items()}
    agreement = {kind: float(score.median()) for kind, (_, score) in found.items()}
    kind = max(kinds, key=agreement.__getitem__)
    frames = [scan.grid.with_spacing(spacing) for scan in contexts]
    for tried in kinds if agreement[kind] < GOOD_START else (kind,):
        if far[tried].any():
            which = every[far[tried]]
            best, score = found[tried]
            new, new_score = _refined(levels[tried], search(levels[tried], frames, which, CANDIDATES)[0], which)
            better = new_score > score[which]
            best[which[better]], score[which[better]] = new[better], new_score[better]
            agreement[tried] = float(score.median())
    kind = max(kinds, key=agreement.__getitem__)
    return found[kind][0], kind, far[kind]


def _refined(level: Level, starts: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """The best of several starts (B, S, 4, 4) after rigid and then affine registration: (B, 4, 4) and ranks (B,)."""
    shape = starts.shape[:2]
    found, score, _ = gauss_newton(level, starts.flatten(0, 1), which.repeat_interleave(shape[1]), 15, rigid_basis())
    keep = score.unflatten(0, shape).topk(min(2, shape[1]), dim=1).indices
    found = found.unflatten(0, shape).gather(1, keep[..., None, None].expand(-1, -1, 4, 4))
    found, score, _ = gauss_newton(level, found.flatten(0, 1), which.repeat_interleave(keep.shape[1]), 10)
    score, found = score.unflatten(0, keep.shape), found.unflatten(0, keep.shape)
    rows, place = torch.arange(len(which)), score.argmax(1)
    return found[rows, place], score[rows, place]


def _better_kind(level: Level, affine: Tensor, kinds: Sequence[str]) -> str:
    """What correlates better over the contexts' median; the level has one channel of each kind."""
    moved = _moved(level, affine, torch.zeros(1, 3, *level.grid.shape).to(level.target))
    return kinds[int(correlation(level.target, moved).median(0).values.argmax())]


def _moved(level: Level, affine: Tensor, displacement: Tensor) -> Tensor:
    maps = voxel_maps(level, affine).to(displacement)
    return warp_features(level.contexts, maps, voxel_indices(level.grid.shape, displacement) + displacement)


def _alike(target: _Scan, contexts: Sequence[_Scan], affine: Tensor, displacement: Tensor, spacing: float) -> bool:
    """Whether scans are of one contrast, by their intensities where displacements on working voxels bring them."""
    level = _level(target, contexts, spacing, (VALUES,), WINDOW_VOXELS)
    return float(likeness(level.target, _moved(level, affine, displacement)).quantile(0.5)) >= ALIKE


def _centred(target: _Scan, contexts: Sequence[_Scan]) -> Tensor:
    """(K, 4, 4): own axes on own axes, middle on middle of the fields of view."""
    directions = target.grid.affine[:3, :3] / target.grid.spacing
    found = torch.eye(4, dtype=torch.float64).repeat(len(contexts), 1, 1)
    for matrix, scan in zip(found, contexts, strict=True):
        matrix[:3, :3] = (scan.grid.affine[:3, :3] / scan.grid.spacing) @ torch.linalg.inv(directions)
        matrix[:3, 3] = scan.grid.centre - matrix[:3, :3] @ target.grid.centre
    return found


def _level(target: _Scan, contexts: Sequence[_Scan], spacing: float, kinds: Sequence[str], window: float) -> Level:
    """Features at a voxel size."""
    grid = target.grid.with_spacing(spacing)
    shape = np.max([scan.grid.with_spacing(spacing).shape for scan in contexts], axis=0).tolist()
    frames = [scan.grid.with_spacing(spacing, shape) for scan in contexts]
    images, inside = zip(*(scan.on(frame) for scan, frame in zip(contexts, frames, strict=True)), strict=True)
    return Level(
        _channels(*target.on(grid), kinds, window),
        grid,
        _channels(torch.cat(images), torch.cat(inside), kinds, window),
        torch.stack([frame.sampling_matrix() for frame in frames]),
    )


def _channels(image: Tensor, inside: Tensor, kinds: Sequence[str], window: float) -> Tensor:
    return torch.cat([features(image, inside, kind, window) for kind in kinds], 1)


def _upsampling(old: tuple[int, int, int], new: tuple[int, int, int], like: Tensor) -> list[Tensor]:
    """Linear, from voxels twice as large, held constant beyond the outer centres."""
    matrices = []
    for size, wanted in zip(old, new, strict=True):
        centre = ((torch.arange(wanted, dtype=torch.float64) + 0.5) / 2 - 0.5).clamp(0, size - 1)
        matrices.append((1 - (centre[:, None] - torch.arange(size)).abs()).clamp(min=0).to(like))
    return matrices
