"""Synthetic cohorts written as nnU-Net datasets."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from torch import Tensor
from tqdm import tqdm

from scripts.data.synthesis.cohort import MAX_LABELS, Cohort, check_range, checked_size, synthesize_cohort
from scripts.data.synthesis.label_map_anatomy import LabelMaps
from scripts.runtime.output_folder import check_folder, put_folder_in_place

INTENSITY_SCALE = 1000
"""Value in the written int16 images that stands for the intensity 1."""


def write_cohorts(
    output_dir: str | os.PathLike,
    cohorts: int,
    subjects: int,
    spatial_size: int | Sequence[int] = 64,
    num_labels: int = 4,
    modalities: int = 1,
    label_maps: LabelMaps | None = None,
    label_map_share: float = 1.0,
    spread: float | None = None,
    seed: int = 0,
    spacing_mm: float = 1.0,
    start_id: int = 900,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write cohorts as nnU-Net v2 datasets: ``Dataset900_Synthetic000``, ``Dataset901_Synthetic001`` and so on.

    A dataset appears complete or not at all, whenever the run is interrupted.

    Args:
        output_dir: folder to hold the datasets; made if missing.
        cohorts: how many datasets.
        subjects: how many cases in each.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labels; in some cohorts the last one is a lesion that some subjects lack.
        modalities: contrasts of every case, channels 0, 1 and so on.
        label_maps: real anatomies to draw from.
        label_map_share: share of the cohorts that are drawn from them.
        spread: how far the subjects are put apart, from 0 (all in one pose) to 1; None draws it, mostly high.
        seed: of the run; cohort i is ``synthesize_cohort((seed, i), …)``.
        spacing_mm: edge length of a voxel.
        start_id: number of the first dataset.
        overwrite: replace datasets of the same name; nothing else in the folder is touched.
        progress: show a bar.

    Returns:
        The dataset folders.

    Raises:
        FileExistsError: a dataset to be written, or another one of the same number, is there already.
        ValueError: an argument is out of range.
    """
    output_dir = Path(output_dir)
    size = checked_size(spatial_size)
    check_range("cohorts", cohorts, 1)
    check_range("subjects", subjects, 1)
    check_range("num_labels", num_labels, 1, MAX_LABELS)
    check_range("seed", seed, 0)
    check_range("start_id", start_id, 1)
    if not 0 < spacing_mm < math.inf:
        raise ValueError(f"spacing_mm must be a positive number, got {spacing_mm}")
    folders = [output_dir / f"Dataset{start_id + i:03d}_Synthetic{i:03d}" for i in range(cohorts)]
    _check_free(output_dir, folders, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    for i, folder in enumerate(tqdm(folders, desc="synthesize", unit="cohort", disable=not progress)):
        cohort = synthesize_cohort(
            (seed, i), subjects, size, num_labels, modalities, label_maps, label_map_share, spread
        )
        # a hidden sibling: same file system, so that the dataset can be renamed into its place in one step
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".synthesize-") as staging:
            made = Path(staging) / folder.name
            _write_dataset(made, cohort, spacing_mm, f"synthetic{start_id + i:03d}", (seed, i))
            put_folder_in_place(made, folder, Path(staging) / "replaced")
    return folders


def _check_free(output_dir: Path, folders: list[Path], overwrite: bool) -> None:
    for folder in folders:
        number = folder.name.partition("_")[0]
        for found in sorted(output_dir.glob(f"{number}_*")):
            if found.name != folder.name:  # nnU-Net finds a dataset by its number
                raise FileExistsError(f"{found} has the number of {folder.name}: give another start_id or output_dir")
            if not overwrite:
                raise FileExistsError(f"{found} exists: give another output_dir or overwrite")
            check_folder(folder, overwrite, "output_dir")


def _write_dataset(folder: Path, cohort: Cohort, spacing_mm: float, prefix: str, seed: tuple[int, int]) -> None:
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    scaled = (cohort.images * INTENSITY_SCALE).round().short()
    for number, (channels, label) in enumerate(zip(scaled, cohort.labels, strict=True)):
        case = f"{prefix}_{number:02d}"
        for channel, image in enumerate(channels):
            _write_nifti(folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz", image, spacing_mm)
        _write_nifti(folder / "labelsTr" / f"{case}.nii.gz", label[0], spacing_mm)
    channels = cohort.images.shape[1]
    description = {
        "name": folder.name.partition("_")[2],
        "description": f"Synthetic cohort, seed {list(seed)}: subjects of one anatomy",
        "reference": "https://arxiv.org/abs/2509.19711",
        "licence": "unrestricted: generated; label maps that it was made from have a licence of their own",
        "channel_names": {str(k): "Synthetic" if channels == 1 else f"Synthetic{k}" for k in range(channels)},
        "labels": {"background": 0} | {name: label for label, name in enumerate(cohort.names, start=1)},
        "numTraining": len(cohort.images),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _write_nifti(path: Path, volume: Tensor, spacing_mm: float) -> None:
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    image = nib.Nifti1Image(volume.numpy(), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
