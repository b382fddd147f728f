"""Keeps what was found for the numbers that were asked for last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class LastUsed:
    """What a function found for the numbers that were asked for last; for several threads.

    Unlike ``functools.lru_cache`` it can be looked into and added to.

    Args:
        find: the function.
        most: how much is kept.
    """

    def __init__(self, find: Callable[[int], Any], most: int) -> None:
        self._find = find
        self._most = most
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Any:
        """What the function finds for a number, or found."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        found = self._find(number)
        self.put(number, found)
        return found

    def get(self, number: int) -> Any | None:
        """What is kept for a number, or None."""
        with self._lock:
            return self._kept.get(number)

    def put(self, number: int, found: Any) -> None:
        """Keep what was found elsewhere."""
        with self._lock:
            self._kept[number] = found
            self._kept.move_to_end(number)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
