"""Seconds per scan for many labels of a whole head, from the volume in memory to its label map.

    python -m benchmarks.whole_brain --label_maps DIR [--labels 35 --context_size 4 --spatial_size 128]

One grid for everything against half the grid with a second pass for each label (``--refine true``). Heads are label
maps of real subjects with made-up intensities. The weights are made up too, so the scores of the first pass are only
timed: what is looked at again, and brought back to the scan, are the subject's own labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from benchmarks.networks import make_network
from benchmarks.paired import Conditions, Side, benchmark, compare
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer

CHANNELS = (16, 32, 64, 128, 256)
_TISSUES = 500
"""Numbers from here on are tissues outside of the brain, in the label maps of SynthSeg (Billot et al. 2023)."""


@benchmark
def whole_brain(
    conditions: Conditions,
    label_maps: str,
    labels: int = 35,
    context_size: int = 4,
    spatial_size: int = 128,
    channels: Sequence[int] = CHANNELS,
) -> Iterator[dict[str, Any]]:
    """Measure one scan.

    Args:
        conditions: of the measurement.
        label_maps: folder of NIfTI label maps, one more than contexts at least.
        labels: how many labels, the largest ones.
        context_size: number of pairs.
        spatial_size: voxels per axis of the whole grid.
        channels: network widths.
    """
    files = sorted(str(path) for path in Path(label_maps).glob("*.nii*"))[: context_size + 1]
    if len(files) <= context_size:
        raise FileNotFoundError(f"{label_maps} has {len(files)} label maps: --label_maps needs {context_size + 1}")
    arguments = {"files": files, "labels": labels, "channels": channels, "device": conditions.device}
    sides = {
        f"{spatial_size}^3": Side("whole_brain:scan", arguments | {"spatial_size": spatial_size, "refine": False}),
        f"{spatial_size // 2}^3 and --refine true": Side(
            "whole_brain:scan", arguments | {"spatial_size": spatial_size // 2, "refine": True}
        ),
    }
    yield {"case": f"{labels} labels, {context_size} contexts"} | compare(sides, conditions, pairs=1)


def scan(
    files: Sequence[str], labels: int, channels: Sequence[int], device: str, spatial_size: int, refine: bool
) -> dict[str, Any]:
    """Seconds for the last file with the others as contexts, and of its steps."""
    maps = [load_volume(file) for file in files]
    values, counts = torch.cat([m.flatten().as_tensor() for m in maps]).unique(return_counts=True)
    inside = (values > 0) & (values < _TISSUES)
    wanted = sorted(int(v) for v in values[inside][counts[inside].argsort(descending=True)[:labels]])
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(int(values.max()) + 1, generator=generator)
    images = [MetaTensor(means[m.as_tensor().long()], affine=m.affine) for m in maps]
    network = make_network("ours", channels, spatial_size, device).eval()
    predictor = ICLInferer(network, device, labels=wanted, refine=refine)
    started = time.perf_counter()
    predictor.set_context(images[:-1], maps[:-1])
    target = predictor.to_grid(images[-1])
    contexts = time.perf_counter()
    scores = predictor(target[None].to(device), predictor.network)[0].cpu()
    first = time.perf_counter()
    known = ResampleToMatch(mode="nearest")(maps[-1], target).as_tensor()
    scores.copy_(torch.cat([(known == value).float() for value in wanted]))
    reading = time.perf_counter()
    finer = predictor.finer(scores, target) if refine else None
    second = time.perf_counter()
    predictor.answer(scores, target, finer)
    done = time.perf_counter()
    return {
        "seconds": done - started - (reading - first),
        "contexts_s": contexts - started,
        "first_pass_s": first - contexts,
        "second_pass_s": second - reading,
        "way_back_s": done - second,
        "second_passes": sum(_was_run(done) for done in predictor.refined.values()),
    }


def _was_run(report: Mapping[str, Any]) -> bool:
    return "kept" not in report or report["kept"].startswith("nothing was found at")  # made-up weights find nothing


if __name__ == "__main__":
    from scripts.commandline import main

    main(whole_brain)
