"""Affine registration by Gauss-Newton, all pairs at once.

Inverse compositional (Baker & Matthews 2004, "Lucas-Kanade 20 years on"): the derivatives are the target's, so they
are taken once, and an iteration is one warp and one small linear system per pair. Residuals are weighted after Huber.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.registration.grids import Grid, sample
from scripts.registration.similarity import correlation, gradient

HUBER = 1.0
"""Residuals above are weighted down, in local standard deviations."""
STEP_LIMIT = 0.15
"""Largest change of any entry in one iteration; coordinates are halves of the target's size."""

SETTLED_VOXELS = 0.02
"""A pair is left as it is once its corners move by less in an iteration, in voxels."""

STRETCH_LIMIT = 1.6
"""Heads and their parts differ by less, in any direction; transforms beyond are never taken."""


@dataclass(frozen=True)
class Level:
    """Features of the target and the contexts at one voxel size.

    Attributes:
        target: (1, C, h, w, d).
        grid: of the target.
        contexts: (K, C, ...).
        matrices: (K, 4, 4) float64, world to ``grid_sample`` coordinates of each context.
    """

    target: Tensor
    grid: Grid
    contexts: Tensor
    matrices: Tensor


def rigid_basis() -> Tensor:
    """Shifts, rotations and one scale as changes of the 12 affine entries, (12, 7)."""
    basis = torch.zeros(7, 3, 4, dtype=torch.float64)
    for axis in range(3):
        basis[axis, axis, 3] = 1
        basis[6, axis, axis] = 1
    for number, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        basis[3 + number, a, b], basis[3 + number, b, a] = -1, 1
    return basis.reshape(7, 12).T


def gauss_newton(
    level: Level, start: Tensor, which: Tensor, iterations: int, basis: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Refines transforms.

    Args:
        level: features.
        start: (B, 4, 4) float64, world of the target to world of the context.
        which: (B,) numbers of the contexts.
        iterations: at most so many.
        basis: (12, P) directions in which the transforms may change; None for all twelve.

    Returns:
        The best transforms seen (B, 4, 4), their correlation (B,) and the share (B,) of the target that they cover.
    """
    grid, target = level.grid, level.target
    device = target.device
    radius = float(grid.extent.max()) / 2
    to_world = torch.eye(4, dtype=torch.float64)
    to_world[:3, :3] *= radius
    to_world[:3, 3] = grid.centre
    points = grid.points(target) / radius
    points = torch.cat((points, torch.ones_like(points[:, :1])), 1)

    channels = target.shape[1]
    axes_inverse = torch.linalg.inv(grid.affine[:3, :3] / radius).to(target)
    slopes = gradient(target[0, :, None]).flatten(2).transpose(1, 2) @ axes_inverse  # C, N, 3
    jacobian = (slopes[..., None] * points[None, :, None]).flatten(2)  # C, N, 12
    if basis is not None:
        jacobian = jacobian @ basis.to(jacobian)
    parameters = jacobian.shape[-1]
    rows, columns = torch.triu_indices(parameters, parameters, device=device)
    products = jacobian[..., rows] * jacobian[..., columns]
    known = (target != 0).flatten(2)

    moving = level.contexts[which] if len(which) != len(level.contexts) else level.contexts
    matrices = level.matrices[which]
    back = torch.linalg.inv(matrices)
    from_world = torch.linalg.inv(to_world)
    settled = SETTLED_VOXELS * float(grid.spacing.min()) / radius
    maps = matrices @ start @ to_world
    best, best_score = maps.clone(), torch.full((len(maps),), -2.0, dtype=torch.float64)
    best_cover = torch.zeros(len(maps), dtype=torch.float64)
    rows_host, columns_host = rows.cpu(), columns.cpu()
    active = torch.arange(len(maps))
    for iteration in range(iterations + 1):
        coordinates = points @ maps[active, :3].transpose(1, 2).to(points)
        moved = sample(moving, coordinates, grid.shape)
        both = known & (moved != 0).flatten(2)
        score = correlation(target, moved).double().mean(1).cpu()
        cover = (both.any(1).sum(1) / known.any(1).sum().clamp(min=1)).double().cpu()
        rank = torch.where(plausible(back[active] @ maps[active] @ from_world), score * overlap_worth(cover), -1.5)
        better = rank > best_score[active]
        now = active[better]
        best[now], best_score[now], best_cover[now] = maps[now], rank[better], cover[better]
        if iteration == iterations:
            break
        residual = moved.flatten(2) - target.flatten(2)
        weight = both * (HUBER / residual.abs().clamp(min=HUBER))
        hessian = torch.zeros(len(active), parameters, parameters, dtype=torch.float64)
        upper = sum(weight[:, c] @ products[c] for c in range(channels)).double().cpu()
        hessian[:, rows_host, columns_host] = upper
        hessian[:, columns_host, rows_host] = upper
        force = sum((weight[:, c] * residual[:, c]) @ jacobian[c] for c in range(channels)).double().cpu()
        diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
        floor = 1e-6 * (1 + hessian.diagonal(dim1=1, dim2=2).amax(1))[:, None, None]
        hessian = hessian + 1e-2 * diagonal + floor * torch.eye(parameters, dtype=torch.float64)
        step = torch.linalg.solve(hessian, force)
        if basis is not None:
            step = step @ basis.T
        longest = step.abs().amax(1, keepdim=True)
        step = step * (STEP_LIMIT / longest.clamp(min=STEP_LIMIT))
        change = torch.eye(4, dtype=torch.float64).repeat(len(active), 1, 1)
        change[:, :3] += step.unflatten(1, (3, 4))
        maps[active] = maps[active] @ torch.linalg.inv(change)
        going_on = longest[:, 0] > settled
        if not going_on.any():
            break
        if not going_on.all():
            active, moving = active[going_on], moving[going_on]
    found = back @ best @ from_world
    return found, best_score, best_cover


def plausible(affine: Tensor) -> Tensor:
    """Which of some transforms (K, 4, 4) stretch by less than :data:`STRETCH_LIMIT` in every direction, (K,) bool."""
    stretch = torch.linalg.svdvals(affine[:, :3, :3])
    return (stretch.amin(1) > 1 / STRETCH_LIMIT) & (stretch.amax(1) < STRETCH_LIMIT)


def overlap_worth(cover: Tensor, least: float = 1 / 3) -> Tensor:
    """Factor for a correlation over a small overlap: chance agrees more easily in few voxels."""
    return (cover / least).clamp(0, 1).sqrt()
