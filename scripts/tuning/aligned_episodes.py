"""Aligned cases -> training groups: a target, and some of the contexts that were brought to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from scripts.data.augmentation import NO_GIN
from scripts.data.episodes import IGNORED
from scripts.data.label_decision import MASK_THRESHOLD
from scripts.data.preprocessing import Preprocessing
from scripts.inference.self_test import Tested
from scripts.inference.views import Members, View
from scripts.tuning.augmentation import AlignedAugmentation

SEVERAL_LABELS = 0.25
"""Share of the groups whose foreground is more than one label, where there are more."""


class _Shown:
    """A view of a case with its truth, in memory."""

    def __init__(self, case: Tested, view: View, members: Members) -> None:
        self.view = view
        self.case = case
        self.members = {v: view.showing(members[v]) for v in view.values if v in case.values}
        truth = Preprocessing.label_on(case.label, view.image)
        self.truth = {value: truth == value for value in self.members}
        self.values = [v for v in self.members if self.members[v] and bool(self.truth[v].any())]
        ignored = Preprocessing.label_on(~case.counted, view.image)
        self.ignored = ignored if bool(ignored.any()) else None


class AlignedEpisodes(Dataset):
    """Groups drawn by number, as :class:`~scripts.data.episodes.EpisodeDataset`; the first member alone is the target.

    Args:
        groups_per_epoch: number of groups.
        context_size: [low, high] of how many contexts, as far as there are so many.
        augmentation: of each group; None for none.
        unpair_fraction: share of the groups whose contexts take each other's labels ("When to Unpair", arXiv
            2610.10335).
        evidence: images are shown as :mod:`scripts.data.evidence` of the labels.
        seed: of the draws.
    """

    part = "train"

    def __init__(
        self,
        groups_per_epoch: int,
        context_size: Sequence[int] = (2, 7),
        augmentation: AlignedAugmentation | None = None,
        unpair_fraction: float = 0.0,
        evidence: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 <= unpair_fraction <= 1:
            raise ValueError(f"unpair_fraction must be in [0, 1], got {unpair_fraction}")
        bounds = (context_size, context_size) if isinstance(context_size, int) else tuple(context_size)
        self.low, self.high = int(bounds[0]), int(bounds[-1])
        self.groups_per_epoch = int(groups_per_epoch)
        self.augmentation = augmentation
        self.unpair_fraction = unpair_fraction
        self.evidence = evidence
        self.seed = int(seed)
        self.first = 0
        """Added to the number of every group."""
        self._shown: list[_Shown] = []

    def show(self, cases: Sequence[Tested], members: Sequence[Members]) -> None:
        """Draw from these cases from now on.

        Args:
            cases: with the contexts that were brought to them.
            members: of each, contexts by label.

        Raises:
            ValueError: nothing can be seen in any of them.
        """
        shown = [_Shown(case, view, of) for case, of in zip(cases, members, strict=True) for view in case.target.views]
        self._shown = [one for one in shown if one.values]
        if not self._shown:
            raise ValueError("no label of the contexts can be seen on the grid: nothing to tune on")

    def __len__(self) -> int:
        """Groups in an epoch; group numbers go on beyond it."""
        return self.groups_per_epoch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Group ``number``."""
        rng = np.random.default_rng([self.seed, 3, self.first + number])
        one = self._shown[rng.integers(len(self._shown))]
        several = len(one.values) > 1 and rng.random() < SEVERAL_LABELS
        count = rng.integers(2, len(one.values) + 1) if several else 1
        values = rng.choice(one.values, count, replace=False).tolist()
        pool = [n for n in one.members[values[0]] if all(n in one.members[v] for v in values)] or one.members[values[0]]
        length = min(len(pool), int(rng.integers(self.low, self.high + 1)))
        chosen = rng.permutation(pool)[:length].tolist()
        images, wanted = one.view.pairs(chosen)
        rows = [one.view.values.index(value) for value in values]
        own = torch.stack([one.truth[value] for value in values]).any(0).float()
        images = torch.cat((one.view.image.as_tensor()[None].float(), images))
        masks = torch.cat((own[None], wanted[:, rows].amax(1, keepdim=True)))
        ignored = one.ignored is not None
        if ignored:
            masks = torch.cat((masks, one.ignored.float()[None].expand(len(masks), -1, -1, -1, -1)), 1)
        if self.augmentation is not None:
            images, masks = self.augmentation(images, masks, rng)
        label = (masks[:, :1] > MASK_THRESHOLD).to(torch.uint8)
        if ignored:
            label[0].masked_fill_(masks[0, 1:] > 0, IGNORED)
        return {
            "image": images,
            "label": label,
            "targets": 1,
            "ignores": ignored,
            "generation": False,
            "loss_weight": torch.tensor(1.0),
            "unpaired": length > 1 and rng.random() < self.unpair_fraction,
            "evidence": self.evidence,
            "gin": NO_GIN,
            "dataset": "contexts",
            "task": "segmentation",
            "classes": "+".join(map(str, sorted(values))),
            "cases": one.case.name,
        }
