"""What the network is shown of a target: the whole of it, or a region with contexts that were brought there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from torch import Tensor

from scripts.inference.contexts import ContextSet

Members = Mapping[int, Sequence[int]]
"""Numbers of the contexts to use, by label."""


class Episodes(Protocol):
    """Where a window's contexts come from."""

    def episode(self, numbers: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
        """Images and wanted outputs ``(n, 1, H, W, D)`` of some pairs for one label."""

    def shown(self, window: Tensor, value: int) -> Tensor:
        """The window as it is shown beside them, the very same tensor where that does not depend on the label."""


WindowScores = Callable[[Tensor, Episodes, Members], Tensor]
"""``(1, 1, H, W, D)``, contexts, members -> scores ``(1, k, H, W, D)``, a channel per label."""


EVEN_SHARE = 0.5
"""Of the network in the scores of an aligned view, where no self-test has found a better one."""

Parts = tuple[Tensor, Tensor | None]
"""What the network says ``(k, h, w, d)``, and what aligned contexts vote, the same; None where they are not aligned."""


def mixed(parts: Parts, share: float) -> Tensor:
    """Scores ``(k, h, w, d)``: the network's by its share, the rest by vote."""
    network, votes = parts
    return network if votes is None else torch.lerp(votes, network, share)


class View(Protocol):
    """A part of a target on a grid of its own.

    Attributes:
        image: ``(1, h, w, d)`` in [0, 1], with its place in the scan.
        values: labels that it shows.
    """

    image: MetaTensor
    values: tuple[int, ...]

    def showing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the contexts that it has."""

    def pairs(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images ``(n, 1, h, w, d)`` of contexts that it has, and masks of its labels ``(n, k, h, w, d)``, 0 to 1."""

    def parts(self, members: Members, of_window: WindowScores, overlap: float) -> Parts:
        """What network and contexts say for its labels."""


class WholeView:
    """A whole target on the context set's grid, beside contexts as they are.

    Args:
        image: ``(1, h, w, d)``; what is larger than the grid is tiled.
        values: labels.
        context: the context set.
    """

    def __init__(self, image: MetaTensor, values: Sequence[int], context: ContextSet) -> None:
        self.image = image
        self.values = tuple(values)
        self.context = context

    def showing(self, numbers: Sequence[int]) -> list[int]:
        """As :class:`View`: all."""
        return list(numbers)

    def pairs(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As :class:`View`, on the grid."""
        images, labels = self.context.pairs(numbers)
        return images, torch.cat([(labels == value).float() for value in self.values], 1)

    def parts(self, members: Members, of_window: WindowScores, overlap: float) -> Parts:
        """As :class:`View`; there is no vote, for the contexts are not aligned."""
        grid = self.context.preprocessing.spatial_size
        inputs = self.image.as_tensor()[None]
        scores = sliding_window_inference(
            inputs, grid, 1, lambda window: of_window(window, self.context, members), overlap, mode="gaussian"
        )
        return scores[0], None
