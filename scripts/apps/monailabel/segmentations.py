"""DICOM segmentations <-> label maps on the voxels of their series.

DICOM numbers the segments of each file from 1 and names them; what a segment is, its label says. So the label number
of a segment that is written goes with it, as the code of a private scheme, and one that comes from elsewhere is
numbered by its label (:func:`number_names`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import SimpleITK as sitk
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    Segmentation,
    SegmentationTypeValues,
    SegmentDescription,
)
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from scripts.apps.deploy.segments import ANATOMICAL_STRUCTURE, PRIVATE_SCHEME
from scripts.data.conversion.dicom_series import share_orientation
from scripts.runtime.manifest import bundle_identity

_LONGEST_NAME = 64  # letters, of DICOM's LO
_OFF_STEP = 0.1  # of the distance between frames; more is no regular stack
_PARALLEL = 0.9999  # cosine of the angle between two normals, at least


class SegmentationError(ValueError):
    """A segmentation cannot be an annotation of its series; the text says why."""


@dataclass(frozen=True)
class Segment:
    """What a file says of one segment.

    Attributes:
        name: SegmentLabel.
        label: the label number that it was written with; None if it comes from elsewhere.
    """

    name: str
    label: int | None


def series_of(segmentation: Dataset) -> str | None:
    """UID of the one series that a segmentation refers to; None if it names none or several."""
    found = {str(item.get("SeriesInstanceUID", "")) for item in segmentation.get("ReferencedSeriesSequence", ())}
    return found.pop() or None if len(found) == 1 else None


def written_at(segmentation: Dataset) -> float:
    """When it was made, in seconds since 1970, by ContentDate and ContentTime; 0 if these are no date and time."""
    date, time = (str(segmentation.get(f"Content{part}", "")) for part in ("Date", "Time"))
    form = "%Y%m%d%H%M%S.%f" if "." in time else "%Y%m%d%H%M%S"
    try:
        offset = datetime.strptime(str(segmentation.get("TimezoneOffsetFromUTC", "")), "%z").tzinfo
    except ValueError:
        offset = None  # then the clock of this machine is meant
    try:
        return datetime.strptime(date + time, form).replace(tzinfo=offset).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def segments_of(segmentation: Dataset) -> dict[int, Segment]:
    """What a segmentation says of its segments, by number.

    Raises:
        SegmentationError: it is a prediction of this bundle that nobody has looked at, or no binary one.
    """
    kind = str(segmentation.get("SegmentationType", ""))
    if kind != SegmentationTypeValues.BINARY.value:
        raise SegmentationError(f"it is {kind or 'of no known type'}, not BINARY")
    items = segmentation.get("SegmentSequence", ())
    if not items:
        raise SegmentationError("it has no segments")
    made_by = {(item.get("SegmentAlgorithmType"), item.get("SegmentAlgorithmName")) for item in items}
    if made_by == {("AUTOMATIC", bundle_identity()["name"])}:
        raise SegmentationError("it is a prediction, not an annotation")
    found = {}
    for item in items:
        number = int(item.SegmentNumber)
        kinds = item.get("SegmentedPropertyTypeCodeSequence", ())
        own = [k.CodeValue for k in kinds if k.get("CodingSchemeDesignator") == PRIVATE_SCHEME and "CodeValue" in k]
        label = int(own[0]) if own and own[0].isdecimal() and int(own[0]) > 0 else None
        found[number] = Segment(str(item.get("SegmentLabel", "")).strip() or f"segment {number}", label)
    return found


def number_names(files: Iterable[Mapping[int, Segment]]) -> dict[str, int]:
    """Label number of every name, the same for all files, whatever their segments' numbers.

    Numbers that names were written with come first; a name without one, or with one that is taken, gets its segment's
    number, or else the next that is free.

    Args:
        files: segments by number, in an order that does not change.
    """
    files = list(files)
    numbers: dict[str, int] = {}
    for name, label in ((segment.name, segment.label) for file in files for segment in file.values()):
        if label and name not in numbers and label not in numbers.values():
            numbers[name] = label
    for name, number in ((segment.name, number) for file in files for number, segment in sorted(file.items())):
        if name not in numbers:
            taken = numbers.values()
            numbers[name] = max(taken) + 1 if number in taken else number
    return numbers


def on_series(segmentation: Dataset, segments: Mapping[int, Segment], scan: sitk.Image) -> np.ndarray:
    """Segment numbers on a series' voxels, each from the nearest voxel of the segmentation.

    Args:
        segmentation: the file, of any orientation, extent and resolution, without the frames that are empty.
        segments: from :func:`segments_of`.
        scan: the series.

    Returns:
        ``(slices, rows, columns)`` uint16, 0 where nothing is.

    Raises:
        SegmentationError: overlapping segments, frames that are no regular stack, or nothing on the series.
    """
    numbers, positions, orientations, measures = _frames(segmentation)
    if not share_orientation(orientations):
        raise SegmentationError("its frames are of several orientations")
    rows, columns = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(rows, columns)
    along = positions @ normal
    parallel = abs(normal @ np.array(scan.GetDirection()).reshape(3, 3)[:, 2]) > _PARALLEL
    step = _step_mm(along - along.min(), measures, scan.GetSpacing()[2] if parallel else None)
    places = ((along - along.min()) / step).round().astype(int)
    masks = segmentation.pixel_array.reshape(len(numbers), segmentation.Rows, segmentation.Columns).astype(bool)
    stack = np.zeros((places.max() + 1, *masks.shape[1:]), np.uint16)
    name_of = np.array(["", *(segments[n].name if n in segments else "" for n in range(1, max(segments) + 1))])
    for mask, place, number in zip(masks, places, numbers, strict=True):
        if number not in segments:
            raise SegmentationError(f"its segment {number} is not described")
        there = stack[place][mask]
        if (name_of[there[there > 0]] != segments[number].name).any():
            raise SegmentationError("its segments overlap, and a voxel can have one label only")
        stack[place][mask] = number
    image = sitk.GetImageFromArray(stack)
    row_mm, column_mm = (float(value) for value in measures.PixelSpacing)
    image.SetSpacing((column_mm, row_mm, step))
    image.SetDirection(np.stack([rows, columns, normal], axis=1).ravel().tolist())
    image.SetOrigin(positions[along.argmin()].tolist())
    found = sitk.GetArrayFromImage(sitk.Resample(image, scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    if stack.any() and not found.any():
        raise SegmentationError("it lies outside of its series")
    return found


def annotation(labels: np.ndarray, names: Mapping[int, str], headers: Sequence[Dataset]) -> Segmentation:
    """A label map as a segmentation of its series.

    Args:
        labels: ``(slices, rows, columns)``, label numbers, 0 for background.
        names: of label numbers; also of those that are nowhere. Others are called ``label 7``.
        headers: of the slices, in their order, as :func:`scripts.apps.deploy.source_headers.stacked` has them.

    Raises:
        SegmentationError: nothing to write, a name that DICOM cannot hold, or other slices than the label map has.
    """
    values = sorted({*np.unique(labels).tolist(), *names} - {0})
    if not values:
        raise SegmentationError("nothing is drawn, and DICOM has no segmentation without segments")
    shape = (len(headers), int(headers[0].Rows), int(headers[0].Columns))
    if labels.shape != shape:
        raise SegmentationError(f"the series has {shape} slices, rows and columns now, the annotation {labels.shape}")
    bundle = bundle_identity()
    algorithm = AlgorithmIdentificationSequence("MONAI Label", codes.DCM.ArtificialIntelligence, bundle["version"])
    descriptions = []
    for number, value in enumerate(values, 1):
        name = names.get(value, unnamed(value)).strip()
        if not name or len(name) > _LONGEST_NAME or "\\" in name or not name.isprintable():
            raise SegmentationError(f"label {value} is called {name!r}: DICOM takes up to 64 letters, and no backslash")
        descriptions.append(
            SegmentDescription(
                number,
                name,
                CodedConcept(*ANATOMICAL_STRUCTURE),
                CodedConcept(str(value), PRIVATE_SCHEME, name),
                SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
                algorithm,
            )
        )
    numbers = np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)
    made = Segmentation(
        source_images=list(headers),
        pixel_array=numbers.astype(np.uint8 if len(values) < 256 else np.uint16),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=generate_uid(),
        series_number=1000,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=bundle["name"],
        manufacturer_model_name="MONAI Label application",
        software_versions=bundle["version"],
        device_serial_number="0",
        content_label="ANNOTATION",
        series_description=f"{bundle['name']} annotation",
    )
    made.ContentCreatorName = ""  # DICOM wants it present
    return made


def unnamed(value: int) -> str:
    """What a label without a name is called."""
    return f"label {value}"


def _frames(segmentation: Dataset) -> tuple[list[int], np.ndarray, np.ndarray, Dataset]:
    """Of every frame its segment's number, position ``(N, 3)`` and orientation ``(N, 6)``; and the pixel measures."""
    shared = (segmentation.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = segmentation.get("PerFrameFunctionalGroupsSequence") or []

    def group(frame: Dataset, name: str) -> Dataset:
        return (frame.get(name) or shared.get(name))[0]

    try:
        numbers = [int(group(f, "SegmentIdentificationSequence").ReferencedSegmentNumber) for f in frames]
        positions = np.array([group(f, "PlanePositionSequence").ImagePositionPatient for f in frames], float)
        orientations = np.array([group(f, "PlaneOrientationSequence").ImageOrientationPatient for f in frames], float)
        return numbers, positions.reshape(-1, 3), orientations.reshape(-1, 6), group(frames[0], "PixelMeasuresSequence")
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise SegmentationError("it does not say where its frames lie") from error


def _step_mm(along: np.ndarray, measures: Dataset, slice_mm: float | None) -> float:
    """Distance of neighbouring planes, of which those without a voxel are left out in the file.

    Args:
        along: places of the frames along their normal, from 0, in mm.
        measures: what the file says of its voxels.
        slice_mm: between slices of the series, if the frames are parallel to them.
    """
    planes = np.unique(along.round(3))
    nearest = float(np.diff(planes).min()) if len(planes) > 1 else float(measures.get("SliceThickness") or 1)
    for step in (float(measures.get("SpacingBetweenSlices") or 0), slice_mm, nearest):
        if step and np.abs(along / step - (along / step).round()).max() <= _OFF_STEP:
            extent = float(along.max())
            return extent / round(extent / step) if extent > step / 2 else step  # what is said may be rounded
    raise SegmentationError("its frames are not evenly spaced")
