"""Whether networks run under autocast to 16 bits: what was asked for, and what the hardware is made for."""

from __future__ import annotations

import logging
from typing import Any

import torch

from scripts.runtime.options import AUTO, switch

logger = logging.getLogger(__name__)

TYPES = ("bfloat16", "float16")
"""Types that autocast may be to."""


def settled_amp(
    amp: bool | str, device: str | torch.device, amp_dtype: str = "bfloat16", recorded: bool | None = None
) -> bool:
    """Decide once whether a run is under autocast, and log it.

    Args:
        amp: true or false decides; ``auto`` leaves it to what an earlier run recorded, else to the hardware.
        device: where the network runs.
        amp_dtype: what autocast is to.
        recorded: what the results that this run goes on with were made with; None if there are none.

    Raises:
        ValueError: not such a value, or another type.
    """
    if amp_dtype not in TYPES:
        raise ValueError(f"amp_dtype must be {' or '.join(TYPES)}, got {amp_dtype!r}")
    if (asked := switch(amp)) != AUTO:
        return asked
    device = torch.device(device)
    made_for_it = is_fast(amp_dtype, device)
    chosen = made_for_it if recorded is None else recorded
    logger.info("%s on %s (--amp auto)", amp_dtype if chosen else "float32", _described(device, made_for_it, amp_dtype))
    if chosen != made_for_it:
        logger.info("--amp %s is what the results in the folder were made with", str(chosen).lower())
    return chosen


def is_fast(amp_dtype: str, device: torch.device) -> bool:
    """Whether a device computes in a type of 16 bits faster than in float32.

    On CPUs this is about 3D convolutions. oneDNN has fast ones in bfloat16 for AMX and AVX512-BF16; on other x86
    processors they are slower than in float32, and on Arm nobody has measured them.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return amp_dtype == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    return amp_dtype == "bfloat16" and device.type == "cpu" and any(bfloat16_units().values())


def bfloat16_units() -> dict[str, bool]:
    """The units of this processor that fast convolutions in bfloat16 need, and whether PyTorch can use them."""
    able: dict[str, Any] = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    return {name: bool(able.get(name)) for name in ("amx_bf16", "avx512_bf16")}


def _described(device: torch.device, made_for_it: bool, amp_dtype: str) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    units = [name for name, there in bfloat16_units().items() if there]
    return f"a CPU with {' and '.join(units)}" if units else "a CPU without units for bfloat16"
