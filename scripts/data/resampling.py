"""Between a scan's own voxels and an isotropic grid along its axes, without copies of the scan.

The grid's axes are the scan's, put in RAS order, so that trilinear interpolation is linear interpolation along one
axis after the other. Everything is computed slab by slab in RAS order and from rounded voxel sizes: memory is that of
the grid, the result and one slab, and a scan whose file stores its axes in another order or direction gives the same
numbers, bit for bit. (MONAI's ``Spacing`` holds several float64 copies of the scan and of every score, and rounds
differently for each orientation.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

SLAB_VOXELS = 2**21
"""Voxels that are interpolated at once, about 8 MiB of float32."""

_TIE_TURN_RAD = 1e-3
_SIZE_BITS = 17
_GRID_TIE = 2e-3
_EDGE_TIE = 1e-2


def closest_axes(affine: np.ndarray) -> np.ndarray:
    """``nibabel.io_orientation`` that does not depend on how the axes are stored, even at 45°.

    Where two axes are equally near to two directions, nibabel takes them in the order of the file. The affine is
    turned by a little in space first, which breaks such ties alike for all orders.

    Args:
        affine: ``(4, 4)``, voxel to mm.

    Returns:
        ``(3, 2)``: for each axis of the array, the number of its RAS axis, and 1 or -1 for its direction.
    """
    a, b, c = _TIE_TURN_RAD * np.array([1.0, 0.7, 0.4])
    turn = np.array([[1.0, -c, b], [c, 1.0, -a], [-b, a, 1.0]])
    return nib.io_orientation(nib.affines.from_matvec(turn @ np.asarray(affine)[:3, :3]))


@dataclass(frozen=True)
class GridAxis:
    """One axis (R, A or S) of a grid in a scan: grid voxel ``i`` lies at scan voxel ``start + (i - before) * step``.

    Attributes:
        axis: number of the scan's array axis.
        flipped: the array runs the other way; ``start`` counts in RAS direction.
        size: voxels of the scan.
        start: first scan voxel of the box on the grid.
        step: scan voxels per grid voxel.
        before: grid voxels of padding ahead of ``start``.
    """

    axis: int
    flipped: bool
    size: int
    start: int
    step: float
    before: int = 0

    def index(self, ras_index: Tensor) -> Tensor:
        """Index into the array of a scan voxel counted in RAS direction."""
        return self.size - 1 - ras_index if self.flipped else ras_index


def grid_axes(
    affine: np.ndarray, shape: Sequence[int], box: Sequence[tuple[int, int]], spacing_mm: float
) -> tuple[list[GridAxis], list[int]]:
    """Lay an isotropic grid over a box of a scan, its first voxel's centre on the box's first.

    Args:
        affine: ``(4, 4)``, voxel to mm.
        shape: of the scan.
        box: first and one past the last voxel along each array axis.
        spacing_mm: edge of a grid voxel.

    Returns:
        The axes R, A, S, and the voxels of the grid along them: up to the one nearest to the box's last.
    """
    orientation = closest_axes(affine)
    zooms = nib.affines.voxel_sizes(affine)
    axes, counts = [], []
    for ras in range(3):
        (axis,) = np.flatnonzero(orientation[:, 0] == ras)
        flipped = bool(orientation[axis, 1] < 0)
        low, high = box[axis]
        step = _without_noise(spacing_mm) / _without_noise(zooms[axis])
        start = shape[axis] - high if flipped else low
        axes.append(GridAxis(int(axis), flipped, int(shape[axis]), int(start), step))
        counts.append(int(np.ceil((high - low - 1) / step - 0.5 - _GRID_TIE)) + 1)
    return axes, counts


def grid_affine(affine: np.ndarray, axes: Sequence[GridAxis]) -> np.ndarray:
    """``(4, 4)``, grid voxel to mm, from the scan's affine."""
    to_scan = np.zeros((4, 4))
    to_scan[3, 3] = 1
    for column, a in enumerate(axes):
        first = a.start - a.before * a.step
        to_scan[a.axis, column] = -a.step if a.flipped else a.step
        to_scan[a.axis, 3] = a.size - 1 - first if a.flipped else first
    return np.asarray(affine, dtype=float) @ to_scan


def sample_linear(scan: Tensor, axes: Sequence[GridAxis], counts: Sequence[int]) -> Tensor:
    """Trilinear values of a scan on an unpadded grid.

    Args:
        scan: ``(H, W, D)`` as stored.
        axes: R, A, S.
        counts: grid voxels along them.

    Returns:
        ``(*counts)`` float32.
    """
    order = [a.axis for a in axes]
    sides = []
    for a, count in zip(axes, counts, strict=True):
        low, high, weight = _neighbours(_forward(a, count), a.size)
        low, high = a.index(low), a.index(high)
        first, last = (int(bound) for bound in torch.cat([low, high]).aminmax())
        scan = scan.narrow(a.axis, first, last + 1 - first)  # a crop is not to cost what the scan does
        sides.append((low - first, high - first, weight))
    right, anterior, superior = sides
    result = torch.empty(tuple(counts))
    for part in _slabs(counts[2], scan.numel() // scan.shape[order[2]]):
        slab = [scan.index_select(order[2], side[part]).permute(order).contiguous().float() for side in superior[:2]]
        slab = torch.lerp(*slab, superior[2][part])
        for dim, side in ((1, anterior), (0, right)):
            slab = _lerp(slab, dim, *side)
        result[..., part] = slab
    return result


def sample_labels(labels: Tensor, axes: Sequence[GridAxis], counts: Sequence[int]) -> Tensor:
    """The label with the largest share of each grid voxel's trilinear neighbourhood.

    The same as the argmax over the interpolated one-hot maps of all labels, at a cost that does not depend on their
    number. It keeps borders better than the nearest neighbour does: brought back to 1 mm voxels, label maps of a
    1 mm grid at an offset agree with the original in a Dice of about 0.98 instead of 0.94.

    Args:
        labels: ``(H, W, D)``, label numbers, as stored.
        axes: R, A, S.
        counts: grid voxels along them.

    Returns:
        ``(*counts)``, label numbers in the type of ``labels``. Equal shares go to the lower voxel's label.
    """
    order = [a.axis for a in axes]
    sides = [_neighbours(_forward(a, n), a.size) for a, n in zip(axes, counts, strict=True)]
    ras = labels.permute(order)
    corners = [
        ras[np.ix_(*[a.index(side[high]).numpy() for a, side, high in zip(axes, sides, which, strict=True)])]
        for which in itertools.product((0, 1), repeat=3)
    ]
    result = corners[0].clone()
    mixed = torch.zeros(tuple(counts), dtype=torch.bool)
    for corner in corners[1:]:
        mixed |= corner != corners[0]
    places = mixed.nonzero(as_tuple=True)
    around = torch.stack([corner[places] for corner in corners])
    weights = torch.ones(around.shape)
    for number, which in enumerate(itertools.product((0, 1), repeat=3)):
        for side, place, high in zip(sides, places, which, strict=True):
            weights[number] *= side[2][place] if high else 1 - side[2][place]
    shares = torch.stack([(weights * (around == corner)).sum(0) for corner in around])
    result[places] = around.gather(0, shares.argmax(0, keepdim=True))[0]
    return result


def spline_coefficients(grid_map: Tensor) -> Tensor:
    """Coefficients of the cubic B-splines through a map ``(h, w, d)``, mirrored at its ends, for :class:`ScanSlabs`.

    The same as SciPy's ``spline_filter``, but as one product with a small matrix per axis, ten times as fast.
    """
    for dim, size in enumerate(grid_map.shape):
        splines = _cubic(torch.arange(size, dtype=torch.float64), size)
        grid_map = torch.tensordot(grid_map.float(), torch.linalg.inv(splines).float(), ([dim], [1])).movedim(-1, dim)
    return grid_map.contiguous()


class ScanSlabs:
    """Brings maps on a grid to the scan's own voxels, slab by slab.

    Voxels outside of the grid are in no slab. Each axis is one product with a matrix, which is several times as fast
    as picking neighbours.

    Args:
        axes: the grid in the scan.
        counts: grid voxels along R, A and S, padding included.
        order: of the B-splines: 1 interpolates maps trilinearly; 3 makes cubic splines of their
            :func:`spline_coefficients`, which blur less (Unser, IEEE Signal Processing Magazine 1999).
    """

    def __init__(self, axes: Sequence[GridAxis], counts: Sequence[int], order: int = 1) -> None:
        matrix = {1: _linear, 3: _cubic}[order]
        self.axes = list(axes)
        self._inside: list[slice] = []
        self._weights: list[Tensor] = []  # (scan voxels inside, grid voxels)
        for a, count in zip(axes, counts, strict=True):
            place = (torch.arange(a.size, dtype=torch.float64) - a.start) / a.step + a.before
            inside = ((place >= -0.5 - _EDGE_TIE) & (place <= count - 0.5 + _EDGE_TIE)).nonzero().flatten()
            first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            self._inside.append(slice(first, last))
            self._weights.append(matrix(place[first:last], count).float())

    @property
    def shape(self) -> tuple[int, ...]:
        """``(H, W, D)`` of the scan."""
        return tuple(a.size for a in sorted(self.axes, key=lambda a: a.axis))

    def __iter__(self) -> Iterator[slice]:
        """Parts of the S axis, to be handed to :meth:`interpolate` and :meth:`put`."""
        sizes = [part.stop - part.start for part in self._inside]
        return _slabs(sizes[2], sizes[0] * sizes[1])

    def shape_of(self, part: slice) -> tuple[int, int, int]:
        """Shape of a slab, in RAS order."""
        return tuple(inside.stop - inside.start for inside in (*self._inside[:2], part))

    def region(self, needed: Tensor, part: slice) -> tuple[slice, slice, slice] | None:
        """The part of a slab, in RAS order, that hangs on certain voxels of the grid.

        Args:
            needed: ``(h, w, d)`` boolean; all voxels of a spline that are above a value, say: splines never exceed
                their coefficients.
            part: of the S axis.

        Returns:
            Slices of :meth:`interpolate`'s result; None if no voxel of the slab does.
        """
        flat = (needed & (self._weights[2][part] > 0).any(0)).any(2)
        sides = []
        for weights, hit in zip(self._weights, (flat.any(1), flat.any(0)), strict=False):
            reached = (weights[:, hit] > 0).any(1).nonzero()
            if not len(reached):
                return None
            sides.append(slice(int(reached[0]), int(reached[-1]) + 1))
        return sides[0], sides[1], slice(None)

    def overlap(self, other: ScanSlabs, part: slice) -> tuple[list[slice], list[slice]] | None:
        """Where another grid in the same scan lies in a slab.

        Args:
            other: the other grid.
            part: of the S axis of this one.

        Returns:
            Slices of this grid's slab in RAS order, and of the scan voxels inside the other grid; None if it is
            elsewhere.
        """
        bottom = self._inside[2].start
        slab = (*self._inside[:2], slice(bottom + part.start, bottom + part.stop))
        mine, its = [], []
        for here, there in zip(slab, other._inside, strict=True):
            low, high = max(here.start, there.start), min(here.stop, there.stop)
            if low >= high:
                return None
            mine.append(slice(low - here.start, high - here.start))
            its.append(slice(low - there.start, high - there.start))
        return mine, its

    def interpolate(self, grid_map: Tensor, part: slice, region: Sequence[slice] = (slice(None),) * 3) -> Tensor:
        """Values of one map ``(h, w, d)``, or of its spline, on a slab of the scan's voxels or a region of it.

        Returns:
            In RAS order.
        """
        right, anterior, superior = (w[inside] for w, inside in zip(self._weights, (*region[:2], part), strict=True))
        slab = anterior @ (grid_map.float() @ superior.T)
        return torch.tensordot(right, slab, 1)

    def put(self, slab: Tensor, part: slice, scan: np.ndarray) -> None:
        """Write a slab into an array ``(H, W, D)`` of the scan's voxels."""
        view = scan.transpose([a.axis for a in self.axes])
        view = view[tuple(slice(None, None, -1 if a.flipped else 1) for a in self.axes)]
        view[*self._inside[:2], self._inside[2]][..., part] = slab.numpy()


def whole_scan(axes: Sequence[GridAxis]) -> ScanSlabs:
    """All voxels of a scan, of which ``axes`` are a grid, in slabs."""
    own = [GridAxis(a.axis, a.flipped, a.size, 0, 1.0) for a in axes]
    return ScanSlabs(own, [a.size for a in axes])


def _forward(axis: GridAxis, count: int) -> Tensor:
    return axis.start + torch.arange(count, dtype=torch.float64) * axis.step


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper neighbour of places along an axis, and the upper one's weight; beyond the ends, the end."""
    places = places.clamp(0, size - 1)
    low = places.floor().long().clamp(max=max(size - 2, 0))
    return low, (low + 1).clamp(max=size - 1), (places - low).float()


def _linear(places: Tensor, size: int) -> Tensor:
    """Weights ``(places, size)`` of linear interpolation; beyond the ends, the end's value."""
    low, high, weight = _neighbours(places, size)
    weights, rows = torch.zeros(len(places), size, dtype=torch.float64), torch.arange(len(places))
    weights[rows, low] += 1 - weight.double()
    weights[rows, high] += weight.double()
    return weights


def _cubic(places: Tensor, size: int) -> Tensor:
    """Weights ``(places, size)`` of the cubic B-splines' coefficients, which are mirrored at the ends."""
    places = places.clamp(0, size - 1)
    low = places.floor().long()
    part = places - low
    splines = [(1 - part) ** 3, 3 * part**3 - 6 * part**2 + 4, 3 * (1 - part) ** 3 - 6 * (1 - part) ** 2 + 4, part**3]
    weights, rows = torch.zeros(len(places), size, dtype=torch.float64), torch.arange(len(places))
    for offset, spline in zip((-1, 0, 1, 2), splines, strict=True):
        mirrored = (size - 1 - (size - 1 - (low + offset).abs()).abs()).clamp(0, size - 1)
        weights[rows, mirrored] += spline / 6
    return weights


def _lerp(values: Tensor, dim: int, low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    weight = weight.reshape([-1 if d == dim else 1 for d in range(values.ndim)])
    return torch.lerp(values.index_select(dim, low), values.index_select(dim, high), weight)


def _slabs(count: int, voxels_per_slice: int) -> Iterator[slice]:
    step = max(1, SLAB_VOXELS // max(1, voxels_per_slice))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _without_noise(size_mm: float) -> float:
    """A voxel size to 17 bits, for what is left of it in headers differs by float32 rounding between orientations."""
    mantissa, exponent = np.frexp(size_mm)
    return float(np.ldexp(np.round(mantissa * 2**_SIZE_BITS), exponent - _SIZE_BITS))
