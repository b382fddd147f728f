"""The network's passes over one window of a target: for many labels and targets, with nothing encoded twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from scripts.inference.memory_plan import fitting_pairs, map_bytes
from scripts.inference.tensor_cache import TensorCache
from scripts.inference.views import Episodes
from scripts.networks import Neuroverse3D
from scripts.runtime.memory import cache_bytes, is_out_of_memory

logger = logging.getLogger(__name__)


class Passes:
    """Scores of windows from a context set.

    A window that is shown alike for all labels is encoded once. The first unit of a context pair's encoding (its
    *stem*) is the same for all targets, so it is kept as far as the memory budget goes. When memory runs out, the
    mini-context size is halved, the stems are dropped, and the pass is tried once more.

    Args:
        network: the network.
        context: where the pairs come from.
        mini_context_size: context pairs that run at once; None lets the free memory decide at the first window.
        cache_mb: memory budget for stems in MB; None takes a quarter of the free memory, 0 keeps none.
        amp: whether the passes run under autocast.
    """

    def __init__(
        self,
        network: Neuroverse3D,
        context: Episodes,
        mini_context_size: int | None = None,
        cache_mb: float | None = None,
        amp: bool = False,
    ) -> None:
        self.network = network
        self.context = context
        self.mini_context_size = mini_context_size
        self.cache_mb = cache_mb
        self.amp = amp
        self._stems: TensorCache | None = None

    def scores(
        self,
        window: Tensor,
        members: Mapping[int, Sequence[int]],
        on_label: Callable[[int, int, int], None] | None = None,
    ) -> Tensor:
        """Scores of one window.

        Args:
            window: ``(1, 1, H, W, D)``.
            members: numbers of the contexts to use, by label; none makes the label's scores 0.
            on_label: called with label, labels done, and labels in all.

        Returns:
            ``(1, K, H, W, D)``, a channel per label.

        Raises:
            RuntimeError: memory does not suffice even so; the message says what would help.
        """
        self._plan(window)
        encoded, target_maps, scores = None, [], []
        for value, chosen in members.items():
            if chosen:
                shown = self.context.shown(window, value)
                if shown is not encoded:
                    encoded, target_maps = shown, self._retried(lambda x=shown: self.network.encode_target(x))
                scores.append(self._retried(lambda m=target_maps, v=value, c=chosen: self._one_label(m, v, c)))
            else:
                scores.append(torch.zeros_like(window))
            if on_label is not None:
                on_label(value, len(scores), len(members))
        return torch.cat(scores, dim=1)

    def take_over(self, other: Passes, same: Mapping[int, int]) -> None:
        """Take stems from other passes of the same network, as far as the memory budget goes.

        Args:
            other: the passes that made them.
            same: number there -> number here of pairs that are the same in both context sets.
        """
        if other._stems is None or other.network is not self.network or other.amp != self.amp:
            return
        for (piece, value), stems in other._stems.items():
            if same.keys() >= set(piece):
                self._make_cache(stems.device)
                self._stems.put((tuple(same[number] for number in piece), value), stems)

    def _plan(self, window: Tensor) -> None:
        if self.mini_context_size is None:
            self.mini_context_size = fitting_pairs(self.network, tuple(window.shape[2:]), window.device, self.amp)
        self._make_cache(window.device)

    def _make_cache(self, device: torch.device) -> None:
        if self._stems is None:
            self._stems = TensorCache(cache_bytes(self.cache_mb, device))

    def _one_label(self, target_maps: list[Tensor], value: int, chosen: Sequence[int]) -> Tensor:
        features: list[Tensor] = []
        for start in range(0, len(chosen), self.mini_context_size):
            piece = tuple(chosen[start : start + self.mini_context_size])
            stems = self._stems_of(piece, value, target_maps[0])
            if stems is not None:
                features = self.network.read_contexts(features, stems, target_maps, len(chosen), from_stems=True)
            else:
                pairs = self._pairs(piece, value, target_maps[0].device)
                features = self.network.read_contexts(features, pairs, target_maps, len(chosen))
        return self.network.decode(target_maps, features, keep_target=True).float()

    def _stems_of(self, piece: tuple[int, ...], value: int, like: Tensor) -> Tensor | None:
        """The pairs' stems, if they are kept or there is room to keep them."""
        stems = self._stems.get((piece, value))
        if stems is None and self._stems.has_room(len(piece) * map_bytes(self.network, like.shape[2:], self.amp)):
            stems = self.network.encode_stems(self._pairs(piece, value, like.device))
            self._stems.put((piece, value), stems)
        return stems

    def _pairs(self, piece: Sequence[int], value: int, device: torch.device) -> Tensor:
        """Image and wanted output of some pairs, ``(1, l, 2, H, W, D)``."""
        return torch.cat(self.context.episode(piece, value), 1)[None].to(device, non_blocking=True)

    def _retried(self, run: Callable[[], list[Tensor] | Tensor]) -> list[Tensor] | Tensor:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # out of the except clause, for it holds on to the failed pass's tensors
        self.mini_context_size = max(1, self.mini_context_size // 2)
        self._stems.budget_bytes = 0
        self._stems.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory: once more with a mini-context size of %d", self.mini_context_size)
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RuntimeError(
                "out of memory, even with less at once: give --amp true, a smaller --spatial_size, or --device cpu"
            ) from error
