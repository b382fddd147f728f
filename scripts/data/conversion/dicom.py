"""DICOM folders -> cases, and series -> NIfTI, by SimpleITK (optional: ``pip install SimpleITK``).

SimpleITK's reader sorts the slices, but it takes any set of them for a regular grid. A series that is none (missing
slices, gantry tilt, several volumes or orientations) would end up in the wrong place, and is refused here.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import
from tqdm import tqdm

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
from scripts.data.nnunet import DatasetError
from scripts.data.volumes import VolumeError, strip_ending

logger = logging.getLogger(__name__)

_DESCRIPTION, _POSITION, _ORIENTATION = "0008|103e", "0020|0032", "0020|0037"
_RESCALE = ("0028|1052", "0028|1053")  # intercept and slope
_ORIENTATION_TOLERANCE = 1e-3  # of direction cosines, which are written with few digits
_SPACING_TOLERANCE = 0.5  # of the distance between slices; a missing slice makes it 1
_SAME_POSITION_MM = 0.01  # between slices; less is rounding
_POSITION_TOLERANCE_MM = 0.15  # of any slice from its place in a regular grid; some scanners round to 0.1 mm


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
    _simpleitk(root)
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
    _simpleitk(series.path).WriteImage(read_series(series), str(path))


def read_series(series: DicomSeries) -> Any:
    """The volume of a series, as a SimpleITK image; compressed slices are decoded, and rescaled each by its own header.

    Args:
        series: the slices.

    Raises:
        VolumeError: the slices cannot be read, are no regular grid, or lie in one multi-frame file.
    """
    sitk = _simpleitk(series.path)
    if len(series.files) == 1:  # GDCM takes the frames of a file for one stack in order, whatever they are
        raise VolumeError(
            series.path,
            f"({series.description!r}) is a single slice or a multi-frame file; convert the latter with dcm2niix",
        )
    with _quiet(sitk):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(series.files)
        reader.MetaDataDictionaryArrayUpdateOn()
        try:
            volume = reader.Execute()
            if not _same_rescale(reader, len(series.files)):  # the first slice's data type does not hold the others
                reader.SetOutputPixelType(sitk.sitkFloat32)
                volume = reader.Execute()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise VolumeError(series.path, f"({series.description!r}) cannot be read ({reason})") from error
        if volume.GetNumberOfComponentsPerPixel() > 1:
            raise VolumeError(series.path, f"({series.description!r}) is a colour image")
        _check_grid(series, volume, reader)
    return volume


def _series_below(root: Path) -> Iterator[tuple[Path, list[DicomSeries]]]:
    sitk = _simpleitk(root)
    folders = sorted({path.parent for path in visible_files(root) if not strip_ending(path)})
    for folder in folders:
        with _quiet(sitk):
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


def _same_rescale(reader: Any, slices: int) -> bool:
    """Whether all slices are rescaled alike."""
    present = [[reader.GetMetaData(i, k) for k in _RESCALE if reader.HasMetaDataKey(i, k)] for i in range(slices)]
    return all(rescale == present[0] for rescale in present)


def _check_grid(series: DicomSeries, volume: Any, reader: Any) -> None:
    """Compare every slice's own position and orientation with the volume's."""
    slices = range(len(series.files))
    if not all(reader.HasMetaDataKey(i, key) for i in slices for key in (_POSITION, _ORIENTATION)):
        raise VolumeError(series.path, f"({series.description!r}) has slices without position or orientation")
    positions, orientations = (
        np.array([[float(v) for v in reader.GetMetaData(i, key).split("\\")] for i in slices])
        for key in (_POSITION, _ORIENTATION)
    )
    if np.abs(orientations - orientations[0]).max() > _ORIENTATION_TOLERANCE:
        raise VolumeError(series.path, f"({series.description!r}) has slices of several orientations")
    expected = np.array([volume.TransformIndexToPhysicalPoint((0, 0, i)) for i in slices])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if steps.min() < _SAME_POSITION_MM:
        raise VolumeError(series.path, f"({series.description!r}) has several slices at one position")
    scatter = np.ptp(steps) / steps.mean()
    if scatter > _SPACING_TOLERANCE or np.abs(positions - expected).max() > _POSITION_TOLERANCE_MM:
        reason = "has slices that are shifted against each other (gantry tilt)"
        if scatter > 0.1:
            distances = f"distances from {steps.min():.3f} to {steps.max():.3f} mm"
            reason = f"lacks slices or has them unevenly spaced ({distances})"
        raise VolumeError(series.path, f"({series.description!r}) {reason}")


@contextmanager
def _quiet(sitk: Any) -> Iterator[None]:
    """GDCM writes a line for each file that is no DICOM; what matters comes as an exception."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _simpleitk(path: str | os.PathLike) -> Any:
    sitk, installed = optional_import("SimpleITK")
    if not installed:
        raise DatasetError(f"{path}: DICOM needs a reader that is not installed: pip install SimpleITK")
    return sitk
