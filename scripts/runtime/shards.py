"""Splitting the targets of a run over job arrays, machines and GPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_SHARD = re.compile(r"(\d+)/(\d+)")


class Shard(NamedTuple):
    """One process's part of the targets.

    Attributes:
        number: which part, from 1.
        count: into how many parts the targets are split.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[T]) -> list[T]:
        """Every ``count``-th of the items, beginning with the ``number``-th."""
        return list(items[self.number - 1 :: self.count])


def this_shard(text: str | None = None) -> Shard:
    """The part of this process: what was asked for, split further over the processes that torchrun started.

    Args:
        text: ``"3/16"`` for the third of sixteen parts; None for all.

    Raises:
        ValueError: not such a text, or no such part.
    """
    match = _SHARD.fullmatch("1/1" if text is None else str(text).replace(" ", ""))
    number, count = (int(digits) for digits in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"--shard takes a part and the number of parts, 1/16 to 16/16 say, got {text!r}")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    return Shard((number - 1) * ranks + int(os.environ.get("RANK", 0)) + 1, count * ranks)
