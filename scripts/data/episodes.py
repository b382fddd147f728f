"""Cases -> groups and episodes.

A *group* is L+1 different cases of one dataset that show one task; in training each member in turn is the
target and the others are its contexts. A validation episode has a target from the validation part and its
contexts from the training part, as in use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from scripts.data.collection import PreparedCases
from scripts.data.nnunet import Case, DatasetError

logger = logging.getLogger(__name__)

_TRIES = 20


class EpisodeDataset(Dataset):
    """Groups of cases drawn by number: group k is always the same for the same cases and seed.

    Item k is ``{"image": (L+1, 1, H, W, D), "label": (L+1, 1, H, W, D), "dataset": name, "classes": names,
    "cases": names}``, images in [0, 1], labels 0 or 1: the union of 1 to ``max_classes`` random classes
    (never the background). The members are different cases and hold at least one of the classes.

    In validation (``part="val"``) member 0 is the target and comes from the validation part, the others from
    the training part, and a group's number alone decides what it is, so that two runs compare.

    Args:
        data: case dicts of this part (``image``, ``label``; ``dataset`` and ``classes`` where known). ``prepared``
            is made from the same lists; this is where MONAI's apps put theirs.
        prepared: the preprocessed cases of all parts.
        part: ``train`` or ``val``.
        context_size: L, or (low, high) drawn once per epoch from the seed, the same on every rank.
        groups_per_epoch: number of groups in an epoch.
        max_classes: at most this many classes are merged.
        seed: of the draws.
    """

    def __init__(
        self,
        data: Sequence[Case],
        prepared: PreparedCases,
        part: str = "train",
        context_size: int | Sequence[int] = 3,
        groups_per_epoch: int = 1000,
        max_classes: int = 5,
        seed: int = 0,
    ) -> None:
        if part not in ("train", "val"):
            raise ValueError(f"part must be 'train' or 'val', got {part!r}")
        bounds = (context_size, context_size) if isinstance(context_size, int) else tuple(context_size)
        self.low, self.high = int(bounds[0]), int(bounds[-1])
        if not 1 <= self.low <= self.high or groups_per_epoch < 1 or max_classes < 1:
            raise ValueError(
                f"context_size {context_size}, groups_per_epoch {groups_per_epoch} and max_classes {max_classes} "
                "must be at least 1, and a context_size range [low, high]"
            )
        self.data = data
        self.prepared = prepared
        self.part = part
        self.groups_per_epoch = int(groups_per_epoch)
        self.max_classes = int(max_classes)
        self.seed = int(seed)
        self._classes: dict[str, list[tuple[str, frozenset[int]]]] = {}

    def __len__(self) -> int:
        """Groups in an epoch; group numbers go on beyond it."""
        return self.groups_per_epoch

    def prepare(self) -> None:
        """Check the cases and that every dataset has enough of them.

        Raises:
            DatasetError: faulty or too few cases, or no label at all.
        """
        if self._classes:
            return
        self.prepared.prepare()
        contexts = self.prepared.cases["train"]
        targets = self.prepared.cases[self.part]
        if not targets:
            raise DatasetError(f"no cases in the {self.part} part: add cases or change --val_fraction or --split_file")
        for name, cases in targets.items():
            pool = contexts.get(name, [])
            needed = self.high + (self.part == "train")
            if len(pool) < needed:
                raise DatasetError(
                    f"{name}: {len(pool)} training cases, but {self.high} contexts"
                    f"{' and a target' if self.part == 'train' else ''} need {needed}: lower "
                    f"--{'context_size' if self.part == 'train' else 'val_context_size'} or add cases"
                )
            classes = _classes_of([*cases, *pool])
            if not classes:
                raise DatasetError(f"{name}: no case has a label other than background")
            self._classes[name] = classes

    def context_size(self, epoch: int) -> int:
        """L in an epoch (counted from 0)."""
        return int(np.random.default_rng([self.seed, 1, epoch]).integers(self.low, self.high + 1))

    def draw(self, number: int) -> tuple[list[Case], frozenset[int], str]:
        """Which cases and which label values make group ``number``: members, values, class names."""
        self.prepare()
        length = self.context_size(number // self.groups_per_epoch if self.part == "train" else 0)
        rng = np.random.default_rng([self.seed, 2 if self.part == "train" else 3, number])
        name = rng.choice(sorted(self._classes))
        targets, pool = self.prepared.cases[self.part][name], self.prepared.cases["train"][name]
        for _ in range(_TRIES):
            classes = self._classes[name]
            count = int(rng.integers(1, min(self.max_classes, len(classes)) + 1))
            chosen = [classes[i] for i in rng.choice(len(classes), count, replace=False)]
            values = frozenset().union(*(values for _, values in chosen))
            with_label, targets_with_label = _holding(pool, values), _holding(targets, values)
            if targets_with_label and len(with_label) >= length + (self.part == "train"):
                break
        else:  # rare labels only: members without the structure are better than no group
            with_label, targets_with_label = pool, targets
        if self.part == "train":
            members = [with_label[i] for i in rng.choice(len(with_label), length + 1, replace=False)]
        else:
            target = targets_with_label[rng.integers(len(targets_with_label))]
            members = [target, *(with_label[i] for i in rng.choice(len(with_label), length, replace=False))]
        return members, values, "+".join(sorted(label for label, _ in chosen))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Group ``number`` as tensors."""
        members, values, names = self.draw(number)
        pairs = [self.prepared.load(case) for case in members]
        wanted = torch.tensor(sorted(values), dtype=torch.int32)  # a case may be cached as uint8
        return {
            "image": torch.stack([image for image, _ in pairs]),
            "label": torch.stack([torch.isin(label.int(), wanted).float() for _, label in pairs]),
            "dataset": members[0]["dataset"],
            "classes": names,
            "cases": " ".join(str(case["case"]) for case in members),
        }


class GroupSampler(DistributedSampler):
    """Numbers of the groups of an epoch, new ones every epoch, dealt out over the ranks.

    MONAI's engines call ``set_epoch`` with the epoch counted from 1.
    """

    def __init__(self, dataset: EpisodeDataset, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.epoch = 1

    def __iter__(self) -> Iterator[int]:
        """Group numbers of this epoch and rank."""
        first = (self.epoch - 1) * len(self.dataset)
        return (first + number for number in super().__iter__())


def _holding(cases: Sequence[Case], values: frozenset[int]) -> list[Case]:
    return [case for case in cases if not values.isdisjoint(case["values"])]


def _classes_of(cases: Sequence[Case]) -> list[tuple[str, frozenset[int]]]:
    present = {value for case in cases for value in case["values"]}
    described = cases[0].get("classes")
    if not described:
        return [(str(value), frozenset({value})) for value in sorted(present)]
    classes = [(name, frozenset(values)) for name, values in described.items()]
    return [(name, values) for name, values in classes if values & present]


def as_episode(group: dict[str, Any], target: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One member of a batch of groups as the target, the others as its contexts.

    Args:
        group: ``image`` and ``label``, each ``(B, L+1, 1, H, W, D)``.
        target: number of the member.

    Returns:
        target image and label ``(B, 1, H, W, D)``, context images and labels ``(B, L, 1, H, W, D)``.
    """
    others = [i for i in range(group["image"].shape[1]) if i != target]
    image, label = group["image"], group["label"]
    return image[:, target], label[:, target], image[:, others], label[:, others]
