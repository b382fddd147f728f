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


def winograd_weight_gradient(slab: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the weights of :func:`winograd_conv`: its transpose, with half of the multiplications too.

    Six 2D weight gradients, each of which is nine matrix products over all positions: one for every place in the
    3² kernel.

    Args:
        slab: what was convolved, ``(N, R + 2, W, D, C)``, R a multiple of :data:`ROWS`.
        gradient: of the result, ``(N, R, W, D, K)``.

    Returns:
        ``(K, C, 3, 3, 3)``.
    """
    count, rows, width, depth, _ = gradient.shape
    d0, d1, d2, d3 = (slab[:, i : i + rows : ROWS] for i in range(ROWS))
    d4, d5 = slab[:, 4::ROWS], slab[:, 5::ROWS]
    g0, g1, g2, g3 = (gradient[:, i::ROWS] for i in range(ROWS))
    # padded and flat, so that a place in the kernel is a shift along one axis
    padded = slab.new_zeros((count, rows // ROWS, width + 2, depth + 2, slab.shape[-1]))
    of_result = gradient.new_zeros((count, rows // ROWS, width, depth + 2, gradient.shape[-1]))
    flat = padded.flatten(2, 3).flatten(0, 1)
    length = width * (depth + 2) - 2
    flat_of_result = of_result.flatten(2, 3).flatten(0, 1)[:, :length].mT

    def product(x: Tensor, g: Tensor) -> Tensor:
        padded[:, :, 1:-1, 1:-1], of_result[:, :, :, :-2] = x, g
        shifts = (i * (depth + 2) + j for i in range(3) for j in range(3))
        places = [torch.bmm(flat_of_result, flat[:, s : s + length]).sum(0) for s in shifts]
        return torch.stack(places, dim=-1).unflatten(-1, (3, 3))

    a, b = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
    p, q = g0 + g2, g1 + g3
    even, odd = _sum_and_difference(product(a + b, p + q), product(a.sub_(b), p.sub_(q)))
    a, b = d4 - d2, d3 - d1
    r, s = torch.add(g0, g2, alpha=4), torch.add(g1, g3, alpha=4).mul_(2)
    inputs = torch.add(a, b, alpha=2), torch.sub(a, b, alpha=2)
    wide, narrow = _sum_and_difference(product(inputs[0], r + s), product(inputs[1], r.sub_(s)))
    first, last = product(a.add_(d0 - d2, alpha=4), g0), product((d5 - d3).sub_(b, alpha=4), g3)
    return torch.stack((first / 4 - even / 6 + wide / 24, narrow / 12 - odd / 6, last + (wide - even) / 6), dim=2)


def _sum_and_difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    difference = x - y
    return x.add_(y), difference


def _conv2d(slab: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = F.conv2d(slab.flatten(0, 1).movedim(-1, 1), weight, bias, padding=1)
    return rows.movedim(1, -1).unflatten(0, slab.shape[:2])
