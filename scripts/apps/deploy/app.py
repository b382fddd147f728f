"""The application: one MR series of a folder in, its DICOM segmentation and a record of the run out.

Command line, from the root of the bundle or of a packaged application::

    python -m scripts.apps.deploy --input DICOM --output OUT --model models

For research use only. Not a medical device.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from monai.deploy.operators.dicom_utils import ModelInfo
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from scripts.apps.deploy.icl_operator import ICLOperator
from scripts.apps.deploy.model_folder import ModelFolder
from scripts.apps.deploy.segments import Segment
from scripts.apps.deploy.series_operators import HeaderLoaderOperator, OneSeriesSelectorOperator
from scripts.apps.deploy.volume_operator import SeriesVolumeOperator
from scripts.apps.deploy.writer_operator import SegmentationWriterOperator
from scripts.runtime.atomic_files import write_json
from scripts.runtime.manifest import bundle_identity, environment
from scripts.runtime.output_folder import file_sha256

logger = logging.getLogger(__name__)

RECORD = "run.json"
"""Name of the record of a run, beside the segmentation."""

RESEARCH_USE = "For research use only. Not a medical device, not for clinical decisions."


class NeuroverseApp(Application):
    """Loader, selector, volume, predictor and writer of segmentations, one after the other.

    Folders come from the SDK's ``--input``, ``--output`` and ``--model``, or from the environment variables that a
    package sets (``HOLOSCAN_INPUT_PATH``, ``HOLOSCAN_OUTPUT_PATH``, ``HOLOSCAN_MODEL_PATH``).

    Attributes:
        record: what is written to ``run.json``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record: dict[str, Any] = {}
        self._output_dir: Path | None = None
        self._unfinished: Path | None = None
        super().__init__(*args, **kwargs)

    def compose(self) -> None:
        """Read what is packaged, and connect the operators.

        Raises:
            FileExistsError: the output folder has a record already.
            FileNotFoundError: no weights or contexts.
            ValueError: faulty contexts, weights or settings.
        """
        folders = Application.init_app_context(self.argv)
        logger.warning(RESEARCH_USE)
        self._output_dir = Path(folders.output_path)
        if (self._output_dir / RECORD).exists():
            raise FileExistsError(f"{self._output_dir} already holds a run: give another --output")
        packaged = ModelFolder.find(folders.model_path)
        inferer = packaged.predictor()
        segments = packaged.segments(inferer)
        bundle = bundle_identity()
        hashes = packaged.hashes(inferer)
        self.record |= {
            "use": RESEARCH_USE,
            "bundle": bundle,
            "environment": environment(str(inferer.device)),
            **hashes,
            "contexts": inferer.context.names,
            "spatial_size": inferer.context.preprocessing.spatial_size,
            "spacing_mm": inferer.context.preprocessing.spacing_mm,
            "options": packaged.options,
            "warnings": inferer.context.warnings(inferer.label_values),
        }
        loader = HeaderLoaderOperator(
            self, CountCondition(self, 1), input_folder=Path(folders.input_path), must_load=False, name="loader"
        )
        selector = OneSeriesSelectorOperator(self, rules=packaged.series_rules, name="selector")
        volume = SeriesVolumeOperator(self, name="volume")
        predictor = ICLOperator(self, inferer=inferer, segments=segments, record=self.record, name="predictor")
        self._output_dir.mkdir(parents=True, exist_ok=True)
        self._unfinished = Path(tempfile.mkdtemp(dir=self._output_dir, prefix=".unfinished."))
        model = ModelInfo(
            bundle["name"],
            bundle["name"],
            f"{bundle['version']} {bundle['revision']}"[:64],
            generate_uid(entropy_srcs=sorted(hashes.values())),  # another one with other weights or contexts
        )
        writer = SegmentationWriterOperator(
            self,
            write_flagged=packaged.write_flagged,
            segment_descriptions=[_describe(segment, bundle) for segment in segments],
            output_folder=self._unfinished,
            model_info=model,
            custom_tags={"ContentLabel": "RESEARCH", "ContentDescription": RESEARCH_USE[:64]},
            name="writer",
        )
        selected = {("study_selected_series_list", "study_selected_series_list")}
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, volume, selected)
        self.add_flow(volume, predictor, {("image", "image")})
        self.add_flow(predictor, writer, {("seg_image", "seg_image")})
        self.add_flow(selector, writer, selected)

    def run(self) -> None:
        """Run once; segmentation and record appear in the output folder when all is complete.

        Raises:
            OSError, ValueError: as :meth:`compose` and the operators.
        """
        try:
            super().run()
            self.record["output"] = []
            for path in sorted(self._unfinished.glob("*.dcm")):
                self.record["output"].append({"file": path.name, "sha256": file_sha256(path)})
                path.replace(self._output_dir / path.name)
            write_json(self.record, self._output_dir / RECORD)
        finally:
            if self._unfinished is not None:
                shutil.rmtree(self._unfinished, ignore_errors=True)


def _describe(segment: Segment, bundle: dict[str, str]) -> SegmentDescription:
    return SegmentDescription(
        segment_label=segment.name,
        segmented_property_category=Code(*segment.category),
        segmented_property_type=Code(*segment.kind),
        algorithm_name=bundle["name"],
        algorithm_version=bundle["version"],
        anatomic_regions=[Code(*segment.region)] if segment.region else None,
    )


def main() -> None:
    """Run; what is wrong with input or package is one line, and status 1."""
    try:
        NeuroverseApp().run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
