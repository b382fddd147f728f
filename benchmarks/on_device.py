"""All that a device is asked to do, in one prepared script, once each in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, Run, clock, peak_mib, work
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main
from scripts.runtime.workflow import start_workflow

CONTEXTS = 8


@work
def everything(run: Run, output_dir: str, minutes: float = 1.0) -> Iterator[Row]:
    """Seconds and peak memory of alignment, prediction, tuning and both training stages.

    Data are synthetic cohorts. Alignment, prediction and tuning are those of the shipped network with eight contexts,
    the second time, when nothing has to be read or compiled; both stages train at full width on 128 voxels a side, a
    few groups. ``--quick true`` tries all of it with small volumes and narrow networks. Times end when the device has
    nothing left to do.

    Args:
        run: how it is run.
        output_dir: for data and runs; a new folder.
        minutes: of tuning.
    """
    size, wide = 128, {"spatial_size": 128, "groups_per_epoch": 8, "val_groups": 2}
    if run.quick:
        size, minutes = 32, 0.2
        wide = {"channels": [4, 8], "spatial_size": 16, "groups_per_epoch": 2, "val_groups": 1}
    (cohort,) = write_cohorts(f"{output_dir}/data", 1, CONTEXTS + 6, spatial_size=size, num_labels=2)
    images = sorted((cohort / "imagesTr").glob("*.nii.gz"))
    labels = [cohort / "labelsTr" / image.name.replace("_0000", "") for image in images]
    for precision, amp in (("float32", False), ("bfloat16", True)):
        out = Path(output_dir, precision)
        inferer = ICLInferer("models/model.pt", torch.device(run.device), amp=amp)
        inferer.set_context(images[:CONTEXTS], labels[:CONTEXTS])
        inferer.predict(images[-2])
        target = inferer.target(load_volume(images[-1]))
        training = {"dataset_dir": f"{output_dir}/data", "output_dir": str(out), "device": run.device, "amp": amp}
        training |= wide | {"epochs": 1, "num_workers": 0}
        works = {
            f"alignment, K={CONTEXTS}": partial(inferer.prepare_views, target),
            "prediction after it": partial(inferer.complete, target),
            f"tuning for {minutes:g} minutes": partial(inferer.tune, minutes, out / "tuned"),
            f"stage 1, {wide['groups_per_epoch']} groups": partial(_train, "stage1", training),
            f"stage 2, {wide['groups_per_epoch']} groups": partial(_train, "stage2", training),
        }
        for name, one in works.items():
            yield Row(name, _measured(run.device, one), f"a synthetic cohort of {size}³", precision)


def _train(stage: str, given: dict[str, Any]) -> None:
    workflow = start_workflow(f"train_{stage}.json", given)
    workflow.run()
    workflow.finalize()


def _measured(device: str, work: Callable[[], Any]) -> dict[str, float]:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = clock(device)
    work()
    return {"seconds": clock(device) - started} | ({"peak_mib": peak_mib(device)} if cuda else {})


WORKS = {"everything": everything}

if __name__ == "__main__":
    main(WORKS)
