"""What context pairs hold: found by one look at each, and remembered for later runs."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scripts.data.label_numbers import count_labels
from scripts.data.records import read_record, write_record
from scripts.inference.context_pairs import ContextPairs
from scripts.inference.thumbnails import thumbnail

logger = logging.getLogger(__name__)

_READERS = 2
"""Threads that read pairs; more would need memory for as many scans at full size."""

_VERSION = 2
_FIELDS = {"values", "on_grid", "output_range", "thumbnail", "size"}

_FEW = 16
"""So many pairs are read without a progress bar."""


@dataclass(frozen=True)
class PairFacts:
    """What is remembered of a pair when it is not in memory.

    Attributes:
        values: label numbers on the pair's own voxels, without background; none for generation.
        on_grid: those of them that have a voxel on the grid.
        output_range: for generation, the intensities that 0 and 1 of the output stand for.
        thumbnail: of the image (:func:`~scripts.inference.thumbnails.thumbnail`).
    """

    values: tuple[int, ...]
    on_grid: tuple[int, ...]
    output_range: tuple[float, float]
    thumbnail: Tensor

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        voxels = self.thumbnail.numpy()
        return {
            "values": self.values,
            "on_grid": self.on_grid,
            "output_range": self.output_range,
            "thumbnail": base64.b64encode(voxels.tobytes()).decode(),
            "size": voxels.shape,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> PairFacts:
        """From the record."""
        voxels = np.frombuffer(base64.b64decode(content["thumbnail"]), np.uint8).reshape(content["size"])
        labels = tuple(content["values"]), tuple(content["on_grid"])
        return cls(*labels, tuple(content["output_range"]), torch.from_numpy(voxels.copy()))


def look_at_pairs(pairs: ContextPairs, record: str | Path | None = None) -> Sequence[PairFacts]:
    """Facts of every pair; those that are on record need not be read.

    Args:
        pairs: the pairs.
        record: JSON file to remember the facts in; None remembers nothing.

    Raises:
        VolumeError: a file can no longer be read.
    """
    settings = [_VERSION, *pairs.settings]
    keys = [hashlib.sha256(json.dumps([e.digest, *settings]).encode()).hexdigest() for e in pairs.examples]
    known = {key: PairFacts.from_json(facts) for key, facts in read_record(record).items() if facts.keys() >= _FIELDS}
    new = [i for i, key in enumerate(keys) if key not in known]
    started = time.monotonic()
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda number: look_at_pair(pairs, number), new)
        few = len(new) <= _FEW
        for i, facts in zip(new, tqdm(found, "reading contexts", len(new), unit="pair", disable=few), strict=True):
            known[keys[i]] = facts
    if record is not None:
        seconds = time.monotonic() - started
        logger.info("looked at %d contexts in %.1f s; %d were known", len(new), seconds, len(keys) - len(new))
        if new:
            write_record({key: facts.to_json() for key, facts in known.items()}, record)
    return [known[key] for key in keys]


def look_at_pair(pairs: ContextPairs, number: int) -> PairFacts:
    """Facts of one pair."""
    image, label, bounds, values = pairs.on_grid(number)
    left = () if pairs.generation else tuple(count_labels(pairs.of_classes(label)))
    return PairFacts(values, left, bounds, thumbnail(image, pairs.preprocessing.spatial_size))
