"""Subjects of a cohort: one anatomy in another place, turn, size and form each.

Within a cohort the subjects are put so far apart that where a label lies in one of them tells little about where it
lies in another: averaging the labels of the others, the first thing that a network learns otherwise, then fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.data.synthesis.anatomy import AIR, Anatomy, NoRoomError
from scripts.data.synthesis.seeded_draws import Draws

_ROTATION_DEGREES = 30.0
_LOG_SCALE = 0.25
_SHIFT = 0.35  # of the half-width of each axis
_DISPLACEMENT = ((4, 0.08), (8, 0.02))  # control points per axis, standard deviation in half-widths of the grid
_POINTS = 10  # of the lattice that both are added up on
_STRONG, _WEAK = (0.6, 1.0), (0.05, 0.4)
_WEAK_PROB = 0.25
_CUT_OFF_PROB = 0.35  # cohorts whose subjects end before the grid does, as padded scans do
_CUT_OFF = 0.2  # of the half-width, at most on each side
_LESION_RADIUS = (0.12, 0.35)
_LESION_PROB = 0.75

MAX_LABELS = 15
"""Most labels of a cohort: their counts share 64 bits, and more would not fit into the view with a sensible volume."""


def draw_strength(draws: Draws) -> float:
    """How far the subjects of a cohort are put apart: 1 for the most, little in a quarter of the cohorts."""
    return draws.number(*(_WEAK if draws.chance(_WEAK_PROB) else _STRONG))


def draw_shape(draws: Draws) -> dict[str, bool]:
    """What the views of a cohort's subjects have in common."""
    return {
        "mirrored": draws.chance(0.5),
        "cut_off": draws.chance(_CUT_OFF_PROB),
        "turned_edges": draws.chance(0.5),
    }


def show_subject(
    draws: Draws,
    anatomy: Anatomy,
    subject: int,
    size: Sequence[int],
    supersampling: int,
    strength: float,
    shape: dict[str, bool],
    least: int,
) -> tuple[Tensor, Tensor]:
    """One subject of an anatomy.

    A draw that takes a label out of view is weakened until it does not.

    Args:
        draws: of the subject.
        anatomy: what the cohort shares.
        subject: its number.
        size: the grid (H, W, D).
        supersampling: points per voxel along each axis.
        strength: of the pose; 0 leaves the anatomy as it is.
        shape: of :func:`draw_shape`.
        least: voxels of the grid that every label has at least.

    Returns:
        Tissue numbers (sH, sW, sD) of bytes, and the tissues' part of the grid (sH, sW, sD), bool: elsewhere the
        scan has ended.

    Raises:
        NoRoomError: the anatomy has too few voxels of a label, whatever the pose.
    """
    index = subject % len(anatomy.maps)
    map_, device = anatomy.maps[index], draws.device
    centre, scale = anatomy.centres[index], anatomy.voxels_per_unit[index]
    extent = torch.tensor(size) / max(size)
    turn = draws.rotation(_ROTATION_DEGREES) - torch.eye(3)
    stretch = draws.uniform(-_LOG_SCALE, _LOG_SCALE, 1) + draws.uniform(-_LOG_SCALE, _LOG_SCALE, 3) / 3
    shift = draws.uniform(-_SHIFT, _SHIFT, 3) * extent
    fine = [n * supersampling for n in size]
    axes = [axis.to(device) for axis in fine_axes(fine)]
    lattice = sum(std * draws.smooth_noise(3, count, (_POINTS,) * 3) for count, std in _DISPLACEMENT)
    displacement = F.interpolate(lattice[None], size=fine, mode="trilinear", align_corners=True)[0]
    ends = (1 - draws.uniform(0, _CUT_OFF, 2, 3)) * extent
    sign = torch.tensor([-1.0 if shape["mirrored"] else 1.0, 1.0, 1.0])
    label_of = label_table(anatomy.labels).to(device)
    flat, strides = map_.flatten(), (map_.shape[1] * map_.shape[2], map_.shape[2], 1)
    while True:
        matrix = (torch.eye(3) + strength * turn) * (strength * stretch).exp()
        inside = torch.ones(fine, dtype=torch.bool, device=device)
        voxel = torch.zeros(fine, dtype=torch.long, device=device)
        for axis in range(3):
            # a sum of three vectors along the axes: much cheaper than a matrix product for every point
            place = sum(float(m) * a for m, a in zip(matrix[axis], axes, strict=True)) + strength * float(shift[axis])
            if shape["cut_off"]:
                edge = place if shape["turned_edges"] else axes[axis]
                inside &= (edge < float(ends[0, axis])) & (edge > -float(ends[1, axis]))
            place = torch.add(place, displacement[axis], alpha=strength).mul_(float(scale[axis] * sign[axis]))
            place = place.add_(float(centre[axis])).round_().clamp_(0, map_.shape[axis] - 1)
            voxel.add_(place.long(), alpha=strides[axis])
        seen = flat[voxel]
        if shape["cut_off"]:
            seen.masked_fill_(~inside, AIR)
        counts = label_of[seen[::2, ::2, ::2].int()].flatten().bincount(minlength=len(anatomy.labels) + 1)[1:]
        if counts.min() * 8 >= least * supersampling**3:
            return seen, inside
        if strength < 1e-3:
            raise NoRoomError("a label is too small to be seen")
        strength = strength * 0.7 if strength > 0.1 else 0.0
        ends = torch.maximum(ends, (1 - strength) * extent)


def fine_axes(size: Sequence[int]) -> list[Tensor]:
    """The three axes of :func:`scripts.data.synthesis.seeded_draws.coordinates`, each to broadcast along its own."""
    full = [(2 * torch.arange(n) + 1 - n) / max(size) for n in size]
    return [full[0][:, None, None], full[1][:, None], full[2]]


def label_table(labels: Sequence[Sequence[int]]) -> Tensor:
    """Label number (256,) of every tissue number, 0 for none; ``labels`` has the tissues of label 1 first."""
    table = torch.zeros(256, dtype=torch.uint8)
    for number, tissues in enumerate(labels, start=1):
        table[list(tissues)] = number
    return table


def add_lesion(draws: Draws, seen: Tensor, tissue: int) -> Tensor:
    """Tissue numbers (sH, sW, sD) with a lesion somewhere in the body, if this subject has one."""
    if not draws.chance(_LESION_PROB):
        return seen
    radius = draws.log_number(*_LESION_RADIUS)
    body = (seen != AIR).nonzero()
    if len(body) == 0:
        return seen
    middle = body[min(int(draws.number() * len(body)), len(body) - 1)].tolist()
    semi_axes = (draws.uniform(0.7, 1.4, 3) * radius).tolist()
    axes = [axis.to(seen.device) for axis in fine_axes(seen.shape)]
    squares = [((axis - axis.flatten()[m]) / r) ** 2 for axis, m, r in zip(axes, middle, semi_axes, strict=True)]
    uneven = 1 + 0.4 * draws.smooth_noise(1, math.ceil(3 / radius), seen.shape)[0]
    lesion = sum(squares) < uneven
    return torch.where(lesion & (seen != AIR), torch.full_like(seen, tissue), seen)


def pool_labels(seen: Tensor, table: Tensor, supersampling: int, count: int) -> Tensor:
    """Label number (H, W, D) of bytes that most of each voxel's points have.

    Args:
        seen: tissue numbers (sH, sW, sD).
        table: of :func:`label_table`, on the same device.
        supersampling: s, at most 2: the counts of up to 8 points are added up in four bits for each label.
        count: labels, at most ``MAX_LABELS``.
    """
    if supersampling == 1:
        return table[seen.int()]
    counted = torch.bitwise_left_shift(torch.ones_like(table, dtype=torch.long), 4 * table.long())[seen.int()]
    h, w, d = (n // supersampling for n in seen.shape)
    counted = counted.view(h, supersampling, w, supersampling, d, supersampling).sum((1, 3, 5))
    most, label = counted & 15, torch.zeros(counted.shape, dtype=torch.uint8, device=seen.device)
    for number in range(1, count + 1):
        share = (counted >> 4 * number) & 15
        label.masked_fill_(share > most, number)
        most = torch.maximum(most, share)
    return label
