"""Make test data for a restoration task: clean images -> a dataset of corrupted (0000) and clean (0001) channels.

Command line::

    python -m scripts.corrupt --dataset_dir CLEAN --output_dir DATA/Dataset500_Inpainting --task inpainting

The dataset serves as targets and contexts of ``inference.json`` (``--task generation --channel 0
--context_label_channel 1``) and as the reference of ``evaluate.json`` (``--reference_channel 1``).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import ScaleIntensityRangePercentiles
from tqdm import tqdm

from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, find_targets
from scripts.data.preprocessing import PERCENTILES
from scripts.data.tasks import Corruption, Setting, find_task
from scripts.data.volumes import load_volume
from scripts.runtime.atomic_files import write_json
from scripts.runtime.options import flag, normalise
from scripts.runtime.output_folder import check_folder, put_folder_in_place


def corrupt(
    dataset_dir: str,
    output_dir: str,
    task: str,
    channel: int = 0,
    seed: int = 0,
    rescale: bool = False,
    skip_bad_cases: bool = False,
    overwrite: bool = False,
) -> None:
    """Write every image twice, corrupted and clean, as a two-channel nnU-Net dataset.

    How strong and of which kind the corruption is gets drawn once for the dataset and noted in its dataset.json;
    noise, field or mask are drawn for each case. Voxels, affine and units of intensity are those of the clean
    image, so that noise and the like count in a comparison and nothing else does.

    Args:
        dataset_dir: clean images: an nnU-Net dataset (its imagesTs, else its imagesTr), a folder of images or one file.
        output_dir: the dataset folder to make, such as DATA/Dataset500_Inpainting; it appears complete or not at all.
        task: bias_correction, gaussian_denoising, salt_pepper_denoising, inpainting, super_resolution or 2d_to_3d.
        channel: image channel of an nnU-Net dataset.
        seed: the same seed gives the same data.
        rescale: clip clean images to their 0.5 and 99.5 percentiles and scale them to [0, 1], for scans whose raw
            intensities are not on one scale (predictions have the mean range of the contexts).
        skip_bad_cases: go on without faulty images instead of stopping.
        overwrite: replace a dataset that this program made.
    """
    chosen = find_task(task)
    if not isinstance(chosen, Corruption):
        raise ValueError(f"--task {task} needs no corruption: what it is to produce is in the data already")
    seed = normalise("seed", seed)
    if seed is None or seed < 0:
        raise ValueError(f"--seed must be a whole number of at least 0, got {seed}")
    source, folder = Path(dataset_dir), Path(os.path.abspath(output_dir))
    _check_place(folder, source, flag(overwrite))
    cases = sound_cases(inspect_cases(find_targets(source, normalise("channel", channel))), flag(skip_bad_cases))
    setting = chosen.setting(np.random.default_rng([seed, 0]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a hidden sibling: same file system, so that the dataset can be renamed into its place in one step
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".corrupt-") as staging:
        made = Path(staging) / folder.name
        _write_dataset(made, cases, chosen, setting, seed, flag(rescale))
        put_folder_in_place(made, folder, Path(staging) / "replaced")
    print(f"{folder}: {len(cases)} cases, {task} with {setting}")


def _check_place(folder: Path, source: Path, overwrite: bool) -> None:
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"--output_dir {folder} holds the clean images: give another folder")
    check_folder(folder, overwrite)


def _write_dataset(
    folder: Path, cases: Sequence[Case], task: Corruption, setting: Setting, seed: int, rescale: bool
) -> None:
    to_unit = ScaleIntensityRangePercentiles(*PERCENTILES, 0.0, 1.0, clip=True)
    (folder / "imagesTr").mkdir(parents=True)
    for case in tqdm(cases, desc=task.name, unit="case"):
        clean = load_volume(case["image"])
        if rescale:
            clean = to_unit(clean)
        low, high = float(clean.min()), float(clean.max())
        rng = np.random.default_rng([seed, *case["case"].encode()])  # does not hang on which other cases there are
        corrupted = task.corrupt(((clean - low) / (high - low)).as_tensor(), setting, rng)
        for number, volume in enumerate((corrupted * (high - low) + low, clean)):
            _write_nifti(volume, clean, folder / "imagesTr" / f"{case['case']}_{number:04d}.nii.gz")
    description: dict[str, Any] = {
        "name": folder.name.partition("_")[2] or folder.name,
        "description": f"Corrupted and clean images for {task.name}",
        "channel_names": {"0": f"corrupted ({task.name})", "1": "clean"},
        "labels": {"background": 0},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "corruption": {"task": task.name, "setting": setting, "seed": seed},
    }
    write_json(description, folder / "dataset.json")


def _write_nifti(volume: Any, source: MetaTensor, path: Path) -> None:
    image = nib.Nifti1Image(np.asarray(volume[0], dtype=np.float32), np.asarray(source.affine, dtype=float))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(corrupt)
