"""Anatomies from nothing: a container, a layout, and structures from a pool of shapes.

After SynthICL (arXiv 2509.19711: container, layout, pool of shapes, morphological operations) and SynthMorph (Hoffmann
et al. 2021, IEEE TMI: label maps as the largest of smooth noise fields). No published code is used.

A *tissue map* numbers what an anatomy is made of; tissue 0 is air. Coordinates are those of
:func:`scripts.data.synthesis.seeded_draws.coordinates` for the cohort's grid: 0 in the middle, ±1 at the ends of its
longest axis. A map reaches ``MARGIN`` times as far, so that a turned and shifted view still finds tissue there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.data.synthesis.seeded_draws import Draws, coordinates

MARGIN = 1.4
"""How far a tissue map reaches, in half-widths of the grid."""

AIR = 0
"""Tissue number of what surrounds a body."""

_FINEST_VOXELS = 200_000  # of a tissue map: more detail is lost at the grids in use
_STRUCTURE_FRACTION = (0.012, 0.09)  # of the grid's volume
_REACH = 0.85  # structures are centred within this many half-widths of the grid, so that subjects keep them in view


class NoRoomError(ValueError):
    """A draw that shows too little of a label; another one may do."""


@dataclass(frozen=True)
class Anatomy:
    """What the subjects of a cohort share.

    Attributes:
        maps: tissue maps (H', W', D') of bytes; one for all subjects, or one each.
        centres: of each map, the voxel coordinates (3,) that the middle of the grid shows.
        voxels_per_unit: of each map, its voxels (3,) per unit of the grid's coordinates.
        labels: tissue numbers that make up each label, first of label 1.
        tissues: how many tissue numbers there are.
        alike: pairs (tissue, other): a tissue that has the contrast of another, as a part of it has.
        kinds: tissue number -> name of a kind (such as "grey"), where it is known.
        t1_means: tissue number -> mean in T1-weighted scans, 0 to 1, where it is known.
    """

    maps: Sequence[Tensor]
    centres: Sequence[Tensor]
    voxels_per_unit: Sequence[Tensor]
    labels: tuple[tuple[int, ...], ...]
    tissues: int
    alike: tuple[tuple[int, int], ...] = ()
    kinds: tuple[tuple[int, str], ...] = ()
    t1_means: tuple[tuple[int, float], ...] = ()


def draw_anatomy(draws: Draws, size: Sequence[int], num_labels: int) -> Anatomy:
    """Draw a procedural anatomy.

    Its ground is one of three: a body with a rim in air, a body of several regions in air, or regions without end, as
    in a crop of a scan. Structures lie on the ground; some are cut into parts that are labels of their own but look
    alike, and some labels are regions of the ground.

    Args:
        draws: decides everything.
        size: the cohort's grid (H, W, D).
        num_labels: how many labels, at least 1.

    Returns:
        An anatomy with one map.

    Raises:
        NoRoomError: a label was covered by a later structure, or found no room at all.
    """
    fineness = min(1.25, (_FINEST_VOXELS / math.prod(n * MARGIN for n in size)) ** (1 / 3))
    inner = [max(1, round(n * fineness)) for n in size]
    shape = tuple(max(4, round(n * MARGIN)) for n in inner)
    points = coordinates(shape, draws.device) * (max(shape) / max(inner))
    extent = torch.tensor(size, device=draws.device) / max(size)
    view = (points.abs() < _REACH * extent).all(-1)
    ground, regions = _draw_ground(draws, points, extent)
    builder = _Builder(draws, points, ground, view & (ground > AIR), 8 * math.prod(extent.tolist()))
    room = int(builder.view.sum())
    # a region of the ground that is neither the whole nor a scrap can be a label
    fitting = [r for r in regions if 0.02 < int((builder.map[view] == r).sum()) / max(room, 1) < 0.5]
    labels = [(r,) for r in fitting[: draws.integer(0, 2)]][: num_labels - 1]
    while len(labels) < num_labels:
        made = builder.add_structure(num_labels + 3)
        if num_labels - len(labels) >= 2 and draws.chance(0.3):
            labels += [(made,), (builder.cut(made),)]
        else:
            if draws.chance(0.15):
                builder.hollow(made)
            labels.append((made,))
    for _ in range(draws.integer(0, 4)):
        builder.add_structure(num_labels + 3)
    present = builder.map[view].flatten().long().bincount(minlength=builder.tissues)
    labels = tuple(labels[i] for i in draws.order(len(labels)))
    if min(int(present[label[0]]) for label in labels) == 0:
        raise NoRoomError("a structure is out of sight")
    middle = (torch.tensor(shape) - 1) / 2
    scale = torch.full((3,), max(inner) / 2)
    return Anatomy((builder.map,), (middle,), (scale,), labels, builder.tissues, tuple(builder.alike))


def _draw_ground(draws: Draws, points: Tensor, extent: Tensor) -> tuple[Tensor, list[int]]:
    """Tissue map of what structures lie on, and the numbers of its regions."""
    shape = points.shape[:3]
    kind = draws.integer(0, 2)
    regions = 1 if kind == 0 else draws.integer(2, 7)
    ground = _parcellation(draws, shape, regions) + 1
    if kind < 2:
        semi_axes = draws.uniform(0.72, 1.0, 3).to(draws.device) * extent
        uneven = 1 + draws.number(0.0, 0.08) * draws.smooth_noise(1, 5, shape)[0].clamp(-2, 2)
        depth = torch.linalg.vector_norm(points / semi_axes, dim=-1) * uneven
        if draws.chance(0.6):
            ground[depth > draws.number(0.85, 0.97)] = regions + 1  # a rim, as skull and skin are
        ground[depth > 1] = AIR
    return ground.to(torch.uint8), list(range(1, regions + 1))


def _parcellation(draws: Draws, shape: Sequence[int], regions: int) -> Tensor:
    """Numbers (H, W, D) of which of some smooth fields is the largest."""
    if regions == 1:
        return torch.zeros(tuple(shape), dtype=torch.long, device=draws.device)
    coarse, fine = draws.integer(3, 7), draws.integer(8, 14)
    fields = draws.smooth_noise(regions, coarse, shape) + draws.number(0, 0.3) * draws.smooth_noise(
        regions, fine, shape
    )
    return fields.max(0).indices


class _Builder:
    """A tissue map that structures are added to."""

    def __init__(self, draws: Draws, points: Tensor, ground: Tensor, view: Tensor, volume: float) -> None:
        self.draws, self.points, self.map, self.view = draws, points, ground, view
        self.free = view.clone()  # where structures may still lie
        self.voxel = (points[1, 1, 1] - points[0, 0, 0]).prod().item()
        self.volume = volume  # of the grid
        self.tissues = int(ground.max()) + 1
        self.alike: list[tuple[int, int]] = []

    def add_structure(self, among: int) -> int:
        """Put a shape where there is room; its tissue number."""
        draws = self.draws
        fraction = draws.log_number(*_STRUCTURE_FRACTION)
        fraction = min(fraction, 0.5 * self.view.sum().item() * self.voxel / self.volume / among)
        level = self._level(fraction * self.volume)
        allowed = self.free if self.free.sum() * self.voxel > fraction * self.volume else self.view
        level = level.masked_fill(~allowed, -math.inf).flatten()
        kept = max(1, min(round(fraction * self.volume / self.voxel), int(allowed.sum())))
        mask = torch.zeros(level.shape, dtype=torch.bool, device=level.device)
        mask[level.topk(kept).indices] = True
        mask = mask.view(self.map.shape) & allowed
        if draws.chance(0.2):
            mask = _opened(mask) if draws.chance(0.5) else _closed(mask) & allowed
        number = self._new_tissue()
        self.map[mask] = number
        self.free &= ~(_grown(mask) if draws.chance(0.7) else mask)  # others may touch it
        return number

    def cut(self, tissue: int) -> int:
        """Make a part of a structure, on one side of a plane, a tissue of its own that looks alike mostly."""
        where = self.points[self.map == tissue]
        number = self._new_tissue()
        if len(where) > 1:
            normal = self.draws.normal(3).to(where.device)
            if self.draws.chance(0.7):  # across its longest axis
                spread = torch.linalg.eigh(torch.cov(where.T))
                normal = spread.eigenvectors[:, -1] * (1 if normal[0] > 0 else -1)
            height = (self.points - where.mean(0)) @ normal
            inside = self.map == tissue
            border = torch.quantile(height[inside][:100_000], self.draws.number(0.3, 0.7))
            self.map[inside & (height > border)] = number
        if self.draws.chance(0.7):
            self.alike.append((number, tissue))
        return number

    def hollow(self, tissue: int) -> None:
        """Fill the inside of a structure with another tissue."""
        mask = self.map == tissue
        self.map[_shrunk(_shrunk(mask))] = self._new_tissue()

    def _new_tissue(self) -> int:
        self.tissues += 1
        return self.tissues - 1

    def _level(self, volume: float) -> Tensor:
        """Level field (H, W, D) of a random shape where there is room: the higher, the further inside."""
        draws = self.draws
        shape = (_ellipsoid, _tube, _shell, _blob, _sheet)[draws.integer(0, 4)]
        centre = self._centre()
        paired = draws.chance(0.15)  # left and right, as many structures are
        if paired and abs(centre[0]) < 0.2:
            centre = centre + torch.tensor([0.25, 0, 0], device=centre.device)
        turn = draws.rotation(180).to(centre.device)
        level = shape(draws, (self.points - centre) @ turn.T, volume / (1 + paired))
        return torch.maximum(level, level.flip(0)) if paired else level

    def _centre(self) -> Tensor:
        """Coordinates (3,) of a free voxel; of a few candidates the one with most free space around it."""
        places = (self.free if self.free.any() else self.view).nonzero()
        if len(places) == 0:
            return torch.zeros(3, device=self.points.device)
        block = max(2, min(self.free.shape) // 8)
        space = F.avg_pool3d(self.free[None].float(), block, ceil_mode=True)
        space = F.avg_pool3d(space, 3, stride=1, padding=1)[0]
        drawn = (self.draws.uniform(0, 1, 6) * len(places)).long().clamp(max=len(places) - 1)
        candidates = places[drawn.to(places.device)]
        best = candidates[space[tuple(candidates.T // block)].argmax()]
        return self.points[tuple(best)]


# --- shapes: level fields (H, W, D) at points (H, W, D, 3) around the origin, for a volume in units cubed


def _ellipsoid(draws: Draws, points: Tensor, volume: float) -> Tensor:
    return -torch.linalg.vector_norm(points / draws.uniform(0.5, 1.5, 3).to(points.device), dim=-1)


def _tube(draws: Draws, points: Tensor, volume: float) -> Tensor:
    """Capsule around a parabola; three to eight times as long as wide."""
    slenderness = draws.number(3, 8)
    half = 0.5 * slenderness * (4 * volume / math.pi / slenderness) ** (1 / 3)
    along = torch.linspace(-1, 1, 13)
    spine = torch.stack([along, draws.number(0, 0.8) * (along**2 - 0.5), torch.zeros(13)], dim=-1) * half
    return -torch.cdist(points.reshape(-1, 3), spine.to(points.device)).amin(-1).view(points.shape[:-1])


def _shell(draws: Draws, points: Tensor, volume: float) -> Tensor:
    """Piece of a hollow ellipsoid, from a bowl to the closed form, about a third of its radius thick."""
    open_from = draws.number(0, 1.5)  # in radii along the first axis; from 1 on it is closed
    radius = (volume / (4 * math.pi * 0.33 * (1 + min(open_from, 1)) / 2)) ** (1 / 3)
    distance = torch.linalg.vector_norm(points / draws.uniform(0.8, 1.25, 3).to(points.device), dim=-1)
    return -(distance - radius).abs() - (points[..., 0] - open_from * radius).clamp(min=0)


def _blob(draws: Draws, points: Tensor, volume: float) -> Tensor:
    """Ball whose radius varies with smooth noise."""
    radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
    noise = draws.smooth_noise(1, draws.integer(5, 9), points.shape[:3])[0]
    return -torch.linalg.vector_norm(points, dim=-1) / radius + 0.6 * noise


def _sheet(draws: Draws, points: Tensor, volume: float) -> Tensor:
    """Folded sheet, as cortex is: a plane displaced by smooth noise, about four times as wide as thick."""
    width = (volume * 4 * 4 / math.pi) ** (1 / 3)
    noise = draws.smooth_noise(1, draws.integer(5, 8), points.shape[:3])[0]
    height = (points[..., 0] - draws.number(0.1, 0.3) * width * noise).abs()
    beyond = (torch.linalg.vector_norm(points[..., 1:], dim=-1) - width / 2).clamp(min=0)
    return -height - 2 * beyond


# --- morphology with a cube of 3³ voxels


def _grown(mask: Tensor) -> Tensor:
    return F.max_pool3d(mask[None].float(), 3, stride=1, padding=1)[0] > 0


def _shrunk(mask: Tensor) -> Tensor:
    return ~_grown(~mask)


def _opened(mask: Tensor) -> Tensor:
    opened = _grown(_shrunk(mask))
    return opened if opened.sum() > 0.5 * mask.sum() else mask


def _closed(mask: Tensor) -> Tensor:
    return _shrunk(_grown(mask))
