"""The residual unit with a backward pass of its own, for training on a CPU.

The gradient of a 3³ convolution with respect to its input is a 3³ convolution too, so forward and backward both
take the row-by-row way of :mod:`scripts.networks.streamed`, and so does that of the weights. Only what comes before
each GELU is kept: the GELU is computed again in the backward pass, which is quicker than fetching it from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.networks import streamed
from scripts.networks.winograd import winograd_weight_gradient


class ResidualGradient(torch.autograd.Function):
    """conv 3³ - GELU - ... - conv 3³, add the input: ``apply(x, weight, bias, weight, bias, ...)``."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *parameters: Tensor) -> Tensor:
        """``(N, C, H, W, D)`` float32 -> the same shape."""
        weights, biases = parameters[0::2], parameters[1::2]
        before = [x]
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            before.append(_conv3(before[-1], weight, bias, activate=index > 0))
        total = before.pop().add_(x)
        ctx.save_for_backward(*before, *weights)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of every weight and bias."""
        saved = ctx.saved_tensors  # once: a recomputed tensor is given out only once
        count = len(saved) // 2
        before, weights = saved[:count], saved[count:]
        of_total, of_parameters = gradient, []
        for index in reversed(range(count)):
            weight = weights[index]
            of_parameters[:0] = [
                _weight_gradient(before[index], gradient, weight, index > 0),
                gradient.sum((0, 2, 3, 4)),
            ]
            if index or ctx.needs_input_grad[0]:
                gradient = _conv3(gradient, weight.transpose(0, 1).flip(2, 3, 4), None)
            if index:
                slab = streamed.rows_of(gradient)
                torch.ops.aten.gelu_backward.grad_input(slab, streamed.rows_of(before[index]), grad_input=slab)
            elif ctx.needs_input_grad[0]:
                gradient.add_(of_total)
        return gradient if ctx.needs_input_grad[0] else None, *of_parameters


def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool = False) -> Tensor:
    """3³ convolution of a whole map."""
    size: Sequence[int] = x.shape[2:]
    step = streamed.slab_rows(len(x), max(weight.shape[:2]), size)
    slabs = streamed.slabs_of(streamed.reader(x), size[0], step)
    result, a = streamed.empty_map(len(x), len(weight), size, x.dtype), 0
    for slab in streamed.conv_rows(slabs, weight, bias, size, step, activate):
        streamed.rows_of(result)[:, a : a + slab.shape[1]] = slab
        a += slab.shape[1]
    return result


def _weight_gradient(before: Tensor, gradient: Tensor, weight: Tensor, activated: bool) -> Tensor:
    """Gradient of a 3³ convolution's weight.

    Args:
        before: what was convolved ``(N, C, H, W, D)``, or what its GELU was taken of.
        gradient: of the result, ``(N, K, H, W, D)``.
        weight: ``(K, C, 3, 3, 3)``.
        activated: whether a GELU came before the convolution.
    """
    count, size = len(before), before.shape[2:]
    if not streamed.winograd_pays(weight, count, size):
        entered = torch.nn.functional.gelu(before) if activated else before
        return torch.ops.aten.convolution_backward(
            gradient, entered, weight, [len(weight)], [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1,
            [False, True, False],
        )[1]  # fmt: skip
    step = streamed.slab_rows(count, max(weight.shape[:2]), size, 2 * streamed.SLAB_BYTES)
    slabs, total, a = streamed.slabs_of(streamed.reader(before), size[0], step), 0, 0
    for piece in streamed.padded_rows(slabs, size[0], step, activated):
        b = a + piece.shape[1] - 2
        total, a = winograd_weight_gradient(piece, streamed.rows_of(gradient)[:, a:b]) + total, b
    return total
