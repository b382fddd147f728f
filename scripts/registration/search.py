"""Coarse search: every shift up to half the field of view, for rotations about all axes, on a few thousand voxels.

All shifts of one rotation are scored by correlation in the Fourier domain, inside the overlap only (Padfield 2012,
"Masked object registration in the Fourier domain"). Only the target is turned, so the contexts are transformed once.
"""

from __future__ import annotations

import itertools

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from scripts.registration.affine import Level, overlap_worth
from scripts.registration.grids import Grid, sample

STEP_DEGREES = 20.0
REACH_DEGREES = 45.0
"""Rotation vectors on a grid of this step, up to this length."""


def rotations() -> Tensor:
    """Rotation matrices (R, 3, 3) float64; the first is the identity."""
    reach = int(REACH_DEGREES // STEP_DEGREES)
    steps = itertools.product(range(-reach, reach + 1), repeat=3)
    vectors = torch.tensor(sorted(steps, key=lambda v: (sum(a * a for a in v), v)), dtype=torch.float64)
    vectors = vectors[vectors.norm(dim=1) * STEP_DEGREES <= REACH_DEGREES]
    return rotation_matrices(torch.deg2rad(vectors * STEP_DEGREES))


def rotation_matrices(vectors: Tensor) -> Tensor:
    """Rotation vectors (R, 3) in radians as matrices (R, 3, 3)."""
    cross = torch.zeros(len(vectors), 3, 3, dtype=vectors.dtype)
    for a, b, c in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cross[:, c, b], cross[:, b, c] = vectors[:, a], -vectors[:, a]
    return torch.linalg.matrix_exp(cross)


def search(level: Level, frames: list[Grid], which: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Starts for the affine registration; turned and shifted from where the axes of both grids match.

    Args:
        level: features of target and contexts, all with the same isotropic voxels.
        frames: grids of the contexts.
        which: (B,) numbers of the contexts to search for.
        candidates: how many starts for each.

    Returns:
        Transforms (B, candidates, 4, 4) from the target's world to the context's, and their scores (B, candidates).
    """
    target, grid = level.target, level.grid
    contexts = level.contexts[which]
    boxes = [tuple(target.shape[2:]), tuple(contexts.shape[2:])]
    padded = [next_fast_len(max(a, b) + min(a, b) // 2, real=True) for a, b in zip(*boxes, strict=True)]
    allowed = torch.ones(padded, dtype=torch.bool)
    for axis, (a, b, size) in enumerate(zip(*boxes, padded, strict=True)):
        shift = torch.arange(size)
        shift = torch.where(shift > b - min(a, b) // 2, shift - size, shift)
        inside = torch.minimum(torch.tensor(b), shift + a) - torch.clamp(shift, min=0)
        allowed &= (inside >= min(a, b) // 2).view([-1 if i == axis else 1 for i in range(3)])
    allowed = allowed.to(target.device)

    def transform(volume: Tensor) -> Tensor:
        return torch.fft.rfftn(volume, s=padded, dim=(-3, -2, -1))

    def back(volume: Tensor) -> Tensor:
        return torch.fft.irfftn(volume, s=padded, dim=(-3, -2, -1))

    moving = transform(contexts)
    moving_known = (contexts != 0).any(1, keepdim=True).to(target)
    moving_power = transform(contexts.square().sum(1))
    moving_mask = transform(moving_known[:, 0])
    smaller = torch.minimum((target != 0).any(1).sum(), moving_known.flatten(1).sum(1).min()).to(target)

    turns = rotations()
    axes = grid.affine[:3, :3]
    scores, places = [], []
    points, matrix = grid.points(target), grid.sampling_matrix()[:3]
    middle = (matrix[:, :3] @ grid.centre + matrix[:, 3]).to(points)
    for turn in turns:
        back_turn = matrix[:, :3] @ axes @ turn.T @ torch.linalg.inv(axes)
        look = points @ back_turn.T.to(points) + middle
        turned = sample(target, look[None], grid.shape)
        known = (turned != 0).any(1).to(target)
        still = transform(turned).conj()
        numerator = back((still * moving).sum(1))
        target_power = back(transform(turned.square().sum(1)).conj() * moving_mask)
        context_power = back(transform(known).conj() * moving_power)
        overlap = back(transform(known).conj() * moving_mask)
        norm = (target_power.clamp(min=0) * context_power.clamp(min=0)).sqrt()
        score = numerator / norm.clamp(min=1e-3 * float(smaller))
        score = torch.where(allowed, score * overlap_worth(overlap / smaller, 0.5), -2.0)
        best, place = score.flatten(1).max(1)
        scores.append(best)
        places.append(place)
    scores, order = torch.stack(scores, 1).topk(candidates, dim=1)
    places = torch.stack(places, 1).gather(1, order).cpu()
    starts = torch.eye(4, dtype=torch.float64).repeat(len(which), candidates, 1, 1)
    centre = torch.tensor([(size - 1) / 2 for size in boxes[0]], dtype=torch.float64)
    limit = torch.tensor([b - min(a, b) // 2 for a, b in zip(*boxes, strict=True)], dtype=torch.float64)
    for row, candidate in itertools.product(range(len(which)), range(candidates)):
        shift = torch.tensor(_unravel(int(places[row, candidate]), padded), dtype=torch.float64)
        shift = torch.where(shift > limit, shift - torch.tensor(padded, dtype=torch.float64), shift)
        frame = frames[int(which[row])].affine
        turn = frame[:3, :3] @ turns[int(order[row, candidate])] @ torch.linalg.inv(axes)
        starts[row, candidate, :3, :3] = turn
        starts[row, candidate, :3, 3] = frame[:3, :3] @ (centre + shift) + frame[:3, 3] - turn @ grid.centre
    return starts, scores.double().cpu()


def _unravel(place: int, shape: list[int]) -> list[int]:
    index = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return index[::-1]
