"""Bringing contexts to a target: search, affine, deformable, one after the other, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.data import MetaTensor
from scipy.spatial.transform import Rotation
from torch import Tensor

from scripts.registration import separable
from scripts.registration.affine import Level, gauss_newton, overlap_worth, rigid_basis
from scripts.registration.deformable import demons, folded_share, voxel_maps, warp_features, voxel_indices
from scripts.registration.grids import Grid, canonical, resample, sample
from scripts.registration.search import search
from scripts.registration.similarity import KINDS, correlation, features

MODES = ("affine", "deformable")
VOXEL_BUDGET = 100_000
"""Voxels of the working grid, about, unless a spacing is asked for."""
SEARCH_VOXELS = 18
"""Of the smallest volume along an axis, about, in the search."""
CANDIDATES = 4
import os; DEBUG=os.environ.get('DEBUG')
GOOD_START = 0.33
"""Correlation after a coarse affine registration from where scans lie, from which on nothing is searched."""
ALIGNED = 0.25
"""Correlation below which a context counts as not aligned."""
WINDOW_VOXELS = 5.0
SEARCH_WINDOW = 4.0
FLUID_VOXELS = 0.7
ELASTIC_VOXELS = 1.0


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
        """(K,) bool: contexts that agree with the target well enough to be used."""
        return (self.similarity >= ALIGNED) & (self.folded < 0.01)

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
        way = ", ".join(
            f"{abs(amount):.0f} mm {sides[axis][int(amount > 0)]}" for axis, amount in enumerate(shift) if abs(amount) >= 0.5
        )
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
) -> Alignment:
    """Finds where every voxel of a target lies in each context.

    Args:
        target: image (1, H, W, D) with its affine.
        contexts: images alike.
        mode: ``affine`` or ``deformable``.
        start: (K, 4, 4) transforms that are about right, as in :attr:`Alignment.affine`; nothing is searched then.
        spacing_mm: voxel size of the working grid; None takes the contexts' own, or what :data:`VOXEL_BUDGET` allows.

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
    pyramid = _Pyramid(image, own, pairs, start, spacing)
    return pyramid.align(mode)


def working_spacing(target: Grid, contexts: Sequence[Grid]) -> float:
    """Voxel size in mm: that of the finest context, unless the target would take more voxels than the budget."""
    finest = min(float(grid.spacing.prod()) ** (1 / 3) for grid in contexts)
    return max(finest, float(target.extent.prod() / VOXEL_BUDGET) ** (1 / 3))


def _check(image: Tensor, name: str) -> None:
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"{name} must be one 3D image (1, H, W, D), got shape {tuple(image.shape)}")
    low, high = torch.aminmax(image.as_tensor() if isinstance(image, MetaTensor) else image)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite voxels")
    if bool(low == high):
        raise ValueError(f"{name} is constant")


@dataclass
class _Pyramid:
    """Target and contexts at several voxel sizes."""

    image: Tensor
    own: Grid
    pairs: Sequence[tuple[Tensor, Grid]]
    start: Tensor | None
    spacing: float
    searched: Tensor = field(init=False)

    def align(self, mode: str) -> Alignment:
        count = len(self.pairs)
        self.searched = torch.zeros(count, dtype=torch.bool)
        every = torch.arange(count)
        if self.start is None:
            affine, kind = self.coarse()
        else:
            affine, kind = torch.as_tensor(self.start, dtype=torch.float64), None
        if self.start is not None:
            kind = self.better_kind(affine)
        half = self.level(2 * self.spacing, (kind,), affine)
        affine, score, cover = gauss_newton(half, affine, every, 20)
        level = self.level(self.spacing, (kind,), affine)
        displacement, folded = None, torch.zeros(count)
        if mode == "affine":
            affine, score, cover = gauss_newton(level, affine, every, 4)
            return Alignment(level.grid, affine, None, score.float(), cover.float(), folded, kind, self.searched)
        field_ = torch.zeros(count, 3, *half.grid.shape).to(half.target)
        field_ = demons(half, affine, field_, 30, FLUID_VOXELS, ELASTIC_VOXELS)
        field_ = 2 * separable.apply(field_, _upsampling(half.grid.shape, level.grid.shape, field_))
        field_ = demons(level, affine, field_, 12, FLUID_VOXELS, ELASTIC_VOXELS)
        moved = warp_features(
            level.contexts, voxel_maps(level, affine).to(field_), voxel_indices(level.grid.shape, field_) + field_
        )
        score = correlation(level.target, moved).mean(1)
        cover = ((level.target != 0) & (moved != 0)).flatten(1).float().sum(1) / (level.target != 0).sum()
        return Alignment(
            level.grid, affine, field_ * self.spacing, score.cpu(), cover.cpu(), folded_share(field_).cpu(), kind,
            self.searched,
        )  # fmt: skip

    def coarse(self) -> tuple[Tensor, str]:
        """Affine transforms (K, 4, 4) from the search, and the kind of image that agrees better."""
        grids = [self.own, *(grid for _, grid in self.pairs)]
        sizes = [float(grid.extent.prod()) ** (1 / 3) for grid in grids]
        spacing = max(min(sizes) / SEARCH_VOXELS, max(sizes) / (2 * SEARCH_VOXELS), self.spacing)
        level = self.level(spacing, KINDS, None)
        count = len(self.pairs)
        every = torch.arange(count)
        basis = rigid_basis()
        starts = torch.stack((torch.eye(4, dtype=torch.float64).repeat(count, 1, 1), self.centred()), 1)
        best, score = self.refine(level, starts, every, basis)
        if DEBUG: print('start', [round(float(x),2) for x in score])
        far = score < GOOD_START
        if far.any():
            which = every[far]
            self.searched = far
            frames = [grid.with_spacing(spacing) for _, grid in self.pairs]
            found, _ = search(level, frames, which, CANDIDATES)
            found, found_score = self.refine(level, found, which, basis)
            better = found_score > score[far]
            rows = which[better]
            if DEBUG: print('found', [round(float(x),2) for x in found_score])
            best[rows], score[rows] = found[better], found_score[better]
        moved = warp_features(
            level.contexts, voxel_maps(level, best).to(level.target), voxel_indices(level.grid.shape, level.target)
        )
        agreement = correlation(level.target, moved).unflatten(1, (len(KINDS), -1)).mean(2).median(0).values
        return best, KINDS[int(agreement.argmax())]

    def refine(self, level: Level, starts: Tensor, which: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """The best of several starts (B, S, 4, 4) after rigid and then affine registration: (B, 4, 4) and ranks (B,)."""
        count, candidates = starts.shape[:2]
        repeated = which.repeat_interleave(candidates)
        found, score, _ = gauss_newton(level, starts.flatten(0, 1), repeated, 15, basis)
        keep = score.unflatten(0, (count, candidates)).topk(min(2, candidates), dim=1).indices
        found = found.unflatten(0, (count, candidates)).gather(1, keep[..., None, None].expand(-1, -1, 4, 4))
        found, score, _ = gauss_newton(level, found.flatten(0, 1), which.repeat_interleave(keep.shape[1]), 10)
        score = score.unflatten(0, keep.shape)
        place = score.argmax(1)
        rows = torch.arange(count)
        return found.unflatten(0, keep.shape)[rows, place], score[rows, place]

    def better_kind(self, affine: Tensor) -> str:
        level = self.level(2 * self.spacing, KINDS, affine)
        moved = warp_features(
            level.contexts, voxel_maps(level, affine).to(level.target), voxel_indices(level.grid.shape, level.target)
        )
        agreement = correlation(level.target, moved).unflatten(1, (len(KINDS), -1)).mean(2).median(0).values
        return KINDS[int(agreement.argmax())]

    def centred(self) -> Tensor:
        """(K, 4, 4): own axes on own axes, middle on middle of the fields of view."""
        directions = self.own.affine[:3, :3] / self.own.spacing
        found = torch.eye(4, dtype=torch.float64).repeat(len(self.pairs), 1, 1)
        for matrix, (_, grid) in zip(found, self.pairs, strict=True):
            matrix[:3, :3] = (grid.affine[:3, :3] / grid.spacing) @ torch.linalg.inv(directions)
            matrix[:3, 3] = grid.centre - matrix[:3, :3] @ self.own.centre
        return found

    def level(self, spacing: float, kinds: Sequence[str], affine: Tensor | None) -> Level:
        """Features at a voxel size."""
        grid = self.own.with_spacing(spacing)
        frames = [own.with_spacing(spacing) for _, own in self.pairs]
        shape = np.max([frame.shape for frame in frames], axis=0).tolist()
        frames = [own.with_spacing(spacing, shape) for _, own in self.pairs]
        images, inside = zip(*(self.on(*pair, frame) for pair, frame in zip(self.pairs, frames, strict=True)), strict=True)
        windows = (SEARCH_WINDOW,) if len(kinds) > 1 else (WINDOW_VOXELS,)
        return Level(
            _channels(*self.on(self.image, self.own, grid), kinds, windows),
            grid,
            _channels(torch.cat(images), torch.cat(inside), kinds, windows),
            torch.stack([frame.sampling_matrix() for frame in frames]),
        )

    @staticmethod
    def on(image: Tensor, own: Grid, frame: Grid) -> tuple[Tensor, Tensor]:
        inside = resample(torch.ones_like(image[None]), own, frame)
        return resample(image[None], own, frame) / inside.clamp(min=0.5), inside


def _channels(image: Tensor, inside: Tensor, kinds: Sequence[str], windows: Sequence[float]) -> Tensor:
    return torch.cat([features(image, inside, kind, window) for kind in kinds for window in windows], 1)


def _upsampling(old: tuple[int, int, int], new: tuple[int, int, int], like: Tensor) -> list[Tensor]:
    """Linear, from voxels twice as large, held constant beyond the outer centres."""
    matrices = []
    for size, wanted in zip(old, new, strict=True):
        centre = ((torch.arange(wanted, dtype=torch.float64) + 0.5) / 2 - 0.5).clamp(0, size - 1)
        matrices.append((1 - (centre[:, None] - torch.arange(size)).abs()).clamp(min=0).to(like))
    return matrices
