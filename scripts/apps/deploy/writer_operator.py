"""Segment numbers -> DICOM segmentation, by the SDK's writer; what the SDK does not know is put right in its file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from monai.deploy.core import Fragment, Image
from monai.deploy.core.domain.dicom_series_selection import StudySelectedSeries
from monai.deploy.operators import DICOMSegmentationWriterOperator
from pydicom import dcmread

logger = logging.getLogger(__name__)

SERIES_DESCRIPTION = "RESEARCH ONLY - Neuroverse3D segmentation"
UNLIKE_DESCRIPTION = "RESEARCH ONLY - UNLIKE EVERY EXAMPLE - Neuroverse3D segmentation"
"""Of a segmentation whose series was flagged; as long as DICOM takes, 64 characters."""


class SegmentationWriterOperator(DICOMSegmentationWriterOperator):
    """The SDK's writer, for images with ``flags`` in their meta data: why the prediction is not to be trusted.

    A flagged segmentation says so in its series description. Dates and times are in the time zone of the series, or
    in none if it names none: the SDK's own time zone, the machine's, would move the study's as well.

    Args:
        fragment: the application.
        write_flagged: write segmentations with flags, too.
        args: for the SDK.
        kwargs: for the SDK.
    """

    def __init__(self, fragment: Fragment, *args: Any, write_flagged: bool, **kwargs: Any) -> None:
        self.write_flagged = write_flagged
        super().__init__(fragment, *args, **kwargs)

    def process_images(
        self, image: Image, study_selected_series_list: Sequence[StudySelectedSeries], output_dir: Path
    ) -> None:
        """Write one file into a folder that has none."""
        flags = image.metadata()["flags"]
        if flags:
            what = "marked in its description" if self.write_flagged else "not written"
            logger.warning("UNLIKE EVERY EXAMPLE (%s): the segmentation is %s", "; ".join(flags), what)
            if not self.write_flagged:
                return
        super().process_images(image, study_selected_series_list, output_dir)
        (path,) = output_dir.glob(f"*{self.DCM_EXTENSION}")
        segmentation = dcmread(path)
        segmentation.SeriesDescription = UNLIKE_DESCRIPTION if flags else SERIES_DESCRIPTION
        segmentation.ContentCreatorName = ""  # DICOM wants it present
        source = study_selected_series_list[0].selected_series[0].series.get_sop_instances()[0]
        offset = source.get_native_sop_instance().get("TimezoneOffsetFromUTC")
        if zone := _time_zone(offset):
            now = datetime.now(zone)
            for name in ("Series", "Content", "InstanceCreation"):
                setattr(segmentation, f"{name}Date", now.strftime("%Y%m%d"))
                setattr(segmentation, f"{name}Time", now.strftime("%H%M%S"))
            segmentation.TimezoneOffsetFromUTC = offset
        else:
            del segmentation.TimezoneOffsetFromUTC
        segmentation.save_as(path)


def _time_zone(offset: str | None) -> tzinfo | None:
    """Of DICOM's form, such as ``+0100``; None for another one."""
    try:
        return datetime.strptime(str(offset), "%z").tzinfo
    except ValueError:
        return None
