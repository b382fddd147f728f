"""The volume -> its segments, by the bundle's predictor with the packaged context set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.deploy.core import Fragment, Image, Operator, OperatorSpec

from scripts.apps.deploy.segments import Segment
from scripts.data.volumes import VolumeError
from scripts.inference.case_report import case_warnings
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.target import Target


class ICLOperator(Operator):
    """Input ``image``, output ``seg_image``: segment numbers 1 to K on the same voxels, 0 for background.

    The output has ``flags`` in its meta data besides the input's: why the prediction is not to be trusted.

    Args:
        fragment: the application.
        inferer: the predictor, with its contexts.
        segments: one per label of the predictor, in its order.
        record: takes what is to be remembered of the run; has ``warnings``.
        args: for the SDK.
        kwargs: for the SDK.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        inferer: ConfidentInferer,
        segments: Sequence[Segment],
        record: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        self.inferer = inferer
        self.segments = list(segments)
        self.record = record
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the ports."""
        spec.input("image")
        spec.output("seg_image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Predict.

        Raises:
            VolumeError: the image is constant or holds voxels that are not finite.
        """
        image = op_input.receive("image")
        started = time.monotonic()
        volume = as_meta_tensor(image)
        try:
            target = self.inferer.complete(self.inferer.target(volume))
        except VolumeError as error:
            raise VolumeError(f"series {image.metadata()['name']!r}", error.reason) from error
        numbers = segment_numbers(target.prediction[0].numpy(), [segment.label for segment in self.segments])
        self._note(image, target, numbers, time.monotonic() - started)
        said = image.metadata() | {"flags": target.confidence["flags"]}
        op_output.emit(Image(np.ascontiguousarray(numbers.T), said), "seg_image")

    def _note(self, image: Image, target: Target, numbers: np.ndarray, seconds: float) -> None:
        counts = np.bincount(numbers.ravel(), minlength=len(self.segments) + 1)
        voxel_mm3 = float(np.prod(nib.affines.voxel_sizes(target.scan.affine.numpy())))
        self.record["series"] = image.metadata()["series"] | {"image_digest": target.digest}
        self.record["seconds"] = round(seconds, 3)
        self.record["confidence"] = target.confidence
        self.record["alignment"] = target.alignment
        self.record["warnings"] += case_warnings(target, self.inferer.context)
        self.record["segments"] = [
            {
                "segment": number,
                "label": segment.label,
                "name": segment.name,
                "code": list(segment.kind),
                "voxels": int(counts[number]),
                "volume_mm3": round(int(counts[number]) * voxel_mm3, 3),
                "contexts": target.used[segment.label],
            }
            for number, segment in enumerate(self.segments, 1)
        ]


def as_meta_tensor(image: Image) -> MetaTensor:
    """``(1, columns, rows, slices)`` float32 from an SDK image with ``affine`` in its meta data."""
    voxels = np.ascontiguousarray(image.asnumpy().T, dtype=np.float32)
    return MetaTensor(torch.from_numpy(voxels)[None], affine=torch.as_tensor(image.metadata()["affine"]))


def segment_numbers(prediction: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Label numbers -> segment numbers.

    Args:
        prediction: label numbers, 0 for background.
        labels: the label of segment 1, 2, ...

    Returns:
        uint8 of the same shape, or uint16 where there are more than 255 segments.
    """
    kind = np.uint8 if len(labels) <= np.iinfo(np.uint8).max else np.uint16
    order = np.argsort(labels)
    known = np.array([0, *np.asarray(labels)[order]])  # sorted, so that memory does not depend on the numbers
    return np.array([0, *(order + 1)], kind)[np.searchsorted(known, prediction)]
