"""Batches of groups for the engines."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import torch
from monai.data import DataLoader, DistributedSampler

from scripts.data import EpisodeDataset, GroupSampler, collate_groups
from scripts.runtime.termination import leave_sigterm_to_the_trainer


class GroupLoader(DataLoader):
    """MONAI's loader for groups, of which each of several processes loads its share.

    Training groups are new ones every epoch, and all processes have the same number of them, some of them twice if they
    do not divide. Validation groups are the same every time, and none is loaded twice.

    Args:
        dataset: the groups.
        batch_size: groups of a batch.
        num_workers: loading processes; 0 loads in the main process.
        options: further arguments of PyTorch's loader.
    """

    def __init__(self, dataset: EpisodeDataset, batch_size: int = 1, num_workers: int = 0, **options: Any) -> None:
        share = {"num_replicas": idist.get_world_size(), "rank": idist.get_rank()}
        if dataset.part == "train":
            sampler = GroupSampler(dataset, **share)
        else:
            sampler = DistributedSampler(dataset, even_divisible=False, shuffle=False, **share)
        given = {
            "sampler": sampler,
            "collate_fn": collate_groups,
            "worker_init_fn": leave_sigterm_to_the_trainer,
            "pin_memory": torch.cuda.is_available(),
        }
        super().__init__(dataset, num_workers, batch_size=batch_size, **given | options)
