"""Seconds and Dice for many labels of a whole head, from the volumes in memory to the label map.

    python -m benchmarks.whole_brain --label_maps MAPS [--checkpoint models/model.pt --labels 35 --context_size 4]

Heads are label maps of real subjects in one made-up contrast; the first file is the target.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from benchmarks.unseen_dataset import mean_dice
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main

_TISSUES = 500
"""Numbers from here on are tissues outside of the brain, in the label maps of SynthSeg (Billot et al. 2023)."""


def whole_brain(
    label_maps: str,
    checkpoint: str = "models/model.pt",
    labels: int = 35,
    context_size: int = 4,
    align: str = "deformable",
    device: str = "cpu",
) -> None:
    """Print seconds of each step, and the mean Dice.

    Args:
        label_maps: folder of NIfTI label maps, one more than contexts at least.
        checkpoint: weights.
        labels: how many labels, the largest ones.
        context_size: number of pairs.
        align: how contexts are brought to the target: off, affine or deformable.
        device: where to compute.
    """
    files = sorted(Path(label_maps).glob("*.nii*"))[: context_size + 1]
    if len(files) <= context_size:
        raise FileNotFoundError(f"{label_maps} has {len(files)} label maps: --label_maps needs {context_size + 1}")
    maps = [load_volume(file) for file in files]
    values, counts = torch.cat([m.flatten().as_tensor() for m in maps]).unique(return_counts=True)
    inside = (values > 0) & (values < _TISSUES)
    wanted = sorted(int(v) for v in values[inside][counts[inside].argsort(descending=True)[:labels]])
    means = torch.rand(int(values.max()) + 1, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    images = [
        MetaTensor(means[m.as_tensor().long()] + 0.05 * torch.randn(m.shape, generator=noise), affine=m.affine)
        for m in maps
    ]
    predictor = ICLInferer(checkpoint, device, labels=wanted, align=align)
    started = time.perf_counter()
    predictor.set_context(images[1:], maps[1:])
    if predictor.aligned is not None:
        predictor.aligned.describe(wanted)
    ready = time.perf_counter()
    target = predictor.complete(predictor.target(images[0]))
    done = time.perf_counter()
    facts = {"labels": len(wanted), "contexts": context_size, "align": align, "device": device}
    facts |= {"seconds_contexts": round(ready - started, 1), "seconds": round(done - ready, 1), **target.seconds}
    facts["dice"] = round(float(np.mean(mean_dice(target.prediction, maps[0], wanted))), 4)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(whole_brain)
