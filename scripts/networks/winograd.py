"""3³ convolution with half of the multiplications (Winograd 1980; Lavin & Gray, CVPR 2016, arXiv 1509.09308).

F(4, 3) along the first axis: four rows of the result from six rows of the input. Where the plain sum needs
twelve 2D convolutions (three for each row), six are enough, on sums of input rows and with sums of weights:
``result = A (G weight * B input)``, with the points 0, ±1, ±2 and infinity. The same function but for rounding.

A *slab* is a number of consecutive rows of the first spatial axis: ``(N, R, W, D, C)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4
"""Rows of the result that one set of six products gives."""


def winograd_weights(weight: Tensor) -> list[Tensor]:
    """``G weight``: ``(K, C, 3, 3, 3)`` -> six weights ``(K, C, 3, 3)`` of 2D convolutions."""
    w0, w1, w2 = (w.contiguous(memory_format=torch.channels_last) for w in weight.unbind(2))
    even, odd = (w0 + w2) / -6, w1 / -6
    wide, narrow = w0 / 24 + w2 / 6, w1 / 12
    return [w0 / 4, even + odd, even - odd, wide + narrow, wide - narrow, w2]


def winograd_conv(slab: Tensor, weights: list[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve a slab that has one row more at either end than the result.

    Args:
        slab: ``(N, R + 2, W, D, C)``, R a multiple of :data:`ROWS`.
        weights: from :func:`winograd_weights`.
        bias: ``(K,)`` or None.

    Returns:
        ``(N, R, W, D, K)``; W and D are padded by zeros, as by ``padding=1``.
    """
    rows = slab.shape[1] - 2
    d0, d1, d2, d3 = (slab[:, i : i + rows : ROWS] for i in range(ROWS))
    d4, d5 = slab[:, 4::ROWS], slab[:, 5::ROWS]
    w0, w1, w2, w3, w4, w5 = weights

    a, b = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    # the product at point 1 counts once in every row of the result, so it takes the bias along
    p, q = _sum_and_difference(_conv2d(a + b, w1, bias), _conv2d(a.sub_(b), w2))
    a, b = d4 - d2, d3 - d1
    r, s = _sum_and_difference(_conv2d(torch.add(a, b, alpha=2), w3), _conv2d(torch.sub(a, b, alpha=2), w4))
    first, last = _conv2d(a.add_(d0 - d2, alpha=4), w0), _conv2d((d5 - d3).sub_(b, alpha=4), w5)

    result = slab.new_empty((slab.shape[0], rows, *p.shape[2:]))
    torch.add(first.add_(p), r, out=result[:, 0::ROWS])
    torch.add(q, s, alpha=2, out=result[:, 1::ROWS])
    torch.add(p, r, alpha=4, out=result[:, 2::ROWS])
    torch.add(q.add_(s, alpha=8), last, out=result[:, 3::ROWS])
    return result


def _sum_and_difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    difference = x - y
    return x.add_(y), difference


def _conv2d(slab: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = F.conv2d(slab.flatten(0, 1).movedim(-1, 1), weight, bias, padding=1)
    return rows.movedim(1, -1).unflatten(0, slab.shape[:2])
