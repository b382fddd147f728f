"""The voxels of context pairs: read from their files, on the network's grid, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.label_numbers import count_labels
from scripts.data.preprocessing import Preprocessing
from scripts.data.volumes import load_pair
from scripts.inference.last_used import LastUsed

_CACHE_BYTES = 2**30
"""Pairs on the grid that are kept for the next target; about 100 at 128 voxels each way."""


OnGrid = tuple[Tensor, Tensor, tuple[float, float], tuple[int, ...]]
"""Image and label, each ``(1, H, W, D)``; the intensities that 0 and 1 of an output stand for; and the numbers that the
label has on its own voxels."""


@dataclass(frozen=True)
class Example:
    """A context pair before it is on the grid.

    Attributes:
        name: what reports call it.
        image: path, or ``(1, H, W, D)`` with its affine.
        label: the same for its label map; for generation the wanted output.
        image_digest: recognises the scan (``volume_digest``).
        digest: changes with anything in either volume.
        kin: ``image_digest`` of scans of the same subject that it is not to serve; they need not be in the set.
    """

    name: str
    image: str | MetaTensor
    label: str | MetaTensor
    image_digest: str
    digest: str
    kin: tuple[str, ...] = ()


class ContextPairs:
    """Images and labels of L context pairs.

    On the grid, pairs are kept in memory: all of them if every target uses all, else the last used ones, and others
    are read from their files again when they are needed.

    Args:
        examples: the pairs.
        preprocessing: what brings them to the grid.
        generation: the labels are images, the wanted outputs.
        at_once: pairs that one target uses.
        known_values: label numbers that are no background; others are made background. None keeps all.

    Attributes:
        examples: as given.
        preprocessing: as given.
        generation: as given.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessing: Preprocessing,
        generation: bool,
        at_once: int,
        known_values: Sequence[int] | None = None,
    ) -> None:
        self.examples = list(examples)
        self.preprocessing = preprocessing
        self.generation = generation
        self._known_values = None if known_values is None else torch.tensor(sorted(known_values))
        pair_bytes = 5 * int(np.prod(preprocessing.spatial_size))  # float32 image, uint8 labels
        self._on_grid = LastUsed(self.read, max(at_once, _CACHE_BYTES // pair_bytes))

    def __len__(self) -> int:
        """L."""
        return len(self.examples)

    @property
    def settings(self) -> list[Any]:
        """What the voxels on the grid follow from, besides the files; for JSON."""
        return [self.preprocessing.fingerprint, self.generation, self._known_numbers()]

    def on_grid(self, number: int) -> OnGrid:
        """A pair on the grid, with all its label numbers; see :data:`OnGrid`."""
        return self._on_grid(number)

    def pairs(self, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Some pairs on the grid.

        Args:
            numbers: which, in this order; None for all.

        Returns:
            Images ``(n, 1, H, W, D)`` in [0, 1] (float32) and labels of the same shape: label numbers (int32, or
            int64 where they need it), or for generation the wanted outputs in [0, 1]. Host memory.
        """
        found = [self._on_grid(i)[:2] for i in (range(len(self)) if numbers is None else numbers)]
        images = torch.stack([image for image, _ in found])
        if self.generation:
            return images, torch.stack([output.float() for _, output in found])
        kind = torch.int64 if any(label.dtype == torch.int64 for _, label in found) else torch.int32
        return images, torch.stack([self.of_classes(label).to(kind) for _, label in found])

    def native(self, number: int) -> tuple[MetaTensor, MetaTensor]:
        """Image and label of a pair on their own voxels, read again if they came from files.

        Args:
            number: of the pair.

        Returns:
            Both ``(1, H, W, D)`` on the same voxels, with their affines: float32, of a label map integers. Arrays as
            they were given, not copies of them.

        Raises:
            VolumeError: a file can no longer be read, or has been replaced.
        """
        image, label = self._load(number)
        return image, label if self.generation else self.of_classes(label)

    def counted_native(self, number: int) -> tuple[MetaTensor, MetaTensor, Tensor]:
        """As :meth:`native`, and where the label map counts.

        Returns:
            Also ``(1, H, W, D)`` boolean: False where the label map has a value of no class (nnU-Net's "ignore").
        """
        image, label = self._load(number)
        known = self.of_classes(label)
        return image, known, (label == 0) | (known > 0)

    def of_classes(self, numbers: Tensor) -> Tensor:
        """Label numbers with those of no class made background."""
        if self._known_values is None:
            return numbers
        return numbers.masked_fill(~torch.isin(numbers.long(), self._known_values), 0)

    def take_over(self, other: ContextPairs) -> dict[int, int]:
        """Take pairs on the grid from another set that has read them, so that they are not read again.

        Args:
            other: pairs of which some may be among these.

        Returns:
            Number there -> number here of each pair that is the same on the grid in both; none if the grids differ.
        """
        if self.settings != other.settings:
            return {}
        there = {example.digest: number for number, example in enumerate(other.examples)}
        same = {there[e.digest]: number for number, e in enumerate(self.examples) if e.digest in there}
        for number, here in same.items():
            found = other._on_grid.get(number)
            if found is not None:
                self._on_grid.put(here, found)
        return same

    def read(self, number: int) -> OnGrid:
        """As :meth:`on_grid`, from the files."""
        image, label = self._load(number)
        if not self.generation:
            known = self._known_numbers()
            ignored = [] if known is None else set(count_labels(label.as_tensor())).difference(known)
            values = tuple(count_labels(self.of_classes(label.as_tensor())))
            return *self.preprocessing.pair(image, label, ignored=ignored), (0.0, 1.0), values
        bounds = self.preprocessing.intensity_range(image, label)
        return *self.preprocessing.image_pair(image, label), bounds, ()

    def _load(self, number: int) -> tuple[MetaTensor, MetaTensor]:
        example = self.examples[number]
        return load_pair(example.image, example.label, not self.generation, example.digest)

    def _known_numbers(self) -> list[int] | None:
        return None if self._known_values is None else self._known_values.tolist()
