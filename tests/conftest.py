"""Shared by all tests: repository on the path, one thread, fixed seeds, the folder with data and fixtures."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.utils import set_determinism

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))
# of every worker and of what it starts: more threads than cores make all slower, and another number rounds differently
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    set_determinism(0)
    yield
    set_determinism(None)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the parity fixtures and the data; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("NEUROVERSE3D_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no fixtures and data at {folder}: set NEUROVERSE3D_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def write_nifti():
    """``write_nifti(path, voxels, affine=None) -> Path``: one NIfTI file, its folder made if need be."""

    def write(path, voxels, affine=None) -> Path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(voxels), np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture(scope="session")
def rewrite(write_nifti):
    """``rewrite(path, change)``: replace a file's voxels by ``change(voxels)``, affine kept."""

    def replace(path, change):
        source = nib.load(path)
        write_nifti(path, change(np.asanyarray(source.dataobj)), source.affine)

    return replace


@pytest.fixture(scope="session")
def make_dataset(write_nifti):
    """``make_dataset(folder, name, cases, ...) -> Path``: a small nnU-Net dataset.

    The image of every case is dim noise with two bright balls of their own intensity, at places that differ from
    case to case; the label file has 1 and 2 there. A second channel is the first one upside down.

    ``cases`` is a number (``case_00``, ...) or the names. ``labels`` is the "labels" entry of a version 2
    ``dataset.json``; ``version=1`` writes it the other way round, ``version=None`` writes no file.
    """

    def make(
        folder,
        name="Dataset001_Blobs",
        cases=6,
        labels=None,
        version=2,
        size=(16, 16, 16),
        affine=None,
        channels=(0,),
        ending=".nii.gz",
        seed=0,
    ) -> Path:
        root = Path(folder) / name
        names = [f"case_{i:02d}" for i in range(cases)] if isinstance(cases, int) else list(cases)
        labels = {"background": 0, "first": 1, "second": 2} if labels is None else labels
        rng = np.random.default_rng([seed, *name.encode()])
        grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
        for case in names:
            image = rng.integers(1, 100, size).astype(np.int16)
            label = np.zeros(size, np.uint8)
            for value, half in ((1, 0), (2, 1)):  # each in its own half of the first axis, so that they never touch
                low = np.array([3 + half * size[0] // 2, 3, 3])
                high = np.array([size[0] // 2 * (1 + half) - 3, size[1] - 3, size[2] - 3])
                ball = np.linalg.norm(grid - rng.integers(low, np.maximum(high, low + 1)), axis=-1) <= 2
                image[ball] = 400 * value + rng.integers(0, 50)
                label[ball] = value
            for channel in channels:
                voxels = image if channel == 0 else (1000 - image).astype(np.int16)
                write_nifti(root / "imagesTr" / f"{case}_{channel:04d}{ending}", voxels, affine)
            write_nifti(root / "labelsTr" / f"{case}{ending}", label, affine)
        if version is not None:
            described = {str(v): k for k, v in labels.items()} if version == 1 else labels
            names_of_channels = {"modality" if version == 1 else "channel_names": {str(c): f"C{c}" for c in channels}}
            content = names_of_channels | {"labels": described, "numTraining": len(names), "file_ending": ending}
            (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        return root

    return make
