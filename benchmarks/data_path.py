"""Data path of training: groups per second of the second epoch against reading and preprocessing the files each time.

    python -m benchmarks.data_path [--dataset_dir DATA] [--spatial_size 128 --context_size 3]

Without a dataset, one of synthetic subjects at the size of a head at 1 mm is made first. Both sides draw the same
groups through MONAI's loader; the baseline reads NIfTI files and runs the same transforms on them for every member.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from benchmarks.networks import probe
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, clock, compare
from scripts.data import EpisodeDataset, PreparedCases
from scripts.data.nnunet import Case
from scripts.data.preprocessing import LoadCase, Preprocessing
from scripts.training.loader import GroupLoader

HEAD = (160, 192, 160)
"""Voxels of a made subject."""
SUBJECTS = 8
READ_GROUPS = 2
"""Groups that the baseline reads; it needs seconds for each."""


@benchmark
def data_path(
    conditions: Conditions,
    dataset_dir: str = "",
    spatial_size: int = 128,
    context_size: int = 3,
    groups: int = 100,
    num_workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Compare the seconds per group.

    Args:
        conditions: of the measurement.
        dataset_dir: folder of an nnU-Net dataset; empty makes one.
        spatial_size: voxels per axis of the grid.
        context_size: pairs of a group, besides the target.
        groups: groups of an epoch of ours.
        num_workers: processes that load.
    """
    if conditions.quick:
        spatial_size, groups, num_workers = 16, 2, 0
    with made_dataset(dataset_dir, conditions.quick) as data, tempfile.TemporaryDirectory() as cache_dir:
        arguments = {
            "dataset_dir": data,
            "cache_dir": cache_dir,
            "spatial_size": spatial_size,
            "context_size": context_size,
            "num_workers": num_workers,
        }
        sides = {
            BASELINE: Side("data_path:second_epoch", arguments | {"cached": False, "groups": READ_GROUPS}),
            "ours": Side("data_path:second_epoch", arguments | {"cached": True, "groups": groups}),
        }
        case = f"{spatial_size}^3 L={context_size}, {num_workers} loading processes, per group"
        yield {"case": case} | compare(sides, conditions)


class ReadCases(PreparedCases):
    """Prepared cases without a cache."""

    def load(self, case: Case) -> tuple[Tensor, Tensor | None]:
        """Read the case's files and preprocess them."""
        found = LoadCase(Preprocessing(self.spatial_size, self.spacing_mm[case["dataset"]]))(case)
        return found["image"], found.get("label")


def second_epoch(
    dataset_dir: str,
    cache_dir: str,
    spatial_size: int,
    context_size: int,
    num_workers: int,
    groups: int,
    cached: bool,
) -> dict[str, Any]:
    """Seconds per group of an epoch whose cases were all met in the one before."""
    dataset = episodes(dataset_dir, cache_dir, spatial_size, context_size, groups)
    if cached:
        fill_cache(dataset)
    else:
        read = ReadCases({}, dataset.prepared.spatial_size, cache_dir)
        read.cases, read.spacing_mm = dataset.prepared.cases, dataset.prepared.spacing_mm
        dataset.prepared = read
    loader = load(dataset, num_workers)
    started = clock()
    for group in loader:
        group["image"].mean()  # touch every voxel
    seconds = (clock() - started) / groups
    return {"seconds": seconds, "check": probe(dataset[0]["image"])}


def episodes(
    dataset_dir: str, cache_dir: str, spatial_size: int, context_size: int, groups: int, augment: bool = False
) -> EpisodeDataset:
    """Training groups of a dataset."""
    return EpisodeDataset.from_folder(
        dataset_dir,
        augment=augment,
        spatial_size=spatial_size,
        cache_dir=cache_dir,
        context_size=context_size,
        groups_per_epoch=groups,
    )


def fill_cache(dataset: EpisodeDataset) -> None:
    """Meet every training case once, as the first epoch does."""
    for cases in dataset.prepared.cases["train"].values():
        for case in cases:
            dataset.prepared.load(case)


def load(dataset: EpisodeDataset, num_workers: int) -> GroupLoader:
    """The loader of training."""
    return GroupLoader(dataset, num_workers=num_workers)


@contextmanager
def made_dataset(dataset_dir: str = "", quick: bool = False) -> Iterator[str]:
    """The given folder, or a temporary one with synthetic subjects."""
    if dataset_dir:
        yield dataset_dir
        return
    from scripts.data.synthesis.cohort_writer import write_cohorts

    with tempfile.TemporaryDirectory() as folder:
        yield str(write_cohorts(folder, 1, SUBJECTS, 16 if quick else HEAD, num_labels=1 if quick else 4)[0])


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(data_path)
