"""What comes before the network: the data path of training, its wait for the loader, and the start of a command."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import BASELINE, Row, Run, Side, clock, compare, rows, work
from benchmarks.network import NARROW, TINY, make_network, named, probe
from scripts.data import EpisodeDataset, PreparedCases
from scripts.data.nnunet import Case
from scripts.data.preprocessing import LoadCase, Preprocessing
from scripts.losses import SmoothL3L1Loss
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main
from scripts.training.engine import prepare_episode
from scripts.training.loader import GroupLoader

HEAD = (160, 192, 160)
"""Voxels of a made subject."""
SUBJECTS = 8
READ_GROUPS = 2
"""Groups that the baseline reads; it needs seconds for each."""
_MADE = "made heads"
_WARM_UP_GROUPS = 2
_SIZE = 16
_REACHED = 77  # exit status
_RUN = f"""
import os, runpy, sys
from torch.nn.modules.module import register_module_forward_pre_hook
end = lambda *_: os._exit({_REACHED})
register_module_forward_pre_hook(end)
if "configs/inference.json" in sys.argv:  # on a CPU it does not go through its modules' calls
    from scripts.networks import Neuroverse3D
    Neuroverse3D.encode_target = end
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""
_STOCK = {
    "imports": ["$import torch"],
    "image": None,
    "device": "cpu",
    "network": {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": [2, 4],
                "strides": [2]},
    "preprocessing": {"_target_": "Compose", "transforms": [
        {"_target_": "LoadImaged", "keys": "image", "image_only": True, "ensure_channel_first": True},
        {"_target_": "ScaleIntensityd", "keys": "image"}]},
    "dataset": {"_target_": "Dataset", "data": [{"image": "@image"}], "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
    "evaluator": {"_target_": "SupervisedEvaluator", "device": "$torch.device(@device)",
                  "val_data_loader": "@dataloader", "network": "$@network.to(@device)",
                  "inferer": {"_target_": "SimpleInferer"}},
    "run": ["$@evaluator.run()"],
}  # fmt: skip


@work
def groups(
    run: Run,
    dataset_dir: str = "",
    spatial_size: int = 128,
    context_size: int = 3,
    groups: int = 100,
    num_workers: int = 2,
    pairs: int = 3,
) -> Iterator[Row]:
    """Seconds per group of the second epoch, against reading and preprocessing the NIfTI files each time.

    Args:
        run: how it is run.
        dataset_dir: folder of an nnU-Net dataset; empty makes one of synthetic subjects, of the size of a head at 1 mm.
        spatial_size: voxels per axis of the grid.
        context_size: pairs of a group, besides the target.
        groups: groups of an epoch of ours.
        num_workers: processes that load.
        pairs: how often both sides are measured.
    """
    if run.quick:
        spatial_size, groups, num_workers = 16, 2, 0
    with _dataset(dataset_dir, run.quick) as data, tempfile.TemporaryDirectory() as cache_dir:
        given = {
            "dataset_dir": data,
            "cache_dir": cache_dir,
            "spatial_size": spatial_size,
            "context_size": context_size,
            "num_workers": num_workers,
        }
        sides = {
            BASELINE: Side("loading:second_epoch", given | {"cached": False, "groups": READ_GROUPS}),
            "ours": Side("loading:second_epoch", given | {"cached": True, "groups": groups}),
        }
        case = f"{spatial_size}³ L={context_size}, {num_workers} loading processes, per group"
        yield from rows(case, compare(sides, run, pairs), Path(dataset_dir).name or _MADE)


@work
def wait(
    run: Run,
    dataset_dir: str = "",
    spatial_size: int = 48,
    context_size: int = 3,
    mini_context_size: int = 3,
    channels: Sequence[int] = NARROW,
    groups: int = 8,
    num_workers: int = 2,
) -> Iterator[Row]:
    """How long the narrow network's training waits for its groups, with augmentation, all cases cached.

    Args:
        run: how it is run.
        dataset_dir: folder of an nnU-Net dataset; empty makes one of synthetic subjects.
        spatial_size: voxels per axis of the grid.
        context_size: pairs of a group, besides the target.
        mini_context_size: context pairs that run at once.
        channels: network widths.
        groups: groups of the epoch.
        num_workers: processes that load.
    """
    if run.quick:
        spatial_size, channels, groups, num_workers = 16, TINY, 3, 0
    with _dataset(dataset_dir, run.quick) as data, tempfile.TemporaryDirectory() as cache_dir:
        given = {
            "dataset_dir": data,
            "cache_dir": cache_dir,
            "spatial_size": spatial_size,
            "context_size": context_size,
            "mini_context_size": mini_context_size,
            "channels": channels,
            "groups": groups,
            "num_workers": num_workers,
            "device": run.device,
        }
        parts = {"loader alone": (True, False), "training alone": (False, True), "together": (True, True)}
        sides = {
            name: Side("loading:epoch", given | {"loads": loads, "trains": trains})
            for name, (loads, trains) in parts.items()
        }
        case = f"{named(spatial_size, context_size, channels)}, per group"
        yield from rows(case, compare(sides, run, pairs=1), Path(dataset_dir).name or _MADE)


@work
def start(run: Run, pairs: int = 5) -> Iterator[Row]:
    """Seconds from the command to the first inference step, against a bundle of MONAI's own parts.

    Both are ``python -m monai.bundle run`` on one small scan with a small network, ended when the network is first
    called; what ours adds is imports, the checkpoint, the contexts and the checks.

    Args:
        run: how it is run.
        pairs: how often both sides are measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = make_scene(Path(folder))
        commands = {
            BASELINE: f"--config_file {folder}/stock.json --image {data}/imagesTr/case_0_0000.nii.gz",
            "ours": f"--config_file configs/inference.json --dataset_dir {data} --context_dir {data} --checkpoint "
            f"{folder}/model.pt --output_dir {folder}/predictions --overwrite true",
        }
        sides = {
            name: Side("loading:until_first_call", {"options": f"{options} --device {run.device}"})
            for name, options in commands.items()
        }
        found = compare(sides, run, pairs)
    found["ours"]["added_seconds"] = found["ours"]["seconds"] - found[BASELINE]["seconds"]
    yield from rows("until the first inference step", found, "a scan of noise")


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
    dataset = _episodes(dataset_dir, cache_dir, spatial_size, context_size, groups)
    if cached:
        _fill_cache(dataset)
    else:
        read = ReadCases({}, dataset.prepared.spatial_size, cache_dir)
        read.cases, read.spacing_mm = dataset.prepared.cases, dataset.prepared.spacing_mm
        dataset.prepared = read
    loader = GroupLoader(dataset, num_workers=num_workers)
    started = clock()
    for group in loader:
        group["image"].mean()  # touch every voxel
    seconds = (clock() - started) / groups
    return {"seconds": seconds, "check": probe(dataset[0]["image"])}


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
    dataset = _episodes(dataset_dir, cache_dir, spatial_size, context_size, groups + _WARM_UP_GROUPS, augment=True)
    _fill_cache(dataset)
    network = make_network("ours", channels, spatial_size, device).train()
    optimizer, loss_function = torch.optim.Adam(network.parameters(), 1e-5), SmoothL3L1Loss()
    source = iter(GroupLoader(dataset, num_workers=num_workers))
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


def make_scene(folder: Path) -> Path:
    """Write the plain bundle's configuration, a checkpoint, and a dataset of noise, which is returned."""
    rng = np.random.default_rng(0)
    for case in range(3):
        for name, high in ((f"imagesTr/case_{case}_0000", 1000), (f"labelsTr/case_{case}", 2)):
            path = folder / "Dataset001_Noise" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(rng.integers(0, high, (_SIZE,) * 3, np.int16), np.eye(4)), path)
    torch.save(Neuroverse3D(channels=TINY, spatial_size=_SIZE).state_dict(), folder / "model.pt")
    (folder / "stock.json").write_text(json.dumps(_STOCK), encoding="utf-8")
    return folder / "Dataset001_Noise"


def until_first_call(options: str) -> dict[str, Any]:
    """Seconds until the bundle run with these options first calls a network.

    Raises:
        ValueError: it ended before.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "run", *shlex.split(options)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != _REACHED:
        words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise ValueError(f"the run ended with status {done.returncode} before its first step: {words}")
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024}


def _episodes(
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


def _fill_cache(dataset: EpisodeDataset) -> None:
    """Meet every training case once, as the first epoch does."""
    for cases in dataset.prepared.cases["train"].values():
        for case in cases:
            dataset.prepared.load(case)


@contextmanager
def _dataset(dataset_dir: str, quick: bool) -> Iterator[str]:
    """The given folder, or a temporary one with synthetic subjects."""
    if dataset_dir:
        yield dataset_dir
        return
    from scripts.data.synthesis.cohort_writer import write_cohorts

    with tempfile.TemporaryDirectory() as folder:
        yield str(write_cohorts(folder, 1, SUBJECTS, 16 if quick else HEAD, num_labels=1 if quick else 4)[0])


WORKS = {"groups": groups, "wait": wait, "start": start}

if __name__ == "__main__":
    main(WORKS)
