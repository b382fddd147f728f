"""The context set: example pairs on the network's grid, and which of them serve a target."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from scripts.data.label_numbers import count_labels
from scripts.data.preprocessing import Preprocessing
from scripts.data.records import read_record, write_record
from scripts.data.volumes import load_pair
from scripts.inference.thumbnails import correlation, thumbnail

logger = logging.getLogger(__name__)

_CACHE_BYTES = 2**30
"""Pairs on the grid that are kept for the next target; about 100 at 128 voxels each way."""

_READERS = 2
"""Threads that read pairs; more would need memory for as many scans at full size."""

NAMES_SHOWN = 5


@dataclass(frozen=True)
class Example:
    """A context pair before it is on the grid.

    Attributes:
        name: what reports call it.
        image: path, or ``(1, H, W, D)`` with its affine.
        answer: the same for its label map; for generation the wanted output.
        image_digest: recognises the scan (``volume_digest``).
        digest: changes with anything in either volume.
        kin: ``image_digest`` of scans of the same subject that it is not to serve; they need not be in the set.
    """

    name: str
    image: str | MetaTensor
    answer: str | MetaTensor
    image_digest: str
    digest: str
    kin: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """What is remembered of a pair when it is not in memory."""

    values: tuple[int, ...]
    output_range: tuple[float, float]
    thumbnail: Tensor

    def to_json(self) -> dict[str, Any]:
        voxels = self.thumbnail.numpy()
        return {
            "values": self.values,
            "output_range": self.output_range,
            "thumbnail": base64.b64encode(voxels.tobytes()).decode(),
            "size": voxels.shape,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> _Facts:
        voxels = np.frombuffer(base64.b64decode(content["thumbnail"]), np.uint8).reshape(content["size"])
        return cls(tuple(content["values"]), tuple(content["output_range"]), torch.from_numpy(voxels.copy()))


class _LastUsed:
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
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        found = self._find(number)
        self.put(number, found)
        return found

    def get(self, number: int) -> Any | None:
        with self._lock:
            return self._kept.get(number)

    def put(self, number: int, found: Any) -> None:
        with self._lock:
            self._kept[number] = found
            self._kept.move_to_end(number)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)


class ContextSet:
    """L context pairs at one spacing, and the choice among them.

    Every pair is looked at once (:meth:`describe`). On the grid, pairs are kept in memory: all of them if every
    target uses all, else the last used ones, and others are read from their files again when they are needed.

    Args:
        examples: the pairs.
        preprocessing: what brings them, and targets, to the grid.
        generation: the answers are images.
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
        self._examples = list(examples)
        self._similar = similar
        self._known_values = None if known_values is None else torch.tensor(sorted(known_values))
        self._record = record
        self._notes = list(notes)
        all_at_once = len(examples) if similar is None else similar
        pair_bytes = 5 * int(np.prod(preprocessing.spatial_size))  # float32 image, uint8 labels
        self._on_grid = _LastUsed(self._read, max(all_at_once, _CACHE_BYTES // pair_bytes))

    @property
    def files(self) -> list[str]:
        """Files that the pairs come from."""
        return [part for e in self._examples for part in (e.image, e.answer) if not isinstance(part, MetaTensor)]

    def __len__(self) -> int:
        """L."""
        return len(self.names)

    # --- voxels

    def pairs(self, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Some pairs on the grid.

        Args:
            numbers: which, in this order; None for all.

        Returns:
            Images ``(n, 1, H, W, D)`` in [0, 1] (float32) and answers of the same shape: label numbers (int32, or
            int64 where they need it), or for generation the wanted outputs in [0, 1]. Host memory.
        """
        found = [self._on_grid(i)[:2] for i in (range(len(self)) if numbers is None else numbers)]
        images = torch.stack([image for image, _ in found])
        if self.generation:
            return images, torch.stack([answer.float() for _, answer in found])
        kind = torch.int64 if any(answer.dtype == torch.int64 for _, answer in found) else torch.int32
        return images, torch.stack([self._of_classes(answer).to(kind) for _, answer in found])

    def counted(self, number: int) -> Tensor:
        """Where a pair's label map counts, on the grid: not where it has a value of no class (nnU-Net's "ignore").

        Args:
            number: of the pair.

        Returns:
            ``(1, H, W, D)`` boolean; True everywhere for generation.
        """
        answer = self._on_grid(number)[1]
        if self.generation:
            return torch.ones_like(answer, dtype=torch.bool)
        return (answer == 0) | (self._of_classes(answer) > 0)

    def episode(self, numbers: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
        """Some pairs as the network takes them for one label.

        Args:
            numbers: which pairs.
            value: the label; of no concern for generation.

        Returns:
            Images and wanted outputs ``(n, 1, H, W, D)`` float32; for segmentation 1 where the label is, else 0.
        """
        images, answers = self.pairs(numbers)
        return images, answers if self.generation else (answers == value).float()

    def native(self, number: int) -> tuple[MetaTensor, MetaTensor]:
        """Image and answer of a pair on their own voxels, read again if they came from files.

        Args:
            number: of the pair.

        Returns:
            Both ``(1, H, W, D)`` on the same voxels, with their affines: float32, of a label map integers. Arrays as
            they were given, not copies of them.

        Raises:
            VolumeError: a file can no longer be read, or has been replaced.
        """
        image, answer = self._pair(number)
        return image, answer if self.generation else self._of_classes(answer)

    def counted_native(self, number: int) -> tuple[MetaTensor, MetaTensor, Tensor]:
        """As :meth:`native`, and where the label map counts ``(1, H, W, D)``, see :meth:`counted`."""
        image, answer = self._pair(number)
        known = self._of_classes(answer)
        return image, known, (answer == 0) | (known > 0)

    def _pair(self, number: int) -> tuple[MetaTensor, MetaTensor]:
        example = self._examples[number]
        return load_pair(example.image, example.answer, not self.generation, example.digest)

    def _of_classes(self, numbers: Tensor) -> Tensor:
        """Label numbers with those of no class made background."""
        if self._known_values is None:
            return numbers
        return numbers.masked_fill(~torch.isin(numbers.long(), self._known_values), 0)

    def take_over(self, other: ContextSet) -> dict[int, int]:
        """Take pairs on the grid from another set that has read them, so that they are not read again.

        Args:
            other: a set that may have pairs in common with this one.

        Returns:
            Number there -> number here of each pair that is the same on the grid in both; none if the grids differ.
        """
        settings, theirs = ([s.preprocessing.fingerprint, s.generation, s._known_numbers()] for s in (self, other))
        if settings != theirs:
            return {}
        there = {example.digest: number for number, example in enumerate(other._examples)}
        same = {there[e.digest]: number for number, e in enumerate(self._examples) if e.digest in there}
        for number, here in same.items():
            found = other._on_grid.get(number)
            if found is not None:
                self._on_grid.put(here, found)
        return same

    def _read(self, number: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
        image, answer = self._pair(number)
        if not self.generation:
            known = self._known_numbers()
            ignored = [] if known is None else set(count_labels(answer.as_tensor())).difference(known)
            return *self.preprocessing.pair(image, answer, ignored=ignored), (0.0, 1.0)
        bounds = self.preprocessing.intensity_range(image, answer)
        return *self.preprocessing.image_pair(image, answer), bounds

    # --- what the pairs hold

    def describe(self) -> None:
        """Look at every pair now, rather than when something about them is first asked for.

        Raises:
            VolumeError: a file can no longer be read.
        """
        _ = self._facts

    @cached_property
    def _facts(self) -> list[_Facts]:
        known = {key: _Facts.from_json(facts) for key, facts in read_record(self._record).items()}
        settings = [self.preprocessing.fingerprint, self.generation, self._known_numbers()]
        keys = [hashlib.sha256(json.dumps([e.digest, *settings]).encode()).hexdigest() for e in self._examples]
        new = [i for i, key in enumerate(keys) if key not in known]
        started = time.monotonic()
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(self._look_at, new)
            few = len(new) <= 16
            for i, facts in zip(new, tqdm(found, "reading contexts", len(new), unit="pair", disable=few), strict=True):
                known[keys[i]] = facts
        if self._similar is not None:
            seconds = time.monotonic() - started
            logger.info("looked at %d contexts in %.1f s; %d were known", len(new), seconds, len(keys) - len(new))
        if self._record is not None and new:
            write_record({key: facts.to_json() for key, facts in known.items()}, self._record)
        return [known[key] for key in keys]

    def _look_at(self, number: int) -> _Facts:
        image, answer, bounds = self._on_grid(number)
        values = () if self.generation else tuple(count_labels(self._of_classes(answer)))
        return _Facts(values, bounds, thumbnail(image, self.preprocessing.spatial_size))

    @property
    def label_values(self) -> list[int]:
        """Label numbers that occur in the pairs on the grid, background left out; none for generation."""
        return sorted({value for facts in self._facts for value in facts.values})

    def holding(self, value: int) -> list[int]:
        """Numbers of the pairs that have a label on the grid; for generation of all pairs."""
        return [i for i, facts in enumerate(self._facts) if self.generation or value in facts.values]

    @property
    def output_range(self) -> tuple[float, float]:
        """Generation: mean intensities, over all pairs, that 0 and 1 of the outputs stand for."""
        low, high = np.mean([facts.output_range for facts in self._facts], axis=0)
        return float(low), float(high)

    @property
    def fingerprint(self) -> str:
        """Text that changes with the pairs, the grid, or how a target's contexts are chosen."""
        facts = [self.preprocessing.fingerprint, self.generation, self._similar, self._known_numbers()]
        kin = [sorted(example.kin) for example in self._examples]
        return json.dumps([*facts, [example.digest for example in self._examples], *([kin] if any(kin) else [])])

    def _known_numbers(self) -> list[int] | None:
        return None if self._known_values is None else self._known_values.tolist()

    def warnings(self, values: Sequence[int]) -> list[str]:
        """What a reader of the results should know about the set.

        Args:
            values: the labels that are wanted.

        Returns:
            Sentences: how the set was made, and which pairs lack a wanted label or have none.
        """
        if self.generation:
            return list(self._notes)
        empty = [name for name, facts in zip(self.names, self._facts, strict=True) if not facts.values]
        found = [f"no label is left on the grid of {listing(empty)}: not used"] if empty else []
        for value in values:
            having = self.holding(value)
            if having and len(having) < len(self):
                lacking = [name for i, name in enumerate(self.names) if i not in set(having)]
                found.append(f"label {value} is in {len(having)} of {len(self)} contexts; not in {listing(lacking)}")
        return [*self._notes, *found]

    # --- which serve a target

    def same_image(self, digest: str) -> list[int]:
        """Numbers of the pairs with this very scan: a target is never its own context."""
        return [i for i, known in enumerate(self.digests) if known == digest]

    def of_same_subject(self, digest: str) -> list[int]:
        """Numbers of the pairs that a target may not have as contexts: this very scan, and others of its subject."""
        return [i for i, e in enumerate(self._examples) if digest == e.image_digest or digest in e.kin]

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
