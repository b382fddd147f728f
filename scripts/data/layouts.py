"""What a path holds, told by looking: files, a folder, nnU-Net's layout, BIDS, or two parallel folders.

Nothing is read but names. What is found is said in the words of ``inference.json``'s options, and in one line for the
person who typed the path.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.data.bids import BidsFile, find_scans, is_bids, label_names, pair_with_scans, read_name, same_names
from scripts.data.conversion.bids import pair_bids
from scripts.data.files import DatasetError, image_files
from scripts.data.nnunet import NnunetDataset, split_channel
from scripts.data.volumes import strip_ending

_LABEL_WORD = r"d?seg|aseg|segmentation|labels?|labelmap|lab|masks?|gt|manual|truth"
_IMAGE_WORD = r"imgs?|images?|scans?|t1w?|t2w?|flair|pd|mri?|ct|brain|orig|\d{4}"
_IS_LABEL = re.compile(rf"(?:(?P<case>.+?)[_.-])?(?:{_LABEL_WORD})(?:Tr|Ts)?", re.IGNORECASE)
_IS_IMAGE = re.compile(rf"(?:(?P<case>.+?)[_.-])?(?:{_IMAGE_WORD})(?:Tr|Ts)?", re.IGNORECASE)
_SHOWN = 3
_PAIRS = (
    "give an nnU-Net dataset (imagesTr, labelsTr), a BIDS derivative with *_dseg files, a folder of images and one of "
    "labels (two paths, files of the same names), or files CASE.nii.gz with CASE_seg.nii.gz"
)


class Found(NamedTuple):
    """What a path holds.

    Attributes:
        options: of ``inference.json``: how the workflow is told.
        what: in words.
        names: label number -> name, where the layout has names.
    """

    options: dict[str, str | list[str]]
    what: str
    names: dict[int, str] = {}


def look_for_scans(paths: Sequence[str], suffix: str = "T1w") -> Found:
    """Scans to segment.

    Args:
        paths: image files, or one folder: of images, nnU-Net's, or a BIDS dataset.
        suffix: kind of scan that is taken from BIDS.

    Raises:
        FileNotFoundError: nothing there, or no images.
        DatasetError: several folders, or folders among files.
    """
    places = _existing(paths)
    if len(places) > 1 and any(place.is_dir() for place in places):
        raise DatasetError(f"{', '.join(paths)}: give several files, or one folder")
    folder = places[0]
    if not folder.is_dir():
        files = [str(place) for place in places]
        return (
            Found({"dataset_dir": files[0]}, "one file") if len(files) == 1 else _listed(files, f"{len(files)} files")
        )
    for inner in ("imagesTs", "imagesTr"):
        if image_files(folder / inner):
            return Found({"dataset_dir": str(folder)}, f"{inner} of an nnU-Net dataset")
    if folder.name in ("imagesTs", "imagesTr") and image_files(folder):
        return Found({"dataset_dir": str(folder)}, f"{folder.name} of an nnU-Net dataset")
    if images := image_files(folder):
        return Found({"dataset_dir": str(folder)}, f"a folder of {len(images)} images")
    if is_bids(folder):
        files = [str(file.path) for file in find_scans(folder, suffix=suffix)]
        return _listed(files, f"a BIDS dataset with {len(files)} scans *_{suffix}")
    raise FileNotFoundError(
        f"no images in {folder}: give image files, a folder of them, nnU-Net's imagesTs, or a BIDS dataset"
    )


def look_for_examples(
    paths: Sequence[str], suffix: str = "T1w", mask_pattern: str | None = None, raw: str | Path | None = None
) -> Found:
    """Example pairs of an image and its label map.

    Args:
        paths: a folder, two parallel folders (images, labels), a JSON list of pairs, or image and label files.
        suffix: kind of image that is taken from BIDS.
        mask_pattern: which label maps of a BIDS derivative, such as ``*_desc-aseg_dseg.nii.gz``; None: ``*_dseg``.
        raw: BIDS dataset with the images of a derivative that has none.

    Raises:
        FileNotFoundError: nothing there.
        DatasetError: no pairs, or files that cannot be paired; label numbers of two names.
    """
    places = _existing(paths)
    if len(places) == 2 and all(place.is_dir() for place in places):
        return _two_folders(*places)
    if len(places) > 1 or not places[0].is_dir():
        if len(places) == 1 and places[0].suffix == ".json":
            return Found({"context_file": str(places[0])}, "a list of pairs")
        if any(place.is_dir() for place in places):
            raise DatasetError(f"{', '.join(paths)}: no example pairs: {_PAIRS}")
        return _pairs_by_name(places, f"{places[0].parent}")
    folder = places[0]
    if (folder / "imagesTr").is_dir():
        return _nnunet(folder)
    if is_bids(folder):
        return _derivative(folder, suffix, mask_pattern, raw)
    if files := image_files(folder):
        return _pairs_by_name(files, str(folder))
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and image_files(path)]
    labels = [path for path in inner if _IS_LABEL.fullmatch(path.name)]
    images = [path for path in inner if path not in labels]
    if len(labels) == len(images) == 1:
        return _two_folders(images[0], labels[0])
    datasets = [path for path in sorted(folder.iterdir()) if (path / "imagesTr").is_dir()]
    if len(datasets) == 1:
        return _nnunet(datasets[0])
    raise DatasetError(f"{folder}: no example pairs: {_PAIRS}")


def _existing(paths: Sequence[str]) -> list[Path]:
    if not paths:
        raise ValueError("no path is given")
    places = [Path(os.path.abspath(path)) for path in map(str, paths)]
    for place in places:
        if not os.path.lexists(place):
            raise FileNotFoundError(f"no file or folder {place}")
        if not place.is_dir() and strip_ending(place) is None and place.suffix != ".json":
            raise DatasetError(f"{place} is no image: .nii.gz, .nii, .mgz, .mgh and .nrrd files are read")
    return places


def _listed(files: list[str], what: str) -> Found:
    return Found({"target_images": files}, what)


def _paired(images: list[str], labels: list[str], what: str, names: dict[int, str] | None = None) -> Found:
    return Found({"context_images": images, "context_labels": labels}, f"{what}, {len(images)} pairs", names or {})


def _nnunet(folder: Path) -> Found:
    classes = NnunetDataset.read(folder).classes
    names = {values[0]: name for name, values in classes.items() if len(values) == 1}
    return Found({"context_dir": str(folder)}, "an nnU-Net dataset", names)


def _two_folders(images: Path, labels: Path) -> Found:
    for folder in (images, labels):
        if not image_files(folder):
            raise DatasetError(f"no images in {folder}: {_PAIRS}")
    what = f"two parallel folders, {images.name} and {labels.name}"
    return Found({"context_images": [str(images)], "context_labels": [str(labels)]}, what)


def _pairs_by_name(files: Sequence[Path], where: str) -> Found:
    """Pair ``CASE.nii.gz`` or ``CASE_img.nii.gz`` with ``CASE_seg.nii.gz``, of whatever words."""
    images: dict[str, list[Path]] = defaultdict(list)
    labels: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        stem = strip_ending(path) or ""
        if (label := _IS_LABEL.fullmatch(stem)) and label["case"]:
            image = _IS_IMAGE.fullmatch(label["case"])
            labels[image["case"] if image and image["case"] else label["case"]].append(path)
        elif (channel := split_channel(stem)) and channel[1]:
            continue  # further channels of a case
        else:
            image = _IS_IMAGE.fullmatch(stem)
            images[image["case"] if image and image["case"] else stem].append(path)
    alone = [case for case in images.keys() ^ labels.keys()]
    several = [case for case in images.keys() & labels.keys() if len(images[case]) + len(labels[case]) > 2]
    if alone or several or not images:
        named = [path.name for case in sorted(alone or several) for path in (*images[case], *labels[case])]
        listed = ", ".join(named[:_SHOWN]) + (f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")
        why = (
            f"no partner for {listed}" if alone else f"more than one partner among {listed}" if several else "no pairs"
        )
        raise DatasetError(f"{where}: {why}: {_PAIRS}")
    cases = sorted(images)
    return _paired([str(images[c][0]) for c in cases], [str(labels[c][0]) for c in cases], "files paired by name")


def _derivative(folder: Path, suffix: str, mask_pattern: str | None, raw: str | Path | None) -> Found:
    """Pairs of a BIDS dataset's label maps with their scans, wherever those are."""
    masks = _masks_of(folder, mask_pattern or "*_dseg.nii.gz")
    homes = dict.fromkeys(Path(home) for home in (folder, raw, _raw_of(folder)) if home is not None)
    for home in homes:
        try:
            pairs, alone = pair_with_scans(masks, find_scans(home, suffix=suffix))
        except FileNotFoundError:
            continue
        if not pairs:
            continue
        names = same_names(label_names(mask.path, folder) for mask, _ in pairs)
        images, labels = [str(scan.path) for _, scan in pairs], [str(mask.path) for mask, _ in pairs]
        left_out = f" ({len(alone)} without a scan left out)" if alone else ""
        return _paired(images, labels, f"a BIDS dataset's *_{suffix} with *_{masks[0].suffix}{left_out}", names)
    raise DatasetError(f"{folder}: no *_{suffix} of its label maps in {' or '.join(map(str, homes))}: {_PAIRS}")


def _masks_of(folder: Path, pattern: str) -> list[BidsFile]:
    """The label maps that a pattern chooses, of the dataset's derivatives, or else of itself."""
    try:
        cases = pair_bids(folder, [], pattern).cases
    except FileNotFoundError as error:
        raise DatasetError(f"{folder} holds no label maps {pattern}: {_PAIRS}") from error
    if faulty := [f"{case.case}: {'; '.join(case.problems)}" for case in cases if case.problems]:
        raise DatasetError(f"{folder}: {'; '.join(faulty[:_SHOWN])}")
    named = (read_name(case.mask) for case in cases if case.mask is not None)
    return [name for name in named if name is not None]


def _raw_of(derivative: Path) -> Path | None:
    """The dataset around a derivative: ``RAW/derivatives/PIPELINE``."""
    return next((path.parent for path in derivative.parents if path.name == "derivatives"), None)
