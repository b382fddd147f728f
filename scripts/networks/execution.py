"""How the network runs; the one place that decides.

The plain modules (:mod:`scripts.networks.parts`) run everywhere: with gradients, on GPUs, compiled, under autocast and
in any type. Where nothing but float32 on a CPU is asked for, without gradients, :mod:`scripts.networks.slabwise`
computes the same with less memory. It is only that: take the file away, and the plain modules do all.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

try:
    import scripts.networks.slabwise as slabwise
except ModuleNotFoundError:  # taken away
    slabwise = None


def slabwise_for(part: nn.Module, x: Tensor) -> ModuleType | None:
    """:mod:`scripts.networks.slabwise` where it is to take the place of the part's own forward pass, else None.

    Args:
        part: target encoder, context U-Net or target decoder.
        x: what it is given.
    """
    here = x.device.type == "cpu"
    exact = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in part.parameters())
    otherwise = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or part._compiled_call_impl is not None
    return slabwise if here and exact and not otherwise else None
