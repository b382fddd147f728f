"""The parts of the network row by row, for prediction on a CPU.

The same modules and parameters as :mod:`scripts.networks.neuroverse3d`, computed in *slabs*: a few rows of the first
spatial axis of every sample, ``(N, R, W, D, C)``. All that lies between the input and the output of a residual unit
then stays in the processor's cache, never takes fresh memory, and the result goes where the input was. Maps are
stored in float32, or in the type of the surrounding autocast; slabs are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.networks.winograd import ROWS, winograd_conv, winograd_weights

SLAB_BYTES = 8 * 2**20
"""About the size of a slab: a few of them fit a last-level cache, and freed ones are handed out again at once."""
WINOGRAD_VOXELS = 1024
"""Below this many voxels per map, transforming the weights costs more than the multiplications it saves."""

if TYPE_CHECKING:
    from scripts.networks.blocks import Down, Fusion, ResidualUnit, UpMerge
    from scripts.networks.neuroverse3d import ContextUNet, TargetDecoder, TargetEncoder

Reader = Callable[[int, int], Tensor]
"""Gives the rows from a to b of a map as a float32 slab."""


def empty_map(count: int, channels: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A map ``(N, C, H, W, D)`` to write slabs to."""
    return torch.empty((count, channels, *size), dtype=dtype, memory_format=torch.channels_last_3d)


def rows_of(x: Tensor) -> Tensor:
    """View a map ``(N, C, H, W, D)`` as one slab ``(N, H, W, D, C)``."""
    return x.movedim(1, -1)


def reader(x: Tensor) -> Reader:
    """Reads slabs of a map."""
    rows = rows_of(x)
    return lambda a, b: rows[:, a:b].float()


def slab_rows(count: int, channels: int, size: Sequence[int], slab_bytes: int = SLAB_BYTES) -> int:
    """How many rows make a slab: as many as ``slab_bytes`` allow, but a multiple of :data:`ROWS`."""
    row_bytes = 4 * count * channels * size[1] * size[2]
    return min(max(1, slab_bytes // (row_bytes * ROWS)) * ROWS, size[0])


def slabs_of(read: Reader, height: int, step: int) -> Iterator[Tensor]:
    """All rows of a map, in slabs of ``step``."""
    return (read(a, min(a + step, height)) for a in range(0, height, step))


def gelu_(slab: Tensor) -> Tensor:
    """Exact GELU in place."""
    return torch.ops.aten.gelu.out(slab, out=slab)


def winograd_pays(weight: Tensor, count: int, size: Sequence[int]) -> bool:
    """Whether a 3³ convolution of ``count`` maps of this size is quicker, and possible, in Winograd's form."""
    return min(weight.shape[:2]) >= 16 and size[0] % ROWS == 0 and count * math.prod(size) >= WINOGRAD_VOXELS


def padded_rows(slabs: Iterable[Tensor], height: int, most: int, activate: bool) -> Iterator[Tensor]:
    """What a 3³ convolution reads: the last rows of a slab are kept back until the next ones come.

    Args:
        slabs: of a map, in order.
        height: rows of the map.
        most: rows of the largest slab.
        activate: apply a GELU.

    Yields:
        ``(N, R + 2, W, D, C)``: a multiple of :data:`ROWS` rows, at the end whatever is left, with one more at either
        end, zeros beyond the map. The memory is reused for the next one.
    """
    received, made, filled = 0, 0, 0
    held = None
    for slab in slabs:
        if held is None:
            held = slab.new_empty((slab.shape[0], most + ROWS + 2, *slab.shape[2:]))
            held[:, 0], filled = 0, 1
        place = held[:, filled : filled + slab.shape[1]]
        if activate:
            for sample, where in zip(slab, place, strict=True):  # oneDNN's GELU writes wrongly to what has gaps
                torch.ops.aten.gelu.out(sample, out=where)
        else:
            place.copy_(slab)
        received, filled = received + slab.shape[1], filled + slab.shape[1]
        ready = (filled - 2) // ROWS * ROWS
        if received == height:
            held[:, filled], ready = 0, height - made
        if ready:
            yield held[:, : ready + 2]
            held[:, : filled - ready] = held[:, ready:filled].clone()
            made, filled = made + ready, filled - ready


def conv_rows(
    slabs: Iterable[Tensor], weight: Tensor, bias: Tensor | None, size: Sequence[int], most: int, activate: bool
) -> Iterator[Tensor]:
    """3³ convolution with zero padding, slabs in, slabs out.

    Args:
        slabs: of a map, in order.
        weight: ``(K, C, 3, 3, 3)``.
        bias: ``(K,)`` or None.
        size: spatial size of the map.
        most: rows of the largest slab; the last one made may have ``ROWS`` more.
        activate: apply a GELU before the convolution.
    """
    winograd = None
    for piece in padded_rows(slabs, size[0], most, activate):
        if winograd is None and winograd_pays(weight, len(piece), size):
            winograd = winograd_weights(weight)
        yield winograd_conv(piece, winograd, bias) if winograd else _conv3d(piece, weight, bias)


def residual_rows(
    unit: ResidualUnit, read: Reader, count: int, size: Sequence[int], first: tuple[Reader, Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A residual unit: yields the first row and the slab, in order.

    A row is yielded only after all rows up to the next one but one have been read, so that the caller may write it
    to where it was read from.

    Args:
        unit: its convolutions.
        read: of the input.
        count: N.
        size: spatial size.
        first: another input and weight for the first convolution (see :func:`embedded`).
    """
    channels = unit.convs[0].out_channels
    step = slab_rows(count, channels, size)
    source, weight = first or (read, unit.convs[0].weight)
    slabs = slabs_of(source, size[0], step)
    for index, conv in enumerate(unit.convs):
        weight = conv.weight if index else weight
        slabs = conv_rows(slabs, weight, conv.bias, size, step + index * ROWS, activate=index > 0)
    a = 0
    for slab in slabs:
        yield a, gelu_(slab.add_(read(a, a + slab.shape[1])))
        a += slab.shape[1]


def _conv3d(slab: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """3D convolution of a slab that brings its own padding in the first axis."""
    x, padding = slab.contiguous().movedim(-1, 1), (0, 1, 1)
    # PyTorch hands small inputs to a slow kernel of its own; oneDNN's is the faster at every size
    if torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(x, weight, bias, padding, (stride,) * 3, (1, 1, 1), 1).movedim(1, -1)
    return F.conv3d(x, weight, bias, stride, padding).movedim(1, -1)


def embedded(inputs: Tensor, embedding: nn.Conv3d, unit: ResidualUnit) -> tuple[Reader, tuple[Reader, Tensor]]:
    """The 1³ embedding, and embedding and first 3³ convolution of the unit as one.

    Both are linear, so they are one 3³ convolution on the input with a channel of ones, which carries the
    embedding's bias and, like everything, is padded by zeros.

    Returns:
        what reads the embedding, and (what reads its input, the composed weight): arguments of :func:`residual_rows`.
    """
    conv = unit.convs[0]
    with_ones = rows_of(torch.cat((inputs, torch.ones_like(inputs[:, :1])), 1))
    matrix = torch.cat((embedding.weight.flatten(1), embedding.bias[:, None]), 1)
    weight = torch.einsum("kchwd,ci->kihwd", conv.weight, matrix)
    return (
        lambda a, b: F.linear(with_ones[:, a:b], matrix),
        (lambda a, b: with_ones[:, a:b], weight),
    )


def map_rows(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The slabs of a map, as :func:`residual_rows` yields them."""
    step, height = slab_rows(x.shape[0], x.shape[1], x.shape[2:]), x.shape[2]
    return ((a, reader(x)(a, min(a + step, height))) for a in range(0, height, step))


def stem_rows(part: TargetEncoder | ContextUNet, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First residual unit of the embedded ``inputs`` ``(N, C, H, W, D)``, as :func:`residual_rows` yields it."""
    read, first = embedded(inputs.float(), part.embedding, part.residuals[0])
    return residual_rows(part.residuals[0], read, inputs.shape[0], inputs.shape[2:], first)


def down(part: Down, x: Tensor) -> Tensor:
    """Halve the grid of a map; a new map of the same type."""
    if part.conv is None:
        return F.max_pool3d(x, 2)
    count, _, *size = x.shape
    halved = [n // 2 for n in size]
    result, read = empty_map(count, part.conv.out_channels, halved, x.dtype), reader(x)
    step = max(2, slab_rows(count, x.shape[1], size)) // 2
    for a in range(0, halved[0], step):
        b = min(a + step, halved[0])
        slab = read(max(2 * a - 1, 0), min(2 * b + 1, size[0]))
        slab = F.pad(slab, (0, 0, 0, 0, 0, 0, int(a == 0), int(b == halved[0])))
        rows_of(result)[:, a:b] = _conv3d(slab, part.conv.weight, part.conv.bias, 2)
    return result


def merge_up(part: UpMerge, x: Tensor, skip: Tensor, result: Tensor) -> Tensor:
    """Up-sample ``x`` by two and merge it with the skip; ``result`` may be the skip itself."""
    from_x, from_skip = part.conv.weight.flatten(1).split((x.shape[1], skip.shape[1]), dim=1)
    read_x, read_skip, rows = reader(x), reader(skip), rows_of(result)
    step, height = slab_rows(skip.shape[0], skip.shape[1], skip.shape[2:]), skip.shape[2]
    for a in range(0, height, step):
        b = min(a + step, height)
        low, high = max(a // 2 - 1, 0), min(b // 2 + 1, x.shape[2])  # the interpolation reads one more at either end
        coarse = F.linear(read_x(low, high), from_x).movedim(-1, 1)
        fine = rows_of(F.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False))
        slab = F.linear(read_skip(a, b), from_skip, part.conv.bias)
        rows[:, a:b] = slab.add_(fine[:, a - 2 * low : b - 2 * low])
    return result


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
    result = F.linear(slab, mine)
    result.unflatten(0, (len(other), -1)).add_(F.linear(other, theirs, part.conv.bias)[:, None])
    return gelu_(result)


def fused_rows(
    part: Fusion, slabs: Iterable[tuple[int, Tensor]], into_context: bool, other: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """:func:`fuse` slab by slab; ``other`` is the other side's map."""
    read = reader(other)
    return ((a, fuse(part, slab, into_context, read(a, a + slab.shape[1]))) for a, slab in slabs)


def write(slabs: Iterable[tuple[int, Tensor]], x: Tensor) -> Tensor:
    """Put slabs into a map."""
    for a, slab in slabs:
        rows_of(x)[:, a : a + slab.shape[1]] = slab
    return x


def unit_rows(unit: ResidualUnit, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A residual unit of a map, as :func:`residual_rows` yields it."""
    return residual_rows(unit, reader(x), len(x), x.shape[2:])


def residual(unit: ResidualUnit, x: Tensor) -> Tensor:
    """A residual unit in place."""
    return write(unit_rows(unit, x), x)


def encode_target(part: TargetEncoder, target: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """As ``TargetEncoder.forward``; the maps are of type ``dtype``."""
    x, maps = encode_stem(part, target, dtype), []
    for stage, halving in enumerate(part.downs):
        maps.append(residual(part.residuals[stage], x) if stage else x)
        x = down(halving, x)
    return [*maps, x]


def encode_stem(part: TargetEncoder | ContextUNet, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Embedding and first residual unit of ``(N, C, H, W, D)``; for pairs, what does not depend on the target."""
    return write(stem_rows(part, inputs), empty_map(len(inputs), part.embedding.out_channels, inputs.shape[2:], dtype))


def context_maps(
    part: ContextUNet, stem: Iterable[tuple[int, Tensor]], target_maps: Sequence[Tensor], pairs: int
) -> Iterator[Tensor]:
    """The context features of every pair, one stage after the other, bottleneck first.

    Args:
        part: the context U-Net.
        stem: of all pairs, from :func:`stem_rows` or :func:`map_rows`.
        target_maps: from :func:`encode_target`.
        pairs: context pairs per batch element.

    Yields:
        ``(B * pairs, C_s, H_s, W_s, D_s)``, of the target maps' type.
    """
    skips, x, slabs = [], None, stem
    for stage, (fusion, halving, target) in enumerate(zip(part.fusions, part.downs, target_maps, strict=False)):
        if x is None:
            x = empty_map(len(target) * pairs, target.shape[1], target.shape[2:], target.dtype)
        else:
            slabs = unit_rows(part.residuals[stage], x)
        write(fused_rows(fusion, slabs, True, target), x)
        skips.append(x)
        x = down(halving, x)
    x = residual(part.bottleneck, x)
    yield x
    for up, unit in zip(part.ups, part.up_residuals, strict=True):
        skip = skips.pop()
        x = residual(unit, merge_up(up, x, skip, skip))
        yield x


def decode_target(
    part: TargetDecoder, target_maps: Sequence[Tensor], features: list[Tensor], overwrite: bool
) -> Tensor:
    """As ``TargetDecoder.forward``, float32; ``overwrite`` the target maps, or leave them as they are."""
    *skips, x = target_maps
    x = x if overwrite else x.clone()
    for stage, (unit, fusion) in enumerate(zip(part.residuals, part.fusions, strict=True)):
        if stage:
            skip = skips.pop()
            x = merge_up(part.ups[stage - 1], x, skip, skip if overwrite else torch.empty_like(skip))
        write(fused_rows(fusion, unit_rows(unit, x), False, features[stage]), x)
    result = empty_map(len(x), part.output.out_channels, x.shape[2:], torch.float32)
    weight, bias = part.output.weight.flatten(1), part.output.bias
    return write(((a, F.linear(slab, weight, bias)) for a, slab in unit_rows(part.head, x)), result)


def running_mean(totals: list[Tensor], maps: Iterable[Tensor], pairs: int, length: int) -> list[Tensor]:
    """Add a mini-context's share to the mean context features.

    Args:
        totals: of the mini-contexts before, in float32, changed in place; none for the first.
        maps: ``(B * pairs, C, H, W, D)`` per stage.
        pairs: context pairs per batch element.
        length: pairs of all mini-contexts.
    """
    if length == 1:
        return list(maps)
    sums = list(totals)
    for stage, x in enumerate(maps):
        by_pair = x.unflatten(0, (-1, pairs))
        if not totals:
            sums.append(torch.zeros_like(by_pair[:, 0], dtype=torch.float32, memory_format=torch.channels_last_3d))
        for pair in range(pairs):
            sums[stage].add_(by_pair[:, pair], alpha=1 / length)
    return sums
