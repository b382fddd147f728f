"""Cases -> groups and episodes.

A *group* is L+1 different cases of one dataset that show one task; in training each member in turn is the
target and the others are its contexts. A validation episode has a target from the validation part and its
contexts from the training part, as in use.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate, get_worker_info

from scripts.data.aligned_members import AlignedMembers
from scripts.data.augmentation import NO_GIN, GroupAugmentation
from scripts.data.collection import Collection
from scripts.data.evidence import evidence, evidence_table
from scripts.data.integrity import ignored_values
from scripts.data.nnunet import Case, DatasetError
from scripts.data.prepared import PreparedCases
from scripts.data.rows import SYNTHETIC, Row, SourcedRow
from scripts.data.synthesis.cohort_source import SyntheticCohorts
from scripts.data.tasks import find_task

logger = logging.getLogger(__name__)

_TRIES = 20

IGNORED = 255
"""Value of an output where it is not known: there, an episode's loss and scores count nothing."""


class Group(NamedTuple):
    """What a group is made of.

    Attributes:
        members: case dicts.
        row: the row it was drawn from.
        setting: what the members share: label values, severity of a corruption.
        classes: names of the classes that are the foreground; empty for tasks that read no labels.
    """

    members: list[Case]
    row: Row
    setting: dict[str, Any]
    classes: str

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.row.task


class EpisodeDataset(Dataset):
    """Groups of cases drawn by number: group k is always the same for the same cases and seed.

    Item k is a dict of

    - ``image`` and ``label``, ``(L+1, 1, H, W, D)`` float32: inputs in about [0, 1], and wanted outputs: 0 or 1 for
      segmentation (the union of the drawn classes, never the background), images in [0, 1] for generation tasks,
      :data:`IGNORED` where the label map has a value of no class (nnU-Net's "ignore");
    - ``ignores`` (bool): there are such voxels;
    - ``generation`` (bool), ``loss_weight``, ``unpaired`` (bool: contexts take each other's labels), ``gin`` (seed of
      the intensity augmentation that the engine applies, -1 for none), ``evidence`` (bool: images are shown as
      :mod:`scripts.data.evidence` of the foreground);
    - ``targets``: how many of the members, from the first on, may be the target: all, or of cases brought to the first
      one it alone;
    - ``dataset``, ``task``, ``classes`` and ``cases``: names.

    The members are different cases of one dataset; in label tasks they hold at least one of the classes.

    In validation (``part="val"``) member 0 is the target and comes from the validation part, the others from the
    training part; the rows take turns, and a group's number alone decides what it is, so that two runs compare.
    Nothing is augmented there.

    Args:
        data: case dicts of this part (``image``, ``label``; ``dataset`` and ``classes`` where known); MONAI's
            apps put theirs here.
        prepared: the preprocessed cases of all parts, to which these are added.
        part: ``train`` or ``val``.
        context_size: L, or (low, high) drawn once per epoch from the seed, the same on every rank.
        groups_per_epoch: number of groups in an epoch.
        max_classes: at most this many classes are merged, where a row leaves the choice open.
        rows: called once the cases are known, gives the rows to draw from; without any, every source is drawn
            from equally, for segmentation.
        cohorts: where groups of synthetic rows come from: each is a cohort of its own.
        augmentation: applied to training groups; None for none.
        alignment: brings the members of a group to its first one, which of real cases then alone is the target; None
            leaves them as they are.
        unpair_fraction: in this last fraction of the training, contexts of segmentation groups are presented with
            each other's labels ("When to Unpair", arXiv 2610.10335).
        epochs: length of the training, for ``unpair_fraction``.
        evidence_share: share of the segmentation groups of a training whose images are shown as evidence.
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
        rows: Callable[[], Sequence[SourcedRow]] | None = None,
        cohorts: SyntheticCohorts | None = None,
        augmentation: GroupAugmentation | None = None,
        alignment: AlignedMembers | None = None,
        unpair_fraction: float = 0.0,
        epochs: int = 1,
        evidence_share: float = 0.0,
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
        if not 0 <= unpair_fraction <= 1:
            raise ValueError(f"unpair_fraction must be in [0, 1], got {unpair_fraction}")
        if not 0 <= evidence_share <= 1:
            raise ValueError(f"evidence_share must be in [0, 1], got {evidence_share}")
        if unpair_fraction and self.low < 2:
            raise ValueError(f"unpair_fraction needs two contexts at least, got context_size {context_size}")
        self.data = data
        self.prepared = prepared
        prepared.add(part, data)
        self.part = part
        self.groups_per_epoch = int(groups_per_epoch)
        self.max_classes = int(max_classes)
        self.rows = rows
        self.cohorts = cohorts
        self.augmentation = augmentation if part == "train" else None
        self.alignment = alignment
        self.unpair_from = epochs - round(unpair_fraction * epochs) if unpair_fraction and part == "train" else None
        self.evidence_share = evidence_share if part == "train" else 0.0
        self.seed = int(seed)
        self._rows: list[SourcedRow] = []
        self._chances = np.ones(0)
        self._classes: dict[tuple[Row, str], list[tuple[str, frozenset[int]]]] = {}

    @classmethod
    def from_folder(
        cls,
        dataset_dir: str,
        mode: str = "train",
        augment: bool = False,
        spatial_size: int | Sequence[int] = 128,
        cache_dir: str = "cache",
        val_fraction: float = 0.1,
        seed: int = 0,
        **options: Any,
    ) -> EpisodeDataset:
        """Episodes of the nnU-Net datasets in a folder, for a training loop of one's own.

        Args:
            dataset_dir: a dataset folder or a folder of them.
            mode: ``"train"`` or ``"val"``.
            augment: augment training groups, with the published probabilities.
            spatial_size: the grid, one number of voxels or three.
            cache_dir: where preprocessed cases go.
            val_fraction: part of the cases for validation.
            seed: of split and draws.
            options: further arguments of the constructor, such as ``context_size``.

        Raises:
            FileNotFoundError, DatasetError: no usable data there.
        """
        collection = Collection(dataset_dir, cache_dir, val_fraction=val_fraction, seed=seed)
        return cls.from_collection(collection, mode, augment, spatial_size, cache_dir, seed=seed, **options)

    @classmethod
    def from_collection(
        cls,
        collection: Collection,
        mode: str = "train",
        augment: bool = False,
        spatial_size: int | Sequence[int] = 128,
        cache_dir: str = "cache",
        **options: Any,
    ) -> EpisodeDataset:
        """Episodes of a collection; arguments and errors as those of :meth:`from_folder`."""
        parts = {part: collection.part(part) for part in ("train", "val")}
        size = (spatial_size,) * 3 if isinstance(spatial_size, int) else spatial_size
        dataset = cls(
            parts[mode],
            PreparedCases(parts, size, cache_dir),
            mode,
            rows=collection.rows,
            cohorts=SyntheticCohorts(size),
            augmentation=GroupAugmentation() if augment else None,
            **options,
        )
        dataset.prepare()
        return dataset

    @classmethod
    def for_validation(
        cls, data: Sequence[Case], training: EpisodeDataset, context_size: int = 3, groups_per_epoch: int = 50
    ) -> EpisodeDataset:
        """Episodes of the kind that a training draws (rows, classes, grid, seed), whose targets are other cases.

        Args:
            data: case dicts of the targets.
            training: the training's dataset; the contexts are cases of it.
            context_size: L.
            groups_per_epoch: number of episodes.
        """
        return cls(
            data,
            training.prepared,
            "val",
            context_size,
            groups_per_epoch,
            training.max_classes,
            rows=training.rows,
            cohorts=training.cohorts,
            alignment=training.alignment,
            seed=training.seed,
        )

    def __len__(self) -> int:
        """Groups in an epoch; group numbers go on beyond it."""
        return self.groups_per_epoch

    def prepare(self) -> None:
        """Check the cases and that every source has enough of them.

        Raises:
            DatasetError: faulty or too few cases, or a row without the classes it needs.
        """
        if self._rows:
            return
        self.prepared.prepare()
        targets = self.prepared.cases[self.part]
        rows = list(self.rows() if self.rows is not None else ())
        needs_cases = not rows or any(sourced.sources != (SYNTHETIC,) for sourced in rows)
        if needs_cases and not targets:
            raise DatasetError(f"no cases in the {self.part} part: add cases or change --val_fraction or --split_file")
        rows = rows or [SourcedRow(Row(source), (source,)) for source in sorted(targets)]
        for sourced in rows:
            for source in sourced.sources:
                self._check_source(sourced.row, source)
        self._chances = np.array([sourced.row.draw_weight for sourced in rows])
        self._chances /= self._chances.sum()
        self._rows = rows
        if self.part == "train":
            for sourced, chance in zip(rows, self._chances, strict=True):
                row = sourced.row
                logger.info(
                    "%4.1f %% of the groups: %s, %s, loss weight %g", 100 * chance, row.dataset, row.task,
                    row.loss_weight,
                )  # fmt: skip

    def _check_source(self, row: Row, source: str) -> None:
        if source == SYNTHETIC:
            if self.cohorts is None:
                raise DatasetError(f"a row draws from {SYNTHETIC!r}, but no synthetic cohorts were given")
            self.cohorts.prepare()
            return
        targets, pool = (self.prepared.cases[part].get(source, []) for part in (self.part, "train"))
        if not targets:
            raise DatasetError(f"{source}: no cases in the {self.part} part")
        needed = self.high + (self.part == "train")
        if len(pool) < needed:
            raise DatasetError(
                f"{source}: {len(pool)} training cases, but {self.high} contexts"
                f"{' and a target' if self.part == 'train' else ''} need {needed}: lower "
                f"--{'context_size' if self.part == 'train' else 'val_context_size'} or add cases"
            )
        if find_task(row.task).reads == "label":
            self._classes[row, source] = _classes_of(row, source, [*targets, *pool])

    def context_size(self, epoch: int) -> int:
        """L in an epoch (counted from 0)."""
        return int(np.random.default_rng([self.seed, 1, epoch]).integers(self.low, self.high + 1))

    def draw(self, number: int) -> Group:
        """What makes group ``number``."""
        self.prepare()
        training = self.part == "train"
        length = self.context_size(number // self.groups_per_epoch if training else 0)
        rng = np.random.default_rng([self.seed, 2 if training else 3, number])
        which = int(rng.choice(len(self._rows), p=self._chances)) if training else number % len(self._rows)
        row, sources = self._rows[which].row, self._rows[which].sources
        source = sources[rng.integers(len(sources))]
        task = find_task(row.task)
        if source == SYNTHETIC:
            return self._draw_cohort(row, number, length, rng)
        targets, pool = (self.prepared.cases[part][source] for part in (self.part, "train"))
        setting, names = task.setting(rng), ""
        if task.reads == "label":
            for _ in range(_TRIES):
                names, values = self._draw_classes(row, source, rng)
                with_label, targets_with_label = _holding(pool, values), _holding(targets, values)
                if targets_with_label and len(with_label) >= length + training:
                    pool, targets = with_label, targets_with_label
                    break
            # else rare labels only: members without the structure are better than no group
            setting |= {"values": sorted(values), "ignored": ignored_values(pool[0])}
        if training:
            members = [pool[i] for i in rng.choice(len(pool), length + 1, replace=False)]
        else:
            target = targets[rng.integers(len(targets))]
            members = [target, *(pool[i] for i in rng.choice(len(pool), length, replace=False))]
        return Group(members, row, setting, names)

    def _draw_cohort(self, row: Row, number: int, length: int, rng: np.random.Generator) -> Group:
        """A group whose members are all subjects of one new cohort."""
        task = find_task(row.task)
        key = (self.seed, 6 if self.part == "train" else 7, number)
        modalities = 1 + row.output if task.reads == "output" else 1
        cohort = self.cohorts.cohort(key, length + 1, modalities)
        made_of = (key, length + 1, modalities)
        members = [
            {"dataset": SYNTHETIC, "case": f"cohort{number}_{subject}", "cohort": made_of, "subject": subject}
            for subject in range(length + 1)
        ]
        setting, names = task.setting(rng), ""
        if task.reads == "label":
            count = int(rng.integers(1, min(self.max_classes, len(cohort.names)) + 1))
            chosen = sorted(rng.choice(len(cohort.names), count, replace=False).tolist())
            names = "+".join(cohort.names[i] for i in chosen)
            setting |= {"values": [i + 1 for i in chosen]}
        return Group(members, row, setting, names)

    def _load(self, case: Case, row: Row) -> tuple[Tensor, Tensor | None]:
        """Image of a member and what goes with it."""
        if "cohort" not in case:
            return self.prepared.load(case)
        cohort, subject = self.cohorts.cohort(*case["cohort"]), case["subject"]
        partners = {"label": cohort.labels[subject], "output": cohort.images[subject, -1:], "image": None}
        return cohort.images[subject, :1], partners[find_task(row.task).reads]

    def _draw_classes(self, row: Row, source: str, rng: np.random.Generator) -> tuple[str, frozenset[int]]:
        classes = self._classes[row, source]
        if not row.classes and find_task(row.task).name == "segmentation":
            count = int(rng.integers(1, min(self.max_classes, len(classes)) + 1))
            classes = [classes[i] for i in rng.choice(len(classes), count, replace=False)]
        return "+".join(sorted(name for name, _ in classes)), frozenset().union(*(values for _, values in classes))

    def make(self, number: int, augment: bool = True) -> dict[str, Any]:
        """Group ``number`` as tensors; ``augment=False`` leaves the augmentation out."""
        group = self.draw(number)
        task = find_task(group.task)
        sources = [self._load(case, group.row) for case in group.members]
        pairs = [
            task(*source, group.setting, np.random.default_rng([self.seed, 4, number, member]))
            for member, source in enumerate(sources)
        ]
        image, label = (_stack(tensors) for tensors in zip(*pairs, strict=True))
        ignored = _ignored(sources, group.setting.get("ignored", ()))
        gin, targets = NO_GIN, len(group.members)
        if self.alignment is not None:
            recurs = "cohort" not in group.members[0]
            known = label if ignored is None else torch.cat((label, ignored), 1)
            image, known = self.alignment([clean for clean, _ in sources], image, known, task.generation, recurs)
            label, ignored = known[:, :1], None if ignored is None else known[:, 1:] > 0
            targets = 1 if recurs else targets  # what is drawn once is made the most of
        if augment and self.augmentation is not None:
            drawn = [self.seed, 5, number]
            if ignored is not None:
                ignored = self.augmentation.follow(ignored, label, task.generation, np.random.default_rng(drawn))
            image, label, gin = self.augmentation(image, label, task.generation, np.random.default_rng(drawn))
        if ignored is not None:
            label = label.masked_fill(ignored, IGNORED)
        evident = np.random.default_rng([self.seed, 8, number]).random() < self.evidence_share
        late = self.unpair_from is not None and number // self.groups_per_epoch >= self.unpair_from
        return {
            "image": image,
            "label": label,
            "ignores": ignored is not None,
            "generation": task.generation,
            "loss_weight": torch.tensor(group.row.loss_weight, dtype=torch.float32),
            "unpaired": late and not task.generation,
            "evidence": evident and not task.generation,
            "gin": gin,
            "targets": targets,
            "dataset": group.members[0]["dataset"],
            "task": group.task,
            "classes": group.classes,
            "cases": " ".join(str(case["case"]) for case in group.members),
        }

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Group ``number`` as tensors."""
        return self.make(number)


class GroupSampler(DistributedSampler):
    """Numbers of the groups of an epoch, new ones every epoch, dealt out over the ranks.

    MONAI's engines call ``set_epoch`` with the epoch counted from 1.
    """

    def __init__(self, dataset: EpisodeDataset, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.epoch = 1
        self._skipped = (0, 0)

    def skip(self, epoch: int, groups: int) -> None:
        """Leave out this rank's first groups of an epoch (counted from 1), which a stopped run has trained."""
        self._skipped = (epoch, groups)

    def __iter__(self) -> Iterator[int]:
        """Group numbers of this epoch and rank."""
        first = (self.epoch - 1) * len(self.dataset)
        epoch, groups = self._skipped
        rest = islice(super().__iter__(), groups if epoch == self.epoch else 0, None)
        return (first + number for number in rest)


def collate_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of groups, as PyTorch collates them; a batch of one is not copied.

    Args:
        groups: items of :class:`EpisodeDataset` of the same L.

    Returns:
        Their entries with a batch axis.
    """
    if len(groups) > 1:
        if len({group["label"].dtype for group in groups}) > 1:  # masks are bytes, images are not
            groups = [{**group, "label": group["label"].float()} for group in groups]
        return default_collate(groups)
    return {key: x[None] if isinstance(x, Tensor) else default_collate([x]) for key, x in groups[0].items()}


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``; in a loading process into shared memory, in which it has to travel anyway."""
    if get_worker_info() is None:
        return torch.stack(tensors)
    shape, kind = (len(tensors), *tensors[0].shape), tensors[0].dtype
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * kind.itemsize)
    return torch.stack(tensors, out=torch.empty(0, dtype=kind).set_(storage, 0, shape))


def _ignored(sources: Sequence[tuple[Tensor, Tensor | None]], values: Sequence[int]) -> Tensor | None:
    """Where the members' label maps have one of the values, ``(L+1, 1, H, W, D)``; None if they nowhere do."""
    if not values:
        return None
    found = torch.stack([torch.isin(label.long(), torch.tensor(values)) for _, label in sources])
    return found if found.any() else None


def _holding(cases: Sequence[Case], values: frozenset[int]) -> list[Case]:
    return [case for case in cases if not values.isdisjoint(case["values"])]


def _classes_of(row: Row, source: str, cases: Sequence[Case]) -> list[tuple[str, frozenset[int]]]:
    """Classes that a row may draw from a source's cases: name and label values."""
    present = {value for case in cases for value in case["values"]}
    described = cases[0].get("classes") or {str(value): [value] for value in sorted(present)}
    for wanted in (*row.classes, *row.remove_classes):
        if wanted not in described and not any(wanted in values for values in described.values()):
            raise DatasetError(f"{source}: no class {wanted!r} (classes there: {', '.join(described)})")
    classes = {name: frozenset(values) for name, values in described.items() if present & set(values)}
    if not classes:
        raise DatasetError(f"{source}: no case has a label other than background")
    if row.task == "skull_stripping" and not row.classes:
        brain = [name for name in classes if name.lower() == "brain"]
        if not brain:
            raise DatasetError(
                f"{source}: skull stripping needs a class named brain, or a row whose 'classes' make up the brain; "
                f"classes there: {', '.join(classes)}"
            )
        return [(brain[0], classes[brain[0]])]
    removed = set().union(*(_find_class(wanted, described, present)[1] for wanted in row.remove_classes))
    chosen = [_find_class(wanted, described, present) for wanted in row.classes] or classes.items()
    left = [(name, values) for name, values in chosen if values and not values & removed]
    if not left:
        raise DatasetError(
            f"{source}: no case has a class that the row leaves: 'classes' {list(row.classes) or 'random'}, "
            f"'remove_classes' {list(row.remove_classes)}, classes there: {', '.join(classes)}"
        )
    return left


def _find_class(
    wanted: str | int, described: Mapping[str, Sequence[int]], present: set[int]
) -> tuple[str, frozenset[int]]:
    """Name and label values of a class that is known to be described, as far as any case has them."""
    return str(wanted), frozenset(described.get(wanted, (wanted,))) & present


def as_episode(group: dict[str, Any], target: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One member of a batch of groups as the target, the others as its contexts.

    Args:
        group: ``image`` and ``label``, each ``(B, L+1, 1, H, W, D)``; ``unpaired`` ``(B,)``, where it is true each
            context takes the label of the one before it; ``evidence`` ``(B,)``, where it is true the images are
            evidence of what the contexts' labels mark.
        target: number of the member.

    Returns:
        target image and label ``(B, 1, H, W, D)``, context images and labels ``(B, L, 1, H, W, D)``; masks, which
        travel as bytes, are float32 here. Of the target's label :data:`IGNORED` is left where it is; to the contexts,
        which have no third value, it is background.
    """
    others = [i for i in range(group["image"].shape[1]) if i != target]
    image, label = group["image"], group["label"].float()
    context_out = label[:, others]
    if "ignores" in group and group["ignores"].any():
        context_out = context_out.masked_fill(context_out == IGNORED, 0)
    if "unpaired" in group and group["unpaired"].any():
        rolled = context_out.roll(1, dims=1)
        context_out = torch.where(group["unpaired"].view(-1, 1, 1, 1, 1, 1), rolled, context_out)
    if "evidence" in group and group["evidence"].any():
        image = image.clone()
        for number in group["evidence"].nonzero().flatten().tolist():
            table = evidence_table(image[number, others], context_out[number])
            image[number] = evidence(image[number], table)
    return image[:, target], label[:, target], image[:, others], context_out
