"""Keeps what is made of the contexts alone, and so is the same for all targets, within a memory budget."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor


class TensorCache:
    """Tensors up to a memory budget.

    Targets come one after another, and each reads the same entries in the same order. The entry used longest ago is
    then always the one needed next, so nothing is thrown out: what came first stays until :meth:`clear`.

    Args:
        budget_bytes: of all entries together; 0 for no cache.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = int(budget_bytes)
        self.used_bytes = 0
        self._entries: dict[Hashable, Tensor] = {}

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        """The entry, or None."""
        return self._entries.get(key)

    def items(self) -> list[tuple[Hashable, Tensor]]:
        """Keys and entries, the oldest first."""
        return list(self._entries.items())

    def has_room(self, size_bytes: int) -> bool:
        """Whether an entry of that size would be kept."""
        return self.used_bytes + size_bytes <= self.budget_bytes

    def put(self, key: Hashable, entry: Tensor) -> None:
        """Keep an entry, if there is room."""
        size = entry.numel() * entry.element_size()
        if key not in self._entries and self.has_room(size):
            self._entries[key] = entry
            self.used_bytes += size

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.used_bytes = 0
