"""Does the loader starve the training step: how long the narrow network waits for its groups.

    python -m benchmarks.loader_wait [--dataset_dir DATA] [--spatial_size 48 --channels "[16,32,64,128]"]

Loader and training each run alone, and then together as in training, with augmentation. In the second epoch, when all
cases are cached.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.data_path import episodes, fill_cache, load, made_dataset
from benchmarks.networks import NARROW, TINY, make_network
from benchmarks.paired import Conditions, Side, benchmark, clock, compare
from scripts.losses import SmoothL3L1Loss
from scripts.training.engine import prepare_episode

_WARM_UP_GROUPS = 2


@benchmark
def loader_wait(
    conditions: Conditions,
    dataset_dir: str = "",
    spatial_size: int = 48,
    context_size: int = 3,
    mini_context_size: int = 3,
    channels: Sequence[int] = NARROW,
    groups: int = 8,
    num_workers: int = 2,
) -> Iterator[dict[str, Any]]:
    """Measure loader, training and both.

    Args:
        conditions: of the measurement.
        dataset_dir: folder of an nnU-Net dataset; empty makes one.
        spatial_size: voxels per axis of the grid.
        context_size: pairs of a group, besides the target.
        mini_context_size: pairs that run at once.
        channels: network widths.
        groups: groups of the epoch.
        num_workers: processes that load.
    """
    if conditions.quick:
        spatial_size, channels, groups, num_workers = 16, TINY, 3, 0
    with made_dataset(dataset_dir, conditions.quick) as data, tempfile.TemporaryDirectory() as cache_dir:
        arguments = {
            "dataset_dir": data,
            "cache_dir": cache_dir,
            "spatial_size": spatial_size,
            "context_size": context_size,
            "mini_context_size": mini_context_size,
            "channels": channels,
            "groups": groups,
            "num_workers": num_workers,
            "device": conditions.device,
        }
        parts = {
            "loader alone": {"loads": True, "trains": False},
            "training alone": {"loads": False, "trains": True},
            "together": {"loads": True, "trains": True},
        }
        sides = {name: Side("loader_wait:epoch", arguments | part) for name, part in parts.items()}
        record = compare(sides, conditions, pairs=1)
    yield {"case": f"{spatial_size}^3 L={context_size}, channels {channels[0]} to {channels[-1]}, per group"} | record


def epoch(
    dataset_dir: str,
    cache_dir: str,
    spatial_size: int,
    context_size: int,
    mini_context_size: int,
    channels: Sequence[int],
    groups: int,
    num_workers: int,
    device: str,
    loads: bool,
    trains: bool,
) -> dict[str, Any]:
    """Seconds per group of an epoch, and the share of them that was spent waiting for the loader.

    The first groups are not counted: workers start, and libraries set themselves up.
    """
    dataset = episodes(dataset_dir, cache_dir, spatial_size, context_size, groups + _WARM_UP_GROUPS, augment=True)
    fill_cache(dataset)
    loader = load(dataset, num_workers)
    network = make_network("ours", channels, spatial_size, device).train()
    optimizer, loss_function = torch.optim.Adam(network.parameters(), 1e-5), SmoothL3L1Loss()
    source = iter(loader)
    group = next(source)
    waited = 0.0
    started = clock(device)
    for number in range(1, groups + _WARM_UP_GROUPS):
        if number == _WARM_UP_GROUPS:
            waited, started = 0.0, clock(device)
        asked = clock(device)
        group = next(source) if loads else group
        waited += clock(device) - asked
        for target in range(group["image"].shape[1] if trains else 0):
            image, label, _, contexts = prepare_episode({**group, "target": target}, device)
            optimizer.zero_grad()
            loss_function(network(image, **contexts | {"mini_context_size": mini_context_size}), label).backward()
            optimizer.step()
    total = clock(device) - started
    return {"seconds": total / groups, "waiting_share": waited / total}


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(loader_wait)
