"""Convert raw files to an nnU-Net dataset that training and inference read.

Command line::

    python -m scripts.prepare_data --input_dir RAW --output_dir DATA --dataset_name MyDataset \
        --image_pattern "*_img.nii.gz" --mask_pattern "*_gt.nii.gz" --modality MRI
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scripts.data.conversion.bids import pair_bids
from scripts.data.conversion.dataset_writer import write_dataset
from scripts.data.conversion.decathlon import read_decathlon
from scripts.data.conversion.dicom import pair_dicom
from scripts.data.conversion.pairing import RawDataset, pair_files, pairing_table
from scripts.data.files import read_json
from scripts.data.integrity import sound_cases
from scripts.runtime.options import flag

_AUTO = "auto"
_PATTERNS = {  # source: default patterns of images and masks
    "files": ("*_img.nii.gz", "*_gt.nii.gz"),
    "decathlon": (None, _AUTO),
    "bids": ("*_T1w.nii.gz", "*_dseg.nii.gz"),
    "dicom": (None, "*.nii.gz"),
}


def prepare_data(
    input_dir: str,
    output_dir: str,
    dataset_name: str,
    source: str = "files",
    image_pattern: str | Sequence[str] = _AUTO,
    mask_pattern: str | None = _AUTO,
    modality: str | Sequence[str] = _AUTO,
    series: str | None = None,
    dataset_id: int = 1,
    label_names: str | None = None,
    skip_bad_cases: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Write ``DATA/Dataset001_MyDataset`` in nnU-Net version 2 layout; see docs/data.md for each source.

    Args:
        input_dir: folder of the raw files, sub-folders included; it is only read.
        output_dir: folder to hold the dataset; made if missing.
        dataset_name: what follows Dataset001_ in the folder's name.
        source: files, decathlon, bids or dicom.
        image_pattern: such as "*_img.nii.gz", or "['*_t1.nii.gz','*_t2.nii.gz']" for two channels; dicom: of folders.
        mask_pattern: such as "*_gt.nii.gz"; None if there are no masks.
        modality: name of the channel, or a list of names; auto takes them from the source.
        series: dicom: part of the description of the series to take where a folder holds several.
        dataset_id: the number in the folder's name.
        label_names: JSON file {"1": "anterior", ...} with names of label values.
        skip_bad_cases: go on without faulty cases instead of stopping.
        overwrite: replace a dataset of the same name.
        dry_run: print which files make up which case, and write nothing.
    """
    name = str(dataset_name)
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or re.match(r"Dataset\d+", name):
        raise ValueError(f"--dataset_name {name!r}: give letters, digits, _ and - only, without the Dataset001_")
    if isinstance(dataset_id, bool) or not isinstance(dataset_id, int) or dataset_id < 1:
        raise ValueError(f"--dataset_id must be a whole number of at least 1, got {dataset_id!r}")
    folder = Path(str(output_dir)) / f"Dataset{dataset_id:03d}_{name}"
    raw = _find_cases(str(input_dir), source, image_pattern, mask_pattern, series)
    raw = replace(raw, channel_names=_channel_names(modality, raw.channel_names))
    names = _read_label_names(label_names) if label_names is not None else {}
    if flag(dry_run):
        print(pairing_table(raw))
        found = [{"case": c.case, "dataset": folder.name, "problems": c.problems} for c in raw.cases]
        sound_cases(found, flag(skip_bad_cases))
        return
    made = write_dataset(raw, folder, names, flag(skip_bad_cases), flag(overwrite))
    channels = ", ".join(f"{number:04d} {channel}" for number, channel in enumerate(raw.channel_names))
    test = f" and {made.test} test cases" if made.test else ""
    print(f"{made.folder}: {made.training} cases{test}, channels {channels}")
    if made.labels is None:
        print("no masks: labelsTr is left out, so the dataset can be segmented but not trained on")
    elif not made.labels:
        print("warning: no mask has a label other than background")
    for label, value in (made.labels or {}).items():
        print(f"  label {value} {label}: in {made.cases_with[value]} cases")


def _find_cases(
    input_dir: str, source: str, image_pattern: str | Sequence[str], mask_pattern: str | None, series: str | None
) -> RawDataset:
    if source not in _PATTERNS:
        raise ValueError(f"--source {source!r} is none of {', '.join(_PATTERNS)}")
    if series is not None and source != "dicom":
        raise ValueError(f"--series goes with --source dicom only, not with {source}")
    default_images, default_masks = _PATTERNS[source]
    images = default_images if image_pattern == _AUTO else image_pattern
    masks = default_masks if mask_pattern == _AUTO else mask_pattern
    images = [str(p) for p in images] if isinstance(images, (list, tuple)) else [str(images)] if images else None
    masks = None if masks is None or str(masks).lower() == "none" else str(masks)
    if source == "decathlon":
        if images or masks not in (_AUTO, None):
            raise ValueError("--source decathlon takes no patterns, but for --mask_pattern None")
        return read_decathlon(input_dir, masks=masks is not None)
    if source == "dicom":
        return pair_dicom(input_dir, images, masks, None if series is None else str(series))
    if not images:
        raise ValueError("--image_pattern is empty")
    return (pair_files if source == "files" else pair_bids)(input_dir, images, masks)


def _channel_names(modality: str | Sequence[str], found: tuple[str, ...]) -> tuple[str, ...]:
    if modality is None or modality == _AUTO:
        return found
    names = tuple(map(str, modality)) if isinstance(modality, (list, tuple)) else (str(modality),)
    if len(names) != len(found):
        raise ValueError(f"--modality names {len(names)} channels ({', '.join(names)}), but there are {len(found)}")
    return names


def _read_label_names(path: str) -> dict[int, str]:
    form = '--label_names takes a JSON file such as {"1": "anterior"}'
    try:
        names = read_json(str(path), dict, form)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}: --label_names takes a JSON file") from None
    if not all(re.fullmatch(r"-?\d{1,18}", value) and isinstance(name, str) for value, name in names.items()):
        raise ValueError(f"{path}: {form}")
    return {int(value): name for value, name in names.items()}


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(prepare_data)
