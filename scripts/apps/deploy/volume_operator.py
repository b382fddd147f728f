"""The chosen series -> a volume on the scanner's voxels.

The SDK's operator has the two in-plane spacings the wrong way round, takes the first slice's data type for all, and
does not look whether slices are missing. Series are read here as ``scripts.prepare_data`` reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from monai.deploy.core import Image, Operator, OperatorSpec
from monai.deploy.core.domain.dicom_series import DICOMSeries
from SimpleITK import GetArrayFromImage

from scripts.apps.deploy.series_operators import files_of
from scripts.data.conversion.dicom_series import read_series
from scripts.data.conversion.pairing import DicomSeries
from scripts.data.volumes import VolumeError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


class SeriesVolumeOperator(Operator):
    """Input ``study_selected_series_list`` with one series; output ``image``.

    The image is an array ``(slices, rows, columns)``, as all of the SDK's. Its meta data are ``affine``, from (column,
    row, slice) to mm, RAS+, and ``name`` and ``series``, which say what it was made from.
    """

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports."""
        spec.input("study_selected_series_list")
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the series; errors as :func:`volume_of`."""
        (study,) = op_input.receive("study_selected_series_list")
        op_output.emit(volume_of(study.selected_series[0].series), "image")


def volume_of(series: DICOMSeries) -> Image:
    """A series as an image.

    Raises:
        VolumeError: the series is no regular grid of slices, cannot be decoded, or is not placed in space.
    """
    files = files_of(series)
    name = str(series.SeriesDescription or series.SeriesInstanceUID)
    if not all(one.get_native_sop_instance().get("FrameOfReferenceUID") for one in series.get_sop_instances()):
        raise VolumeError(files[0].parent, f"({name!r}) has no FrameOfReferenceUID: nothing can be said to lie on it")
    first = series.get_sop_instances()[0].get_native_sop_instance()
    try:
        volume = read_series(DicomSeries(files[0].parent, tuple(map(str, files)), name))
    except VolumeError as error:
        syntax = first.file_meta.get("TransferSyntaxUID")
        encoded = f"; its voxels are encoded as {syntax.name}" if syntax and syntax.is_compressed else ""
        raise VolumeError(files[0].parent, error.reason + encoded) from error
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ np.array(volume.GetDirection()).reshape(3, 3) * np.array(volume.GetSpacing())
    affine[:3, 3] = _LPS_TO_RAS @ np.array(volume.GetOrigin())
    uids = {name: str(first.get(name)) for name in ("StudyInstanceUID", "SeriesInstanceUID")}
    return Image(GetArrayFromImage(volume), {"affine": affine, "name": name, "series": uids | {"slices": len(files)}})
