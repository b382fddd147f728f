"""Convolutions by the quicker of the kernels that PyTorch has for them on a CPU; elsewhere PyTorch's own choice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1³ convolution as one matrix product over channels.

    PyTorch's own 1³ ``conv3d`` falls to a slow kernel on the CPU; this is the same sum.

    Args:
        x: ``(N, C, H, W, D)``.
        weight: ``(K, C, 1, 1, 1)``.
        bias: ``(K,)`` or None.

    Returns:
        ``(N, K, H, W, D)``.
    """
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: tuple[int, int, int] = (1, 1, 1),
) -> Tensor:
    """3D convolution; arguments as ``torch.nn.functional.conv3d``.

    PyTorch hands small float32 inputs to a slow kernel of its own; oneDNN's is the faster at every size.
    """
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if float32_on_cpu and torch.backends.mkldnn.is_available() and not _left_to_pytorch():
        return torch.mkldnn_convolution(x, weight, bias, padding, (stride,) * 3, (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, stride, padding)


def _left_to_pytorch() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
