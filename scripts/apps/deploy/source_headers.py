"""Headers of a series as a segmentation of it takes them over, by highdicom, which wants them as DICOM has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from highdicom import PatientSexValues
from pydicom import Dataset
from pydicom.valuerep import DA, TM

from scripts.data.conversion.dicom_series import share_orientation, slice_order

_TAKEN_OVER = {
    "PatientID": str,
    "PatientName": str,
    "PatientBirthDate": DA,
    "PatientSex": PatientSexValues,
    "AccessionNumber": str,
    "StudyID": str,
    "StudyDate": DA,
    "StudyTime": TM,
}
"""What a segmentation takes over from its series, and what its value must be fit for. DICOM wants it present, if only
empty; de-identification often removes it, or leaves something else."""
_UTF_8 = "ISO_IR 192"


def fit(header: Dataset) -> Dataset:
    """A header, its text decoded, with an empty value where one is missing or not as DICOM has it; changed in place."""
    header.SpecificCharacterSet = _UTF_8  # highdicom writes only some of the other sets
    for name, kind in _TAKEN_OVER.items():
        if not _is_fit(header.get(name), kind):
            setattr(header, name, "")
    return header


def stacked(headers: Sequence[Dataset]) -> list[Dataset]:
    """Slices in the order of their positions, with one orientation for what scanners round; changed in place.

    What is no stack of slices stays as it is: it is refused when it is read.
    """
    headers = list(headers)
    try:
        orientations = np.array([h.ImageOrientationPatient for h in headers], float).reshape(-1, 6)
        positions = np.array([h.ImagePositionPatient for h in headers], float).reshape(-1, 3)
    except (AttributeError, TypeError, ValueError):
        return headers
    if not share_orientation(orientations):
        return headers
    found = [headers[i] for i in slice_order(positions, orientations[0])]
    for header in found:
        header.ImageOrientationPatient = found[0].ImageOrientationPatient
    return found


def _is_fit(value: Any, kind: Callable[[str], Any]) -> bool:
    try:
        return bool(value) and kind(str(value)) is not None
    except ValueError:
        return False
