"""DICOM folders -> cases, and series -> NIfTI, by SimpleITK (optional: ``pip install SimpleITK``)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.data.conversion.dicom_series import quiet, read_series, simpleitk
from scripts.data.conversion.pairing import (
    DicomSeries,
    Key,
    RawDataset,
    case_name,
    channel_names_of,
    checked_patterns,
    existing_folder,
    make_cases,
    match,
    visible_files,
)
from scripts.data.volumes import strip_ending

logger = logging.getLogger(__name__)

_DESCRIPTION = "0008|103e"


def pair_dicom(
    root: str | Path, image_patterns: Sequence[str] | None, mask_pattern: str | None, series: str | None = None
) -> RawDataset:
    """Every folder that holds a DICOM series is an image; masks are image files of the case's name.

    Args:
        root: folder to look into, sub-folders included.
        image_patterns: of folders, one per channel, such as ``*/T1``; None takes every folder, and its path
            within ``root`` as the case.
        mask_pattern: of image files, matched as in :func:`scripts.data.conversion.pairing.pair_files`. None if there
            are no masks.
        series: where a folder holds several series, take the one with this in its description, in any case of
            letters. Folders of which no series has it are left out, unless that leaves a choice open.

    Raises:
        FileNotFoundError: no such folder, or nothing found.
        DatasetError: SimpleITK is not installed.
        ValueError: a pattern is not usable, or given twice.
    """
    root = existing_folder(root)
    simpleitk(root)
    patterns = list(image_patterns or ())
    checked_patterns(patterns, mask_pattern)
    channels: list[dict[Key, list[DicomSeries]]] = [defaultdict(list) for _ in patterns or [""]]
    everything = list(tqdm(_series_below(root), "looking for DICOM series", unit="folder"))
    if not everything:
        raise FileNotFoundError(f"{root}: no DICOM series in it or below")
    left_out = 0
    for folder, all_series in everything:
        parts = folder.relative_to(root).parts
        chosen = [s for s in all_series if series is None or series.casefold() in s.description.casefold()]
        if not chosen and len(all_series) > 1:
            chosen = all_series  # told as ambiguous, with what there is to choose from
        left_out += not chosen
        keys = [match(pattern, parts) for pattern in patterns] if patterns else [parts or (root.name,)]
        for key, found in zip(keys, channels, strict=True):
            if key is not None and chosen:
                found[(case_name(key),)] += chosen
    for number, found in enumerate(channels):
        if not found:
            what = f"folder with --image_pattern {patterns[number]!r}" if patterns else "series"
            there = ", ".join(s.describe(root) for _, several in everything[:3] for s in several)
            wanted = f" and --series {series!r}" if series is not None else ""
            raise FileNotFoundError(f"{root}: no {what}{wanted}; there are {there}")
    if left_out:
        logger.warning("%d folders without a series named like %r are left out", left_out, series)
    masks = _masks(root, mask_pattern) if mask_pattern is not None else None
    remedy = "choose by --series or a narrower pattern"
    cases = make_cases(root, channels, masks, patterns or ["any folder"], mask_pattern, remedy)
    return RawDataset(root, cases, channel_names_of(patterns or [""]))


def write_series(series: DicomSeries, path: Path) -> None:
    """Convert a series to NIfTI; SimpleITK turns DICOM's LPS coordinates into NIfTI's RAS.

    Args:
        series: the slices.
        path: the ``.nii.gz`` to write.

    Raises:
        VolumeError: as :func:`read_series`.
    """
    simpleitk(series.path).WriteImage(read_series(series), str(path))


def _series_below(root: Path) -> Iterator[tuple[Path, list[DicomSeries]]]:
    sitk = simpleitk(root)
    folders = sorted({path.parent for path in visible_files(root) if not strip_ending(path)})
    for folder in folders:
        with quiet(sitk):
            ids = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
            several = [_describe(sitk, folder, uid) for uid in ids]
        if several:
            yield folder, several


def _describe(sitk: Any, folder: Path, uid: str) -> DicomSeries:
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    header = sitk.ImageFileReader()
    header.SetFileName(files[0])
    try:
        header.ReadImageInformation()
        description = header.GetMetaData(_DESCRIPTION).strip() if header.HasMetaDataKey(_DESCRIPTION) else ""
    except RuntimeError:  # told when the series is to be read
        description = ""
    return DicomSeries(folder, tuple(files), description or uid)


def _masks(root: Path, pattern: str) -> dict[Key, list[Path]]:
    found: dict[Key, list[Path]] = defaultdict(list)
    for path in visible_files(root):
        key = match(pattern, path.relative_to(root).parts) if strip_ending(path) else None
        if key is not None:
            found[(case_name(key),)].append(path)
    if not found:
        raise FileNotFoundError(f"{root}: no file matches --mask_pattern {pattern!r} (None: there are no masks)")
    return found
