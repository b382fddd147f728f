"""The parts of the network in slabs, for prediction on a CPU in float32 or bfloat16.

The same modules and parameters as :mod:`scripts.networks.parts`, computed in *slabs*: a few rows of the first spatial
axis of every sample, ``(N, R, W, D, C)``. What lies between the input and the output of a residual unit is never a
whole map, and the result goes where the input was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.networks.blocks import Down, Fusion, ResidualUnit, UpMerge, pairwise
from scripts.networks.kernels import conv3d
from scripts.networks.parts import ContextUNet, TargetDecoder, TargetEncoder
from scripts.networks.winograd import ROWS, winograd_conv, winograd_weights

SLAB_BYTES = 8 * 2**20
"""About the size of a slab: a few of them fit a last-level cache, and freed ones are handed out again at once."""
FEWEST_ROWS = ROWS
"""Of a slab, however long they are: two of them are copied once more."""
PARTS = 8
"""Of a slab, to be summed up one after the other: each fits a core's own cache, as float32, too."""
WINOGRAD_VOXELS = 1024
"""Below this many voxels per map, transforming the weights costs more than the multiplications it saves."""

Reader = Callable[[int, int], Tensor]
"""Gives the rows from a to b of a map as a slab."""
Adder = Callable[[Tensor, int, int], Tensor]
"""Adds to a slab, in place, what belongs to its rows from a to b."""
Slabs = Iterable[tuple[int, Tensor]]
"""All rows of a map: the first row of every slab, and the slab."""


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let types be those of the weights, whatever autocast the caller has switched on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


# --- the three parts --------------------------------------------------------------------------------------


@_as_written
def encode_target(part: TargetEncoder, target: Tensor) -> list[Tensor]:
    """As ``TargetEncoder.forward``."""
    x, maps = encode_stem(part, target), []
    for stage, halving in enumerate(part.downs):
        x = residual(part.residuals[stage], x) if stage else x
        maps.append(x)
        x = down(halving, x)
    return [*maps, x]


@_as_written
def encode_stem(part: TargetEncoder | ContextUNet, inputs: Tensor) -> Tensor:
    """Embedding and first residual unit of ``(N, C, H, W, D)``; for pairs, what does not depend on the target."""
    return write(stem_slabs(part, inputs), empty_map(part, len(inputs), part.embedding.out_channels, inputs.shape[2:]))


@_as_written
def read_contexts(
    part: ContextUNet, features: list[Tensor], pairs: Tensor, target_maps: Sequence[Tensor], length: int, stems: bool
) -> list[Tensor]:
    """As ``Neuroverse3D.read_contexts``; ``stems`` tells that ``pairs`` are encoded."""
    at_once = 1 if part.embedding.weight.dtype == torch.bfloat16 else pairs.shape[1]
    for piece in pairs.split(at_once, 1):
        flat = piece.flatten(0, 1)
        maps = context_maps(part, slabs_of(flat) if stems else stem_slabs(part, flat), target_maps, piece.shape[1])
        features = running_mean(features, maps, piece.shape[1], length)
    return features


def context_maps(part: ContextUNet, stem: Slabs, target_maps: Sequence[Tensor], pairs: int) -> Iterator[Tensor]:
    """The context features of every pair, one stage after the other, bottleneck first.

    Args:
        part: the context U-Net.
        stem: of all pairs.
        target_maps: from :func:`encode_target`.
        pairs: context pairs per batch element.

    Yields:
        ``(B * pairs, C_s, H_s, W_s, D_s)``.
    """
    skips, x, slabs = [], None, stem
    for stage, (fusion, halving, target) in enumerate(zip(part.fusions, part.downs, target_maps, strict=False)):
        if x is None:
            x = empty_map(part, len(target) * pairs, target.shape[1], target.shape[2:])
        else:
            slabs = residual_slabs(part.residuals[stage], x)
        x = write(fused_slabs(fusion, slabs, True, target), x)
        skips.append(x)
        x = down(halving, x)
    x = residual(part.bottleneck, x)
    yield x
    for up, unit in zip(part.ups, part.up_residuals, strict=True):
        skip = skips.pop()
        x = residual(unit, merge_up(up, x, skip, skip))
        yield x


@_as_written
def decode_target(
    part: TargetDecoder, target_maps: Sequence[Tensor], features: list[Tensor], overwrite: bool
) -> Tensor:
    """As ``TargetDecoder.forward``; ``overwrite`` the target maps, or leave them as they are."""
    *skips, x = target_maps
    x = x if overwrite else x.clone()
    for stage, (unit, fusion) in enumerate(zip(part.residuals, part.fusions, strict=True)):
        if stage:
            skip = skips.pop()
            x = merge_up(part.ups[stage - 1], x, skip, skip if overwrite else torch.empty_like(skip))
        x = write(fused_slabs(fusion, residual_slabs(unit, x), False, features[stage]), x)
    weight, bias = part.output.weight.flatten(1), part.output.bias
    scores = ((a, F.linear(slab.to(weight.dtype), weight, bias)) for a, slab in residual_slabs(part.head, x))
    return write(scores, empty_map(part.output, len(x), part.output.out_channels, x.shape[2:]))


def running_mean(totals: list[Tensor], maps: Iterable[Tensor], pairs: int, length: int) -> list[Tensor]:
    """Add a mini-context's share to the mean context features.

    Args:
        totals: of the mini-contexts before, changed in place; none for the first.
        maps: ``(B * pairs, C, H, W, D)`` per stage.
        pairs: context pairs per batch element.
        length: pairs of all mini-contexts.
    """
    if length == 1:
        return list(maps)
    sums = list(totals)
    for stage, x in enumerate(maps):
        by_pair = pairwise(x, pairs)
        if not totals:
            first = by_pair[:, 0]
            sums.append(torch.empty_like(first, dtype=torch.float32, memory_format=torch.channels_last_3d))
        rows = rows_of(sums[stage])
        for pair in range(pairs):
            for a, slab in slabs_of(by_pair[:, pair], PARTS * x.shape[1]):
                share, total = slab.float(), rows[:, a : a + slab.shape[1]]
                if pair or totals:
                    total.add_(share, alpha=1 / length)
                else:
                    torch.mul(share, 1 / length, out=total)
    return sums


# --- the blocks: of maps, or of slabs ---------------------------------------------------------------------


def residual(unit: ResidualUnit, x: Tensor) -> Tensor:
    """A residual unit; ``x`` may be overwritten."""
    return write(residual_slabs(unit, x), x)


def residual_slabs(unit: ResidualUnit, x: Tensor) -> Slabs:
    """A residual unit of a map."""
    read = reader(x)
    return add_convs(unit, slabs_of(x), unit.convs[0].weight, lambda rows, a, b: rows.add_(read(a, b)), x.shape[2])


def stem_slabs(part: TargetEncoder | ContextUNet, inputs: Tensor) -> Slabs:
    """First residual unit of the embedded ``inputs`` ``(N, C, H, W, D)``.

    The 1³ embedding and the first 3³ convolution of the unit are both linear, so they are one 3³ convolution on the
    input with a channel of ones, which carries the embedding's bias and, like everything, is padded by zeros.
    """
    unit, dtype = part.residuals[0], part.embedding.weight.dtype
    with_ones = torch.cat((inputs, torch.ones_like(inputs[:, :1])), 1).to(dtype)
    matrix = torch.cat((part.embedding.weight.flatten(1), part.embedding.bias[:, None]), 1)
    weight = torch.einsum("kchwd,ci->kihwd", unit.convs[0].weight.float(), matrix.float())
    if dtype != torch.float32:  # what rounding takes from a product would be the same error everywhere
        rest = weight - weight.to(dtype)
        with_ones, matrix = torch.cat((with_ones, with_ones), 1), torch.cat((matrix, torch.zeros_like(matrix)), 1)
        weight = torch.cat((weight, rest), 1).to(dtype)
    read = reader(with_ones)
    slabs = slabs_of(with_ones, part.embedding.out_channels)
    return add_convs(unit, slabs, weight, lambda rows, a, b: add_product_(rows, read(a, b), matrix), inputs.shape[2])


def add_convs(unit: ResidualUnit, slabs: Slabs, weight: Tensor, add: Adder, height: int) -> Slabs:
    """The unit's convolutions of ``slabs``, the first with ``weight``; then ``add``, GELU.

    A slab is given out after its rows have been read for the last time, so that the caller may write it to where it was
    read from.
    """
    rows = (slab for _, slab in slabs)
    for index, conv in enumerate(unit.convs):
        rows = conv_rows(map(gelu_, rows) if index else rows, conv.weight if index else weight, conv.bias, height)
    a = 0
    for slab in rows:
        yield a, gelu_(add(slab, a, a + slab.shape[1]))
        a += slab.shape[1]


def conv_rows(slabs: Iterable[Tensor], weight: Tensor, bias: Tensor | None, height: int) -> Iterator[Tensor]:
    """3³ convolution with zero padding of a map of ``height`` rows, slabs in, slabs out.

    Rows wait until the next ones come: two of them are read again, and Winograd's form takes :data:`ROWS` at once.
    """
    held, received, winograd = None, 0, None
    for slab in slabs:
        if slab.shape[1] == height and not winograd_pays(weight, slab, height):
            yield conv_slab(slab, weight, bias, padding=1)
            continue
        received += slab.shape[1]
        beyond = torch.zeros_like(slab[:, :1])
        piece = torch.cat([beyond if held is None else held, slab, *([beyond] if received == height else [])], 1)
        made = piece.shape[1] - 2
        if received < height:
            made -= made % ROWS
        if winograd is None and winograd_pays(weight, slab, height):
            winograd = winograd_weights(weight)
        if made:
            ready = piece[:, : made + 2]
            yield winograd_conv(ready, winograd, bias) if winograd else conv_slab(ready, weight, bias)
        held = piece[:, made:]


def winograd_pays(weight: Tensor, slab: Tensor, height: int) -> bool:
    """Whether a 3³ convolution of a map of ``height`` rows is quicker, and possible, in Winograd's form."""
    voxels = slab[:, 0, ..., 0].numel() * height
    wide = min(weight.shape[:2]) >= 16 and height % ROWS == 0 and voxels >= WINOGRAD_VOXELS
    return wide and weight.dtype == torch.float32


def conv_slab(slab: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0) -> Tensor:
    """3D convolution of a slab; unless there is padding in the first axis, the slab brings it."""
    return conv3d(slab.contiguous().movedim(-1, 1), weight, bias, stride, (padding, 1, 1)).movedim(1, -1)


def down(part: Down, x: Tensor) -> Tensor:
    """Halve the grid of a map; a new map."""
    if part.conv is None:
        return F.max_pool3d(x, 2)
    halved = [n // 2 for n in x.shape[2:]]
    result, read = empty_map(part.conv, len(x), part.conv.out_channels, halved), reader(x)
    step = max(2, slab_rows(x)) // 2
    if step == halved[0]:
        return conv_slab(rows_of(x), part.conv.weight, part.conv.bias, 2, padding=1).movedim(-1, 1)
    for a in range(0, halved[0], step):
        b = min(a + step, halved[0])
        slab = read(max(2 * a - 1, 0), min(2 * b + 1, x.shape[2]))
        slab = F.pad(slab, (0, 0, 0, 0, 0, 0, int(a == 0), int(b == halved[0])))
        rows_of(result)[:, a:b] = conv_slab(slab, part.conv.weight, part.conv.bias, 2)
    return result


def merge_up(part: UpMerge, x: Tensor, skip: Tensor, result: Tensor) -> Tensor:
    """Up-sample ``x`` by two and merge it with the skip; ``result`` may be the skip itself."""
    return write(merged_slabs(part, x, skip), result)


def merged_slabs(part: UpMerge, x: Tensor, skip: Tensor) -> Slabs:
    """:func:`merge_up` slab by slab."""
    from_x, from_skip = part.conv.weight.flatten(1).split((x.shape[1], skip.shape[1]), dim=1)
    read = reader(x)
    for a, fine in slabs_of(skip):
        b = a + fine.shape[1]
        # the interpolation reads one more at either end
        low, high = max(a // 2 - 1, 0), min((b + 1) // 2 + 1, x.shape[2])
        coarse = F.linear(read(low, high), from_x, part.conv.bias).movedim(-1, 1)
        up = rows_of(F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False))
        yield a, add_product_(up[:, a - 2 * low : b - 2 * low], fine, from_skip)


def fused_slabs(part: Fusion, slabs: Slabs, into_context: bool, other: Tensor) -> Slabs:
    """:func:`fuse` slab by slab; ``other`` is the other side's map."""
    read = reader(other)
    return ((a, fuse(part, slab, into_context, read(a, a + slab.shape[1]))) for a, slab in slabs)


def fuse(part: Fusion, slab: Tensor, into_context: bool, other: Tensor) -> Tensor:
    """Fusion of a slab with the other side's, GELU included.

    Args:
        part: the 1³ convolution over ``[context, target]``.
        slab: ``(B * pairs, R, W, D, C)``, what the result is added to.
        into_context: the slab is the context's, not the target's.
        other: ``(B, R, W, D, C)``.
    """
    of_context, of_target = part.conv.weight.flatten(1).chunk(2, dim=1)
    mine, theirs = (of_context, of_target) if into_context else (of_target, of_context)
    mine = mine + torch.eye(len(mine), dtype=mine.dtype)  # the slab itself
    of_other = F.linear(other.to(slab.dtype), theirs, part.conv.bias)
    if len(other) == len(slab):
        return gelu_(add_product_(of_other, slab, mine))
    result = F.linear(slab, mine)
    pairwise(result, len(slab) // len(other)).add_(of_other[:, None])
    return gelu_(result)


# --- maps and slabs ---------------------------------------------------------------------------------------


def empty_map(part: nn.Module, count: int, channels: int, size: Sequence[int]) -> Tensor:
    """A map ``(N, C, H, W, D)`` of the part's type to write slabs to."""
    dtype = next(part.parameters()).dtype
    return torch.empty((count, channels, *size), dtype=dtype, memory_format=torch.channels_last_3d)


def rows_of(x: Tensor) -> Tensor:
    """View a map ``(N, C, H, W, D)`` as one slab ``(N, H, W, D, C)``."""
    return x.movedim(1, -1)


def reader(x: Tensor) -> Reader:
    """Reads slabs of a map."""
    rows = rows_of(x)
    return lambda a, b: rows[:, a:b]


def slab_rows(x: Tensor, channels: int | None = None) -> int:
    """How many rows of a map make a slab, if it had so many channels."""
    count, own, height, *row = x.shape
    return min(max(FEWEST_ROWS, SLAB_BYTES // (x.itemsize * count * (channels or own) * math.prod(row))), height)


def slabs_of(x: Tensor, channels: int | None = None) -> Slabs:
    """The slabs of a map, cut as if it had so many channels."""
    step = slab_rows(x, channels)
    return ((a, rows_of(x)[:, a : a + step]) for a in range(0, x.shape[2], step))


def write(slabs: Slabs, x: Tensor) -> Tensor:
    """Put slabs into a map; one slab that is all of it becomes the map."""
    for a, slab in slabs:
        if slab.shape[1] == x.shape[2]:
            return slab.movedim(-1, 1)
        rows_of(x)[:, a : a + slab.shape[1]] = slab
    return x


def add_product_(slab: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """Add the matrix product of another slab's channels with weights ``(K, C)``, in place."""
    if slab.dtype == torch.float32 or not slab.is_contiguous():
        return slab.add_(F.linear(other, weight))
    slab.flatten(0, -2).addmm_(other.flatten(0, -2), weight.t())
    return slab


def gelu_(slab: Tensor) -> Tensor:
    """Exact GELU in place."""
    return torch.ops.aten.gelu.out(slab, out=slab)
