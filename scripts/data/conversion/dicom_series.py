"""One DICOM series -> its volume, by SimpleITK (optional: ``pip install SimpleITK``).

SimpleITK's reader takes any files for the slices of a regular grid, in the order in which it gets them. Here the slices
are first put in the order of their positions; a series that is then no grid (missing slices, gantry tilt, several
volumes or orientations) or none of plain slices (mosaics, enhanced DICOM) would end up in the wrong place, and is
refused by its name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from monai.utils import optional_import

from scripts.data.conversion.pairing import DicomSeries
from scripts.data.nnunet import DatasetError
from scripts.data.volumes import VolumeError

_INSTANCE, _IMAGE_TYPE, _FRAMES, _CLASS = "0008|0018", "0008|0008", "0028|0008", "0008|0016"
_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_SIZE, _PIXEL_SPACING = ("0028|0010", "0028|0011"), "0028|0030"
_RESCALE = ("0028|1052", "0028|1053")  # intercept and slope
_ENHANCED = {
    f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("2.1", "2.2", "4.1", "4.3", "4.4", "128.1", "130")
}  # CT, MR and PET, also in colour and converted
_MOSAIC = {"MOSAIC", "VFRAME"}  # image types of Siemens and of United Imaging
_TELLS_VOLUMES_APART = {
    "echo time": "0018|0081",
    "inversion time": "0018|0082",
    "b-value": "0018|9087",
    "time point": "0020|0100",
    "trigger time": "0018|1060",
    "image type": _IMAGE_TYPE,
    "acquisition": "0020|0012",
    "acquisition time": "0008|0032",
}

_ORIENTATION_TOLERANCE = 1e-3  # of direction cosines, which are written with few digits
_PIXEL_SPACING_TOLERANCE = 1e-3  # of the first slice's
_SPACING_TOLERANCE = 0.5  # of the distance between slices; a missing slice makes it 1
_SAME_POSITION_MM = 0.01  # between slices; less is rounding
_POSITION_TOLERANCE_MM = 0.15  # of any slice from its place in a regular grid; some scanners round to 0.1 mm

Header = Mapping[str, str]
"""A slice's DICOM elements by tag, such as ``0020|0032``."""


def read_series(series: DicomSeries) -> Any:
    """The volume of a series, as a SimpleITK image; compressed slices are decoded, and rescaled each by its own header.

    Args:
        series: the files, in any order; an instance that is there twice counts once.

    Raises:
        VolumeError: the slices cannot be read, or are no regular grid; the message says what they are instead.
        DatasetError: SimpleITK is not installed.
    """
    sitk = simpleitk(series.path)
    if not series.files:
        raise VolumeError(series.path, f"({series.description!r}) has no files")
    with quiet(sitk):
        try:
            headers = {file: _header(sitk, file) for file in series.files}
            headers = {header.get(_INSTANCE, file): (file, header) for file, header in headers.items()}
            files, found = zip(*headers.values(), strict=True)
            if fault := _fault(found):
                raise VolumeError(series.path, f"({series.description!r}) {fault}")
            positions = _numbers(found, _POSITION, 3)
            order = slice_order(positions, _numbers(found[:1], _ORIENTATION, 6)[0])
            if fault := _repeated(positions[order], [found[i] for i in order]):
                raise VolumeError(series.path, f"({series.description!r}) {fault}")
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames([files[i] for i in order])
            if len({tuple(map(header.get, _RESCALE)) for header in found}) > 1:
                reader.SetOutputPixelType(sitk.sitkFloat32)  # the first slice's data type does not hold the others
            volume = reader.Execute()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise VolumeError(series.path, f"({series.description!r}) cannot be read ({reason})") from error
    fault = "is a colour image" if volume.GetNumberOfComponentsPerPixel() > 1 else _uneven(positions[order], volume)
    if fault:
        raise VolumeError(series.path, f"({series.description!r}) {fault}")
    return volume


def slice_order(positions: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Numbers of slices in the order of their places along their common normal.

    Args:
        positions: ``(N, 3)``, ImagePositionPatient in mm.
        orientation: ``(6,)``, ImageOrientationPatient: direction cosines of rows and columns.
    """
    return np.argsort(positions @ np.cross(orientation[:3], orientation[3:]), kind="stable")


def share_orientation(orientations: np.ndarray) -> bool:
    """Whether slices of these ``(N, 6)`` direction cosines lie in parallel, but for what scanners round."""
    return bool(np.abs(orientations - orientations[0]).max() <= _ORIENTATION_TOLERANCE)


@contextmanager
def quiet(sitk: Any) -> Iterator[None]:
    """GDCM writes a line for each file that is no DICOM; what matters comes as an exception."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def simpleitk(path: str | os.PathLike) -> Any:
    """The library.

    Raises:
        DatasetError: it is not installed; the message names what it is needed for.
    """
    sitk, installed = optional_import("SimpleITK")
    if not installed:
        raise DatasetError(f"{path}: DICOM needs a reader that is not installed: pip install SimpleITK")
    return sitk


def _header(sitk: Any, file: str) -> Header:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    return {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}


def _numbers(headers: Sequence[Header], key: str, count: int) -> np.ndarray:
    """The ``count`` numbers that an element has in every header; KeyError or ValueError if there are others."""
    return np.array([[float(value) for value in header[key].split("\\")] for header in headers]).reshape(-1, count)


def _fault(headers: Sequence[Header]) -> str | None:
    """What the files are, if not slices of one orientation and size; told before anything is made of their places."""
    if any(_MOSAIC & set(header.get(_IMAGE_TYPE, "").split("\\")) for header in headers):
        return "is made of mosaics, each with all slices of a volume; convert it with dcm2niix"
    if any(header.get(_CLASS) in _ENHANCED or header.get(_FRAMES, "1") not in ("", "1") for header in headers):
        return "is enhanced DICOM, with many frames in a file; convert it with dcm2niix"
    if len(headers) == 1:
        return "is a single slice"
    try:
        orientations, _ = _numbers(headers, _ORIENTATION, 6), _numbers(headers, _POSITION, 3)
        spacings = _numbers(headers, _PIXEL_SPACING, 2)
    except (KeyError, ValueError):
        return "has slices without position or orientation, or without pixel spacing"
    if not share_orientation(orientations):
        return "has slices of several orientations, as a localizer has"
    same_spacing = np.abs(spacings / spacings[0] - 1).max() <= _PIXEL_SPACING_TOLERANCE
    if len({tuple(map(header.get, _SIZE)) for header in headers}) > 1 or not same_spacing:
        return "has slices of several sizes"
    return None


def _repeated(positions: np.ndarray, headers: Sequence[Header]) -> str | None:
    """What is said of slices that lie at one position, and of what tells their volumes apart.

    Args:
        positions: ``(N, 3)`` in mm, in their order.
        headers: in the same order.
    """
    new = np.linalg.norm(np.diff(positions, axis=0), axis=1) >= _SAME_POSITION_MM
    if new.all():
        return None
    counts = np.bincount(np.concatenate([[0], np.cumsum(new)]))
    if counts.min() != counts.max():
        return f"has several slices at one position ({counts.min()} to {counts.max()} at each of {len(counts)})"
    volumes = f"has several slices at one position: {counts[0]} volumes of {len(counts)}"
    for what, key in _TELLS_VOLUMES_APART.items():
        sizes = Counter(header.get(key) for header in headers)
        if len(sizes) == counts[0] and set(sizes.values()) == {len(counts)}:
            return f"{volumes}, which differ in {what}"
    return volumes


def _uneven(positions: np.ndarray, volume: Any) -> str | None:
    """What is said of slices that do not lie where the volume has them.

    Args:
        positions: ``(N, 3)`` in mm, in their order.
        volume: the SimpleITK image that was made of them.
    """
    expected = np.array([volume.TransformIndexToPhysicalPoint((0, 0, i)) for i in range(len(positions))])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    scatter = np.ptp(steps) / steps.mean()
    if scatter <= _SPACING_TOLERANCE and np.abs(positions - expected).max() <= _POSITION_TOLERANCE_MM:
        return None
    if scatter > 0.1:
        distances = f"distances from {steps.min():.3f} to {steps.max():.3f} mm"
        return f"lacks slices or has them unevenly spaced ({distances})"
    return "has slices that are shifted against each other (gantry tilt)"
