"""Peak memory of bringing a large scan to the grid and its answer back.

    python -m benchmarks.scan_memory [--shape "[512,512,400]" --labels 2 --spatial_size 128]

The scan is noise in float32 with 0.5 mm voxels; scores are made up: noise in
a box of 1/27 of the grid per label. What the process holds before it (libraries, and
the scan's own array, which the caller has anyway) is told apart from what is needed besides.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
from monai.data import MetaTensor

from scripts.commandline import main
from scripts.data.preprocessing import Preprocessing
from scripts.data.volumes import volume_digest
from scripts.engine import MASK_THRESHOLD


def scan_memory(shape: Sequence[int] = (512, 512, 400), labels: int = 2, spatial_size: int = 128) -> None:
    """Print seconds and memory in MiB.

    Args:
        shape: voxels of the scan.
        labels: number of score maps.
        spatial_size: voxels of the grid per axis; the scan just fits it.
    """
    voxels = np.empty((1, *shape), np.float32)
    rng = np.random.default_rng(0)
    for part in voxels[0]:
        part[:] = rng.random(part.shape, np.float32)
    scan = MetaTensor(voxels, affine=torch.diag(torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64)))
    process = Preprocessing((spatial_size,) * 3, 0.5 * max(shape) / spatial_size)
    before, started = _peak_mib(), time.perf_counter()
    target = process.target(scan)
    volume_digest(scan)
    there = time.perf_counter()
    scores = torch.zeros(labels, *target.shape[1:])
    for score in scores:  # each label has a third of the grid's edges to itself, and shares it with some others
        corner = [int(rng.integers(0, n - n // 3 + 1)) for n in score.shape]
        region = tuple(slice(low, low + n // 3) for low, n in zip(corner, score.shape, strict=True))
        score[region] = target.as_tensor()[0][region].sqrt()
    answer = process.to_native_labels(scores, target, range(1, labels + 1), MASK_THRESHOLD)
    print(
        json.dumps(
            {
                "shape": list(shape),
                "labels": labels,
                "scan_mib": round(voxels.nbytes / 2**20, 1),
                "answer_mib": round(answer.numel() / 2**20, 1),
                "peak_mib": round(_peak_mib(), 1),
                "beyond_libraries_and_scan_mib": round(_peak_mib() - before, 1),
                "seconds_to_grid": round(there - started, 2),
                "seconds_back": round(time.perf_counter() - there, 2),
                "foreground": round(float((answer > 0).float().mean()), 3),
                "device": "cpu",
            }
        )
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(scan_memory)
