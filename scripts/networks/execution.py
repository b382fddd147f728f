"""How the network runs; the one place that decides.

The plain modules (:mod:`scripts.networks.parts`) run everywhere: with gradients, on GPUs, compiled and in any type.
Where a prediction in float32 or bfloat16 on a CPU is asked for, :mod:`scripts.networks.slabwise` computes the same in
less memory and time. It is only that: take the file away, and the plain modules do all.
"""

from __future__ import annotations

import copy
import weakref
from types import ModuleType

import torch
from torch import Tensor, nn

try:
    import scripts.networks.slabwise as slabwise
except ModuleNotFoundError:  # taken away
    slabwise = None

_in_bfloat16: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple[int, int]], nn.Module]] = (
    weakref.WeakKeyDictionary()
)
"""Parts with weights cast once, and of which state of the weights they are."""


def slabwise_for(part: nn.Module, x: Tensor) -> tuple[ModuleType, nn.Module] | None:
    """:mod:`scripts.networks.slabwise` where it is to take the place of the part's own forward pass, else None.

    Args:
        part: target encoder, context U-Net or target decoder.
        x: what it is given.

    Returns:
        The module, and the part to give to its functions: under autocast to bfloat16 one with weights in that type.
    """
    here = slabwise is not None and x.device.type == "cpu"
    exact = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in part.parameters())
    if not here or not exact or torch.is_grad_enabled() or part._compiled_call_impl is not None:
        return None
    if not torch.is_autocast_enabled("cpu"):
        return slabwise, part
    return (slabwise, _cast(part)) if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def _cast(part: nn.Module) -> nn.Module:
    """The part with weights in bfloat16, but for those of the output; made anew when the weights have changed."""
    # those made in inference mode are not counted
    state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in part.parameters()]
    known = _in_bfloat16.get(part)
    if known is None or known[0] != state:
        output = {id(p) for p in part.output.parameters()} if hasattr(part, "output") else ()
        weights = {id(p): p.detach().bfloat16() for p in part.parameters() if id(p) not in output}
        known = _in_bfloat16[part] = state, copy.deepcopy(part, memo=weights)
    return known[1]
