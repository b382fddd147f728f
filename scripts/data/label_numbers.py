"""Label maps hold whole numbers: one rule for what is one, and counting them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

MOST = 2**32 - 1
"""Highest label number: that of NIfTI's uint32, beyond which other programs do not read integers."""

WHOLE_TOLERANCE = 1e-3
"""Numbers no further from a whole one are rounded: a file's scaling factor leaves as much."""

_FEW = 2**16


def label_numbers(voxels: Tensor) -> Tensor:
    """A label map's voxels as integers.

    Args:
        voxels: any shape and type that holds the file's numbers exactly.

    Returns:
        uint8, int32 or int64, the first that holds them; the same shape.

    Raises:
        ValueError: values that are negative, not finite, further than :data:`WHOLE_TOLERANCE` from a whole number, or
            above :data:`MOST`. The message begins with a verb, for a file's name to go ahead of it.
    """
    numbers = voxels
    if voxels.is_floating_point():
        numbers = voxels.round()
        wrong = ~((voxels - numbers).abs() <= WHOLE_TOLERANCE) | (numbers < 0)
    else:
        wrong = voxels < 0
    if wrong.any():
        shown = torch.unique(voxels[wrong])[:3].double().tolist()
        raise ValueError(f"holds values that are no label numbers: {shown}")
    highest = int(numbers.max())
    if highest > MOST:
        raise ValueError(f"holds the label number {highest}, above {MOST}: renumber its labels")
    return numbers.to(next(t for t in (torch.uint8, torch.int32, torch.int64) if highest <= torch.iinfo(t).max))


def count_labels(numbers: Tensor) -> dict[int, int]:
    """Voxels of each label above 0, by label number; memory does not depend on the numbers.

    Args:
        numbers: from :func:`label_numbers`.
    """
    if int(numbers.max()) < _FEW:  # far faster than sorting
        counts = torch.bincount(numbers.flatten(), minlength=1)
        return {value: int(counts[value]) for value in counts.nonzero().flatten().tolist() if value}
    values, counts = torch.unique(numbers, return_counts=True)
    return {value: count for value, count in zip(values.tolist(), counts.tolist(), strict=True) if value}


def without(numbers: Tensor, values: Collection[int]) -> Tensor:
    """Label numbers with some of them made background.

    Args:
        numbers: from :func:`label_numbers`.
        values: the labels.
    """
    if not values:
        return numbers
    return numbers.masked_fill(torch.isin(numbers.long(), torch.tensor(sorted(values))), 0)
