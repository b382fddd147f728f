"""A DICOMweb server: which series and segmentations it has, and their instances."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import SimpleITK as sitk
from dicomweb_client import DICOMwebClient
from dicomweb_client.ext.gcp.session_utils import create_session_from_gcp_credentials
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from pydicom import Dataset

from scripts.apps.deploy.source_headers import fit, stacked
from scripts.data.conversion.dicom_series import read_series
from scripts.data.conversion.pairing import DicomSeries

_ASKED_FOR = ("StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesDescription", "PatientID", "StudyDate",
              "NumberOfSeriesRelatedInstances")  # fmt: skip
_UID = re.compile(r"[0-9.]{1,64}")  # becomes a file name


@dataclass(frozen=True)
class Listed:
    """A series as the server lists it.

    Attributes:
        series: SeriesInstanceUID.
        study: StudyInstanceUID.
        instances: how many it has; None if the server does not say.
        info: what viewers may want to know: description, modality, patient and date.
    """

    series: str
    study: str
    instances: int | None
    info: dict[str, str]


class DicomServer:
    """Queries, downloads and uploads.

    Every method raises OSError if the server cannot be reached or refuses.

    Args:
        client: of the server.
    """

    def __init__(self, client: DICOMwebClient) -> None:
        self.client = client

    @classmethod
    def at(cls, url: str) -> DicomServer:
        """A server at an address, with the user name, password and prefixes of MONAI Label's settings."""
        if "googleapis.com" in url:
            return cls(DICOMwebClient(url=url, session=create_session_from_gcp_credentials()))
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        client = DICOMwebClientX(
            url=url,
            session=create_session_from_user_pass(user, password) if user and password else None,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
        return cls(client)

    def series(self, search_filter: Mapping[str, Any]) -> list[Listed]:
        """All series that match, in the order of their UIDs."""
        found = self.client.search_for_series(
            search_filters=dict(search_filter), fields=list(_ASKED_FOR), get_remaining=True
        )
        listed = [_listed(Dataset.from_json(entry)) for entry in found]
        return sorted((one for one in listed if _UID.fullmatch(one.series) and one.study), key=lambda one: one.series)

    def instances(self, listed: Listed) -> list[str]:
        """SOPInstanceUIDs of a series."""
        found = self.client.search_for_instances(listed.study, listed.series, get_remaining=True)
        return sorted(uid for entry in found if _UID.fullmatch(uid := str(Dataset.from_json(entry).SOPInstanceUID)))

    def instance(self, listed: Listed, uid: str) -> Dataset:
        """One instance."""
        return self.client.retrieve_instance(listed.study, listed.series, uid)

    def volume(self, listed: Listed) -> tuple[sitk.Image, Dataset]:
        """A series as a volume, and the header of its first instance.

        Raises:
            VolumeError: it is none; as :func:`scripts.data.conversion.dicom_series.read_series`.
        """
        with tempfile.TemporaryDirectory(prefix="neuroverse3d_") as folder:
            files, first = [], Dataset()
            for number, instance in enumerate(self.client.iter_series(listed.study, listed.series)):
                files.append(str(Path(folder, f"{number:06d}.dcm")))
                instance.save_as(files[-1], write_like_original=False)
                first = first or instance
            name = listed.info.get("SeriesDescription") or listed.series
            return read_series(DicomSeries(Path(listed.series), tuple(files), name)), first

    def headers(self, listed: Listed) -> list[Dataset]:
        """Headers of the slices of a series, in their order."""
        found = self.client.retrieve_series_metadata(listed.study, listed.series)
        return stacked([fit(Dataset.from_json(entry)) for entry in found])

    def store(self, instance: Dataset) -> None:
        """Add an instance."""
        answer = self.client.store_instances([instance])
        if failed := answer.get("FailedSOPSequence"):
            raise OSError(f"the DICOM server did not take the segmentation (reason {failed[0].get('FailureReason')})")


def _listed(entry: Dataset) -> Listed:
    texts = {name: str(entry.get(name, "") or "") for name in _ASKED_FOR}
    count = texts.pop("NumberOfSeriesRelatedInstances")
    series, study = texts["SeriesInstanceUID"], texts["StudyInstanceUID"]
    return Listed(series, study, int(count) if count.isdecimal() else None, texts)
