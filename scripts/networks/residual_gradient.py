"""The residual unit with a backward pass of its own, for training on a CPU.

The gradient of a 3³ convolution with respect to its input is a 3³ convolution too, so forward and backward both
take the row-by-row way of :mod:`scripts.networks.streamed`. Only what comes before each GELU is kept: the GELU is
computed again in the backward pass, which is quicker than fetching it from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.networks import streamed


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
            entered = torch.nn.functional.gelu(before[index]) if index else before[0]
            _, of_weight, of_bias = torch.ops.aten.convolution_backward(
                gradient, entered, weight, [len(weight)], [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1,
                [False, True, True],
            )  # fmt: skip
            of_parameters[:0] = [of_weight, of_bias]
            del entered
            if index or ctx.needs_input_grad[0]:
                gradient = _conv3(gradient, weight.transpose(0, 1).flip(2, 3, 4), None)
                gradient = torch.ops.aten.gelu_backward(gradient, before[index]) if index else gradient.add_(of_total)
        return gradient if ctx.needs_input_grad[0] else None, *of_parameters


def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None, activate: bool = False) -> Tensor:
    """3³ convolution of a whole map."""
    size: Sequence[int] = x.shape[2:]
    step = streamed.slab_rows(len(x), max(weight.shape[:2]), size)
    read = streamed.reader(x)
    slabs = (read(a, min(a + step, size[0])) for a in range(0, size[0], step))
    result, a = streamed.empty_map(len(x), len(weight), size, x.dtype), 0
    for slab in streamed.conv_rows(slabs, weight, bias, size, step, activate):
        streamed.rows_of(result)[:, a : a + slab.shape[1]] = slab
        a += slab.shape[1]
    return result
