"""What comes before the network: the data path of training, and how long training waits for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import BASELINE, Row, Run, Side, clock, compare, rows, work
from benchmarks.network import NARROW, TINY, Case, make_network, probe
from scripts.data import EpisodeDataset, PreparedCases
from scripts.data.nnunet import Case as DatasetCase
from scripts.data.preprocessing import LoadCase, Preprocessing
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.losses import SmoothL3L1Loss
from scripts.runtime.commandline import main
from scripts.training.engine import prepare_episode
from scripts.training.loader import GroupLoader

HEAD = (160, 192, 160)
"""Voxels of a made subject."""
SUBJECTS = 8
CONTEXTS = 3
READ_GROUPS = 2
"""Groups that the baseline reads; it needs seconds for each."""
_MADE = "made heads"
_WARM_UP_GROUPS = 2


@dataclass(frozen=True)
class Source:
    """Where groups come from.

    Attributes:
        dataset_dir: folder of an nnU-Net dataset.
        cache_dir: a folder for its prepared cases.
        spatial_size: voxels per axis of the grid.
        groups: of an epoch.
        num_workers: processes that load.
    """

    dataset_dir: str
    cache_dir: str
    spatial_size: int
    groups: int
    num_workers: int

    def smallest(self) -> Source:
        """A few small groups in this process."""
        return replace(self, spatial_size=16, groups=3, num_workers=0)

    def episodes(self, more: int = 0, augment: bool = False) -> EpisodeDataset:
        """Training groups, some more than in an epoch."""
        return EpisodeDataset.from_folder(
            self.dataset_dir,
            augment=augment,
            spatial_size=self.spatial_size,
            cache_dir=self.cache_dir,
            context_size=CONTEXTS,
            groups_per_epoch=self.groups + more,
        )


@work
def groups(run: Run, dataset_dir: str = "", num_workers: int = 2, pairs: int = 3) -> Iterator[Row]:
    """Seconds per group of the second epoch, against reading and preprocessing the NIfTI files each time.

    Args:
        run: how it is run.
        dataset_dir: folder of an nnU-Net dataset; empty makes one of synthetic subjects, of the size of a head at 1 mm.
        num_workers: processes that load.
        pairs: how often both sides are measured.
    """
    with _source(dataset_dir, 128, 100, num_workers, run.quick) as source:
        read = replace(source, groups=READ_GROUPS)
        sides = {
            BASELINE: Side("loading:second_epoch", {"source": asdict(read), "cached": False}),
            "ours": Side("loading:second_epoch", {"source": asdict(source), "cached": True}),
        }
        case = f"{source.spatial_size}³ L={CONTEXTS}, {source.num_workers} loading processes, per group"
        yield from rows(case, compare(sides, run, pairs), Path(dataset_dir).name or _MADE)


@work
def wait(run: Run, dataset_dir: str = "", num_workers: int = 2) -> Iterator[Row]:
    """How long the narrow network's training waits for its groups, with augmentation, all cases cached.

    Args:
        run: how it is run.
        dataset_dir: folder of an nnU-Net dataset; empty makes one of synthetic subjects.
        num_workers: processes that load.
    """
    with _source(dataset_dir, 48, 8, num_workers, run.quick) as source:
        case = Case(TINY.channels if run.quick else NARROW, (source.spatial_size,) * 3, CONTEXTS)
        given = {"source": asdict(source), "case": asdict(case), "device": run.device}
        parts = {"loader alone": (True, False), "training alone": (False, True), "together": (True, True)}
        sides = {
            name: Side("loading:epoch", given | {"loads": loads, "trains": trains})
            for name, (loads, trains) in parts.items()
        }
        yield from rows(f"{case}, per group", compare(sides, run, pairs=1), Path(dataset_dir).name or _MADE)


class ReadCases(PreparedCases):
    """Prepared cases without a cache."""

    def load(self, case: DatasetCase) -> tuple[Tensor, Tensor | None]:
        """Read the case's files and preprocess them."""
        found = LoadCase(Preprocessing(self.spatial_size, self.spacing_mm[case["dataset"]]))(case)
        return found["image"], found.get("label")


def second_epoch(source: Mapping[str, Any], cached: bool) -> dict[str, Any]:
    """Seconds per group of an epoch whose cases were all met in the one before."""
    source = Source(**source)
    dataset = source.episodes()
    if cached:
        _fill_cache(dataset)
    else:
        read = ReadCases({}, dataset.prepared.spatial_size, source.cache_dir)
        read.cases, read.spacing_mm = dataset.prepared.cases, dataset.prepared.spacing_mm
        dataset.prepared = read
    loader = GroupLoader(dataset, num_workers=source.num_workers)
    started = clock()
    for group in loader:
        group["image"].mean()  # touch every voxel
    seconds = (clock() - started) / source.groups
    return {"seconds": seconds, "check": probe(dataset[0]["image"])}


def epoch(source: Mapping[str, Any], case: Mapping[str, Any], device: str, loads: bool, trains: bool) -> dict[str, Any]:
    """Seconds per group of an epoch, and the share of them that was spent waiting for the loader.

    The first groups are not counted: workers start, and libraries set themselves up.
    """
    source, case = Source(**source), Case(**case)
    dataset = source.episodes(_WARM_UP_GROUPS, augment=True)
    _fill_cache(dataset)
    network = make_network("ours", case, device).train()
    optimizer, loss_function = torch.optim.Adam(network.parameters(), 1e-5), SmoothL3L1Loss()
    groups = iter(GroupLoader(dataset, num_workers=source.num_workers))
    group = next(groups)
    waited = 0.0
    started = clock(device)
    for number in range(1, source.groups + _WARM_UP_GROUPS):
        if number == _WARM_UP_GROUPS:
            waited, started = 0.0, clock(device)
        asked = clock(device)
        group = next(groups) if loads else group
        waited += clock(device) - asked
        for target in range(group["image"].shape[1] if trains else 0):
            image, label, _, contexts = prepare_episode({**group, "target": target}, device)
            optimizer.zero_grad()
            predicted = network(image, **contexts | {"mini_context_size": case.mini_context_size})
            loss_function(predicted, label).backward()
            optimizer.step()
    total = clock(device) - started
    return {"seconds": total / source.groups, "waiting_share": waited / total}


def _fill_cache(dataset: EpisodeDataset) -> None:
    """Meet every training case once, as the first epoch does."""
    for cases in dataset.prepared.cases["train"].values():
        for case in cases:
            dataset.prepared.load(case)


@contextmanager
def _source(dataset_dir: str, spatial_size: int, groups: int, num_workers: int, quick: bool) -> Iterator[Source]:
    """Of the given folder, or of a temporary one with synthetic subjects."""
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as cache_dir:
        if not dataset_dir:
            size, labels = (16, 1) if quick else (HEAD, 4)
            dataset_dir = str(write_cohorts(made, 1, SUBJECTS, size, num_labels=labels)[0])
        source = Source(dataset_dir, cache_dir, spatial_size, groups, num_workers)
        yield source.smallest() if quick else source


WORKS = {"groups": groups, "wait": wait}

if __name__ == "__main__":
    main(WORKS)
