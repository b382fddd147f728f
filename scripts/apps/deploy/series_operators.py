"""DICOM files -> the one series to segment, and what is said of the others.

Both operators are the SDK's, made strict. Its loader drops an instance that lies where another one does, so that of
a series with two volumes a mixture is left; here all instances stay, and the series is refused when it is read. Its
selector takes the first series that matches; here there must be one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.core.domain.dicom_series_selection import StudySelectedSeries
from monai.deploy.core.domain.dicom_study import DICOMStudy
from monai.deploy.operators import DICOMDataLoaderOperator, DICOMSeriesSelectorOperator
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import MediaStorageDirectoryStorage

from scripts.apps.deploy.source_headers import fit, stacked

logger = logging.getLogger(__name__)

_IDENTITY = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")


class HeaderLoaderOperator(DICOMDataLoaderOperator):
    """Reads the headers of all DICOM files of a folder and below; slices are in the order of their positions.

    Voxels are left in the files: whoever needs them finds those by ``filename`` of an instance's data set.
    """

    def _load_data(self, files: list[str]) -> list[DICOMStudy]:
        """Instances by study and series, each once.

        Raises:
            ValueError: a DICOM file cannot be read.
        """
        instances: dict[tuple[str, str], dict[str, Dataset]] = defaultdict(dict)
        for file in sorted(files):
            header = _read_header(file)
            if header is not None:
                key = (str(header.StudyInstanceUID), str(header.SeriesInstanceUID))
                instances[key].setdefault(str(header.SOPInstanceUID), header)
        studies: dict[str, DICOMStudy] = {}
        for (study_uid, series_uid), found in instances.items():
            headers = list(found.values())
            series = DICOMSeries(series_uid)
            series.Modality = headers[0].get("Modality")
            series.SeriesDescription = headers[0].get("SeriesDescription")
            for header in stacked(headers):
                series.add_sop_instance(header)
            studies.setdefault(study_uid, DICOMStudy(study_uid)).add_series(series)
        return list(studies.values())


def _read_header(file: str) -> Dataset | None:
    """A file's header; None for what is no DICOM or no instance."""
    bare = _begins_without_preamble(file)
    try:
        header = dcmread(file, stop_before_pixels=True, force=bare)
        if bare and any(name not in header for name in _IDENTITY):
            return None
        header.decode()
    except InvalidDicomError:
        return None
    except Exception as error:  # pydicom raises its own on damaged files
        raise ValueError(f"{file} cannot be read ({error}): send the series again") from error
    if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return None
    if missing := [name for name in _IDENTITY if not header.get(name)]:
        raise ValueError(f"{file} has no {', '.join(missing)}: send the series again")
    return fit(header)


def _begins_without_preamble(file: str) -> bool:
    """Whether a file begins with DICOM's first group of elements at once, as some archives and old nodes store them."""
    with open(file, "rb") as opened:
        return opened.read(2) in _FIRST_GROUPS


class OneSeriesSelectorOperator(DICOMSeriesSelectorOperator):
    """Takes the series that matches the rules, if it is the only one."""

    def filter(
        self, selection_rules: dict[str, Any], dicom_study_list: Sequence[DICOMStudy], *_: Any
    ) -> list[StudySelectedSeries]:
        """The one series.

        Raises:
            ValueError: no series, none that matches, or more than one.
        """
        everything = [series for study in dicom_study_list for series in study.get_all_series()]
        if not everything:
            raise ValueError("no DICOM series in the input folder: give --input a folder of DICOM files")
        matching = super().filter(selection_rules, dicom_study_list, all_matched=True)
        chosen = {one.series.SeriesInstanceUID for study in matching for one in study.selected_series}
        if len(chosen) != 1:
            what = "no series matches" if not chosen else f"{len(chosen)} series match"
            pool = [series for series in everything if not chosen or series.SeriesInstanceUID in chosen]
            raise ValueError(
                f"{what} the rules {selection_rules}: there are {'; '.join(map(describe, pool))}. Send one, or "
                "narrow the rules by series.json in the model folder"
            )
        for series in everything:
            state = "segmented" if series.SeriesInstanceUID in chosen else "left out"
            logger.info("series %s: %s", state, describe(series))
        return matching


def describe(series: DICOMSeries) -> str:
    """Description, modality, number of instances and UID, for a message."""
    count = len(series.get_sop_instances())
    return f"{series.SeriesDescription or ''!r} ({series.Modality}, {count} instances, {series.SeriesInstanceUID})"


def files_of(series: DICOMSeries) -> list[Path]:
    """The files of a series, in the order of its instances."""
    return [Path(one.get_native_sop_instance().filename) for one in series.get_sop_instances()]
