"""The context set: example pairs at one spacing, and which of them serve a target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.preprocessing import Preprocessing
from scripts.inference.context_facts import PairFacts, look_at_pairs
from scripts.inference.context_pairs import ContextPairs, Example
from scripts.inference.thumbnails import correlation, thumbnail

NAMES_SHOWN = 5


class ContextSet:
    """L context pairs at one spacing, and the choice among them.

    Their voxels are those of :class:`~scripts.inference.context_pairs.ContextPairs`; what they hold is found by one
    look at each (:meth:`describe`).

    Args:
        examples: the pairs.
        preprocessing: what brings them, and targets, to the grid.
        generation: the labels are images, the wanted outputs.
        similar: use, of those that come into question for a target, only this many that look most like it; None
            uses all.
        known_values: label numbers that are no background; others are made background. None keeps all.
        record: JSON file to remember what the pairs hold, so that another run need not look at them; None
            remembers nothing.
        notes: what is to be said in reports about how the set was made.

    Attributes:
        names: one per pair.
        digests: recognise each pair's scan (``volume_digest``).
        preprocessing: as given.
        generation: as given.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        preprocessing: Preprocessing,
        generation: bool = False,
        similar: int | None = None,
        known_values: Sequence[int] | None = None,
        record: str | Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.names = [example.name for example in examples]
        self.digests = [example.image_digest for example in examples]
        self.preprocessing = preprocessing
        self.generation = generation
        self._similar = similar
        self._record = record
        self._notes = list(notes)
        at_once = len(examples) if similar is None else similar
        self._pairs = ContextPairs(examples, preprocessing, generation, at_once, known_values)

    @property
    def files(self) -> list[str]:
        """Files that the pairs come from."""
        return [part for e in self._pairs.examples for part in (e.image, e.label) if not isinstance(part, MetaTensor)]

    def __len__(self) -> int:
        """L."""
        return len(self.names)

    def pairs(self, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels of some pairs on the grid, see :meth:`ContextPairs.pairs`."""
        return self._pairs.pairs(numbers)

    def episode(self, numbers: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
        """Some pairs as the network takes them for one label.

        Args:
            numbers: which pairs.
            value: the label; of no concern for generation.

        Returns:
            Images and wanted outputs ``(n, 1, H, W, D)`` float32; for segmentation 1 where the label is, else 0.
        """
        images, labels = self.pairs(numbers)
        return images, labels if self.generation else (labels == value).float()

    def shown(self, window: Tensor, value: int) -> Tensor:
        """As :class:`~scripts.inference.views.Episodes`: as it is."""
        return window

    def native(self, number: int) -> tuple[MetaTensor, MetaTensor]:
        """Image and label of a pair on their own voxels, see :meth:`ContextPairs.native`."""
        return self._pairs.native(number)

    def counted_native(self, number: int) -> tuple[MetaTensor, MetaTensor, Tensor]:
        """As :meth:`native`, and where the label map counts, see :meth:`ContextPairs.counted_native`."""
        return self._pairs.counted_native(number)

    def take_over(self, other: ContextSet) -> dict[int, int]:
        """Take pairs that another set has read, see :meth:`ContextPairs.take_over`."""
        return self._pairs.take_over(other._pairs)

    def describe(self) -> None:
        """Look at every pair now, rather than when something about them is first asked for.

        Raises:
            VolumeError: a file can no longer be read.
        """
        _ = self._facts

    @cached_property
    def _facts(self) -> Sequence[PairFacts]:
        return look_at_pairs(self._pairs, self._record)

    @property
    def label_values(self) -> list[int]:
        """Label numbers that occur in the pairs, background left out; none for generation."""
        return sorted({value for facts in self._facts for value in facts.values})

    def holding(self, value: int, on_grid: bool = False) -> list[int]:
        """Numbers of the pairs that have a label; for generation of all pairs.

        Args:
            value: the label.
            on_grid: it must have a voxel on the grid, where a small one may have none.
        """
        facts = enumerate(self._facts)
        return [i for i, of in facts if self.generation or value in (of.on_grid if on_grid else of.values)]

    @property
    def output_range(self) -> tuple[float, float]:
        """Generation: mean intensities, over all pairs, that 0 and 1 of the outputs stand for."""
        low, high = np.mean([facts.output_range for facts in self._facts], axis=0)
        return float(low), float(high)

    @property
    def fingerprint(self) -> str:
        """Text that changes with the pairs, the grid, or how a target's contexts are chosen."""
        grid, generation, known = self._pairs.settings
        kin = [sorted(example.kin) for example in self._pairs.examples]
        digests = [example.digest for example in self._pairs.examples]
        return json.dumps([grid, generation, self._similar, known, digests, *([kin] if any(kin) else [])])

    def warnings(self, values: Sequence[int]) -> list[str]:
        """What a reader of the results should know about the set.

        Args:
            values: the labels that are wanted.

        Returns:
            Sentences: how the set was made, and which pairs lack a wanted label or have none.
        """
        if self.generation:
            return list(self._notes)
        empty = [name for name, facts in zip(self.names, self._facts, strict=True) if not facts.on_grid]
        found = [f"no label is left on the grid of {listing(empty)}: not used"] if empty else []
        for value in values:
            having = self.holding(value)
            if having and len(having) < len(self):
                lacking = [name for i, name in enumerate(self.names) if i not in set(having)]
                found.append(f"label {value} is in {len(having)} of {len(self)} contexts; not in {listing(lacking)}")
        return [*self._notes, *found]

    def same_image(self, digest: str) -> list[int]:
        """Numbers of the pairs with this very scan: a target is never its own context."""
        return [i for i, known in enumerate(self.digests) if known == digest]

    def of_same_subject(self, digest: str) -> list[int]:
        """Numbers of the pairs that a target may not have as contexts: this very scan, and others of its subject."""
        return [i for i, e in enumerate(self._pairs.examples) if digest == e.image_digest or digest in e.kin]

    @cached_property
    def _thumbnails(self) -> Tensor:
        return torch.stack([facts.thumbnail for facts in self._facts])

    def similarity(self, target: Tensor) -> Tensor:
        """How much each pair's image looks like a target, on the grid.

        The measure is the normalised cross-correlation of images averaged to 16 voxels each way.

        Args:
            target: ``(1, h, w, d)`` or ``(1, 1, h, w, d)`` from the same preprocessing, on any device.

        Returns:
            ``(L,)`` float32 in [-1, 1].
        """
        plain = target.as_tensor() if isinstance(target, MetaTensor) else target
        shown = thumbnail(plain.reshape(1, *plain.shape[-3:]), self.preprocessing.spatial_size)
        return correlation(self._thumbnails, shown)

    @property
    def chooses(self) -> bool:
        """Whether there are more pairs than serve one target."""
        return self._similar is not None and self._similar < len(self)

    @property
    def serving(self) -> int:
        """How many pairs serve one target."""
        return len(self) if self._similar is None else min(self._similar, len(self))

    def choose(self, pool: Sequence[int], similarity: Tensor | None = None) -> list[int]:
        """The pairs that serve a target.

        Args:
            pool: numbers of the pairs that come into question.
            similarity: of every pair to the target, from :meth:`similarity`; needed where the set :attr:`chooses`.

        Returns:
            Numbers: the whole pool, or the most similar of it, most similar first (of equals the first by number).
        """
        if similarity is None or self._similar is None or len(pool) <= self._similar:
            return list(pool)
        ranked = similarity.tolist()
        return sorted(pool, key=lambda i: (-ranked[i], i))[: self._similar]


def listing(names: Sequence[str], shown: int = NAMES_SHOWN) -> str:
    """Names for a message, the first few if there are many."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more if names else "nothing"
