"""MONAI Label's inference task around the bundle's predictor."""

from __future__ import annotations

import re
import time
from typing import Any

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from scripts.apps.monailabel.annotations import Annotations
from scripts.apps.monailabel.model_folder import CURRENT, ModelFolder
from scripts.apps.monailabel.prediction_files import write_prediction
from scripts.apps.monailabel.predictors import Predictors

_FEW = re.compile(r"only \d+ contexts where --context_size is \d+")


class InContextSegmentation(InferTask):
    """Proposes a segmentation of a scan from the finished annotations of others.

    Args:
        annotations: the contexts.
        predictors: what predicts.
        model_folder: the weights.
    """

    def __init__(self, annotations: Annotations, predictors: Predictors, model_folder: ModelFolder) -> None:
        super().__init__(
            InferType.SEGMENTATION, None, 3, "Segmentation by example: from the annotations finished so far"
        )
        self.annotations = annotations
        self.predictors = predictors
        self.model_folder = model_folder

    def info(self) -> dict[str, Any]:
        """For ``/info/``; the labels are those of the annotations as they are now."""
        return super().info() | {"labels": self.labels_now()}

    def config(self) -> dict[str, Any]:
        """Options that a viewer shows; of a list it sends the first unless another is chosen."""
        return {"weights": self.model_folder.names()}

    def labels_now(self) -> dict[str, int]:
        """Name -> number, in the order of the numbers."""
        return {name: value for value, name in self.annotations.read().names.items()}

    def is_valid(self) -> bool:
        """Always: the weights were looked for at the start."""
        return True

    def get_path(self, validate: bool = True) -> str | None:
        """The file that ``/model/`` reads, replaces or removes: never the shipped one.

        Args:
            validate: the newest version, None without any; else where the next one belongs.
        """
        versions = self.model_folder.versions()
        if not validate:
            return str(self.model_folder.next_version())
        return str(versions[-1]) if versions else None

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Propose.

        Args:
            request: ``image`` (path), and perhaps ``weights`` (a name in the model folder) and ``result_extension``.

        Returns:
            A temporary file with the prediction on the scan's own voxels, and what is to be said of it: the contexts by
            label, agreement, similarity to the nearest context, flags, warnings, the weights, seconds.

        Raises:
            ValueError: a scan, parameter or set of annotations that will not do; see
                :func:`~scripts.apps.monailabel.statuses.clear_statuses`.
        """
        started = time.monotonic()
        image, weights = str(request["image"]), request.get("weights") or CURRENT
        with self.predictors.for_target(image, weights[0] if isinstance(weights, list) else weights) as prepared:
            annotated, target = prepared.annotated, prepared.predict(image)
            named = {case["image"]: case["case"] for case in annotated.cases}
            used = {str(label): [named[path] for path in paths] for label, paths in target.used.items()}
        predicted = time.monotonic()
        file = write_prediction(target.prediction, image, request.get("result_extension"))
        return file, {
            "label_names": {name: value for value, name in annotated.names.items()},
            "contexts": used,
            **target.confidence,
            "alignment": target.alignment,
            "warnings": _with_ids([*target.warnings, *annotated.left_out], named),
            "weights": prepared.weights.name,
            "latencies": {
                "infer": round(predicted - started, 3),
                "write": round(time.monotonic() - predicted, 3),
                "total": round(time.monotonic() - started, 3),
            },
        }


def _with_ids(warnings: list[str], named: dict[str, str]) -> list[str]:
    """Warnings with the images' ids in place of their paths on the server, and without what holds for every new app."""
    for path, case in sorted(named.items(), key=lambda item: -len(item[0])):
        warnings = [warning.replace(path, case) for warning in warnings]
    return [warning for warning in warnings if not _FEW.fullmatch(warning)]
