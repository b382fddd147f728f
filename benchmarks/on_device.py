"""All that a device is asked to do, once each in float32 and bfloat16: seconds and peak memory.

    python -m benchmarks.on_device --output_dir OUT [--device cuda --quick true]

Data are synthetic cohorts. Alignment, prediction and tuning are those of the shipped network with eight contexts, the
second time, when nothing has to be read or compiled; both stages train at full width on 128 voxels a side, a few
groups. ``--device cpu --quick true`` tries all of it in small. Times end when the device has nothing left to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main
from scripts.runtime.options import flag
from scripts.runtime.workflow import start_workflow

CONTEXTS = 8


def on_device(output_dir: str, device: str = "cuda", minutes: float = 1.0, quick: bool = False) -> None:
    """Print a row for each piece of work and precision.

    Args:
        output_dir: for data and runs; a new folder.
        device: where to compute.
        minutes: of tuning.
        quick: small volumes and narrow networks, to see that it runs.
    """
    quick, where = flag(quick), torch.device(device)
    small = {"channels": [4, 8], "spatial_size": 16, "groups_per_epoch": 2, "val_groups": 1}
    size, wide = (32, small) if quick else (128, {"spatial_size": 128, "groups_per_epoch": 8, "val_groups": 2})
    (cohort,) = write_cohorts(f"{output_dir}/data", 1, CONTEXTS + 6, spatial_size=size, num_labels=2)
    images = sorted((cohort / "imagesTr").glob("*.nii.gz"))
    labels = [cohort / "labelsTr" / image.name.replace("_0000", "") for image in images]
    for amp in (False, True):
        name = "bfloat16" if amp else "float32"
        out = Path(output_dir, name)
        inferer = ICLInferer("models/model.pt", where, amp=amp)
        inferer.set_context(images[:CONTEXTS], labels[:CONTEXTS])
        inferer.predict(images[-2])
        target = inferer.target(load_volume(images[-1]))
        _measured(f"alignment, K={CONTEXTS}, {name}", where, lambda i=inferer, t=target: i.prepare_views(t))
        _measured(f"prediction after it, {name}", where, lambda i=inferer, t=target: i.complete(t))
        _measured(
            f"tuning for {minutes:g} minutes, {name}", where, lambda i=inferer, o=out: i.tune(minutes, o / "tuned")
        )
        for stage in ("stage1", "stage2"):
            given = {"dataset_dir": f"{output_dir}/data", "output_dir": str(out), "device": device, "amp": amp}
            given |= wide | {"epochs": 1, "num_workers": 0}
            _measured(
                f"{stage}, {wide['groups_per_epoch']} groups, {name}", where, lambda s=stage, g=given: _train(s, g)
            )


def _train(stage: str, given: dict[str, Any]) -> None:
    workflow = start_workflow(f"train_{stage}.json", given)
    workflow.run()
    workflow.finalize()


def _measured(name: str, device: torch.device, work: Callable[[], Any]) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    peak, started = "", time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
    print(f"{name}: {time.perf_counter() - started:.2f} s{peak}", flush=True)


if __name__ == "__main__":
    main(on_device)
