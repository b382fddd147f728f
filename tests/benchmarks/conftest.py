"""Measurements in this process instead of fresh ones, quick, and their figures mean nothing; and made-up heads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import measure
from benchmarks.head_scenes import HELD_OUT, STRUCTURES


@pytest.fixture
def rows(monkeypatch):
    """``rows(benchmark, **given) -> list``: what a quick run yields, measured in this process."""
    monkeypatch.setattr(
        measure,
        "measure_apart",
        lambda side, threads: measure.call(side.function, json.loads(json.dumps(dict(side.arguments)))),
    )
    return lambda benchmark, **given: list(benchmark.__wrapped__(measure.Run(quick=True), **given))


@pytest.fixture(scope="session")
def label_maps(tmp_path_factory, write_nifti):
    """Heads of 192 mm with a brain, ten balls in it and a neck; structures of two sides have both values."""
    folder = tmp_path_factory.mktemp("maps")
    grid = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"), -1)
    for number, name in enumerate((*HELD_OUT, "brain_01", "brain_02", "brain_03")):
        rng = np.random.default_rng(number)
        radius = np.linalg.norm((grid - (24, 24, 30)) / (0.8, 1, 0.9), axis=-1)
        neck = np.linalg.norm(grid[..., :2] - 24, axis=-1) < 9
        voxels = np.zeros((48, 48, 48), np.int16)
        voxels[neck & (grid[..., 2] < 30)] = 507
        voxels[radius < 20] = 515
        voxels[radius < 18] = 2
        voxels[(radius < 17) & (grid[..., 2] < 22)] = 8
        for place, values in enumerate(STRUCTURES.values()):
            centre = np.array([17 + 7 * (place % 3), 15 + 7 * (place // 3 % 3), 27 + 7 * (place // 9)])
            ball = np.linalg.norm(grid - centre - rng.uniform(-0.5, 0.5, 3), axis=-1) < 3.4
            voxels[ball] = values[0]
            voxels[ball & (grid[..., 0] > centre[0])] = values[-1]
        write_nifti(folder / f"{name}.nii.gz", voxels, np.diag([4.0, 4.0, 4.0, 1.0]))
    return folder
