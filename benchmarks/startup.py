"""Seconds from the command to the first inference step, against a MONAI bundle of the plainest kind.

    python -m benchmarks.startup

Both sides are `python -m monai.bundle run` on one small scan with a small network, ended when the network is first
called. The baseline is a bundle of MONAI's own parts that loads, scales and infers; what ours adds to it is imports,
the checkpoint, the contexts and the checks.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks.networks import TINY
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare
from scripts.networks import Neuroverse3D

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


@benchmark
def startup(conditions: Conditions) -> Iterator[dict[str, Any]]:
    """Compare the two bundles.

    Args:
        conditions: of the measurement.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = make_scene(Path(folder))
        commands = {
            BASELINE: f"--config_file {folder}/stock.json --image {data}/imagesTr/case_0_0000.nii.gz",
            "ours": f"--config_file configs/inference.json --dataset_dir {data} --context_dir {data} --checkpoint "
            f"{folder}/model.pt --output_dir {folder}/predictions --overwrite true",
        }
        sides = {
            name: Side("startup:until_first_call", {"options": f"{options} --device {conditions.device}"})
            for name, options in commands.items()
        }
        record = compare(sides, conditions, pairs=5)
    seconds = {name: figures["seconds"] for name, figures in record["sides"].items()}
    yield {"case": "until the first step"} | record | {"added_seconds": seconds["ours"] - seconds[BASELINE]}


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


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(startup)
