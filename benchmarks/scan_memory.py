"""Peak memory of bringing a large scan to the grid and its prediction back.

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
from torch import Tensor

from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main


class Intensities(torch.nn.Module):
    """In place of a network: predicts the target's intensities."""

    def __init__(self, spatial_size: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.tensor([spatial_size] * 3))

    def forward(self, target: Tensor, images: Tensor, labels: Tensor, mini_context_size: int) -> Tensor:
        """Same shape as ``target``."""
        return target.clone()


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
    spacing = 0.5 * max(shape) / spatial_size
    inferer = ICLInferer(Intensities(spatial_size), "cpu", spacing=spacing, align="off")
    inferer.set_context(*zip(*(_context(labels, spatial_size, spacing, rng) for _ in range(2)), strict=True))
    before, started = _peak_mib(), time.perf_counter()
    target = inferer.target(scan)
    there = time.perf_counter()
    scores = torch.zeros(labels, *target.image.shape[1:])
    for score in scores:  # each label has a third of the grid's edges to itself, and shares it with some others
        corner = [int(rng.integers(0, n - n // 3 + 1)) for n in score.shape]
        region = tuple(slice(low, low + n // 3) for low, n in zip(corner, score.shape, strict=True))
        score[region] = target.image.as_tensor()[0][region].sqrt()
    inferer.prepare_views(target)
    target.scores = [scores]
    prediction = inferer.to_native(target).prediction
    print(
        json.dumps(
            {
                "shape": list(shape),
                "labels": labels,
                "scan_mib": round(voxels.nbytes / 2**20, 1),
                "prediction_mib": round(prediction.numel() / 2**20, 1),
                "peak_mib": round(_peak_mib(), 1),
                "beyond_libraries_and_scan_mib": round(_peak_mib() - before, 1),
                "seconds_to_grid": round(there - started, 2),
                "seconds_back": round(time.perf_counter() - there, 2),
                "foreground": round(float((prediction > 0).float().mean()), 3),
                "device": "cpu",
            }
        )
    )


def _context(labels: int, size: int, spacing: float, rng: np.random.Generator) -> tuple[MetaTensor, MetaTensor]:
    """Noise with each label in a ball of a twentieth of the grid's edge."""
    label = np.zeros((size,) * 3, np.float32)
    places = np.indices(label.shape)
    for value in range(1, labels + 1):
        centre = rng.uniform(0.2, 0.8, 3) * size
        label[sum((p - c) ** 2 for p, c in zip(places, centre, strict=True)) < (size / 20) ** 2] = value
    affine = torch.diag(torch.tensor([spacing] * 3 + [1.0], dtype=torch.float64))
    image = MetaTensor(torch.as_tensor(rng.random(label.shape, np.float32))[None], affine=affine)
    return image, MetaTensor(torch.as_tensor(label)[None], affine=affine)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(scan_memory)
