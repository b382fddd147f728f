"""Several predictions of one target, from random subsets of the contexts and from mirror images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

AXIS_NAMES = ("left-right", "front-back", "up-down")
"""The axes of a volume on the grid, which is in RAS orientation."""

AXES = (0, 1, 2)

FLIP_PROBABILITY = 0.5


class Member(NamedTuple):
    """One prediction of an ensemble, beside the plain one.

    Attributes:
        among: numbers of the contexts it may use.
        flips: axes along which target and contexts are mirrored.
    """

    among: list[int]
    flips: tuple[int, ...]


class Mirrored(nn.Module):
    """A network that sees target and contexts mirrored, and whose prediction is mirrored back.

    Args:
        network: called as ``network(target, images, labels, mini_context_size)``.
        axes: of :data:`AXES`.
    """

    def __init__(self, network: nn.Module, axes: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.axes = [axis - 3 for axis in axes]  # counted from the end: images have one leading axis more

    def forward(self, target: Tensor, images: Tensor, labels: Tensor, mini_context_size: int) -> Tensor:
        """As the network."""
        mirrored = [x.flip(self.axes) for x in (target, images, labels)]
        return self.network(*mirrored, mini_context_size=mini_context_size).flip(self.axes)


def mirrored(network: nn.Module, axes: Sequence[int]) -> nn.Module:
    """The network in a mirror; without axes the network itself, for which the inferer may hold things ready."""
    return Mirrored(network, axes) if axes else network


def draw_members(
    chosen: Mapping[int, Sequence[int]], count: int, flip_axes: Sequence[int] = (), seed: int = 0
) -> list[Member]:
    """Members that differ from the plain prediction.

    Each draws half of the contexts (rounded up) of every label, so that no label is left without an example; along
    each of ``flip_axes`` it is mirrored with a probability of one half. Where no label has two contexts and no axis
    may be mirrored, nothing can be drawn.

    Args:
        chosen: numbers of the contexts that the plain prediction uses, by label.
        count: number of members.
        flip_axes: axes that may be mirrored.
        seed: of the draws; the same for every target.
    """
    if not flip_axes and all(len(numbers) < 2 for numbers in chosen.values()):
        return []
    rng = np.random.default_rng(seed)
    pool = sorted({number for numbers in chosen.values() for number in numbers})
    members = []
    for _ in range(count):
        place = {number: i for i, number in enumerate(rng.permutation(pool).tolist())}
        halves = [sorted(numbers, key=place.__getitem__)[: (len(numbers) + 1) // 2] for numbers in chosen.values()]
        flips = tuple(axis for axis in flip_axes if rng.random() < FLIP_PROBABILITY)
        members.append(Member(sorted({number for half in halves for number in half}), flips))
    return members
