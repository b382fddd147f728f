"""The network's scores as files, for those who want to set their own threshold or to combine predictions."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.transforms import MapTransform

from scripts.inference.native_nifti import save_native
from scripts.inferer import ICLInferer

STEPS = 1024
"""Scores are stored in steps of 1/1024: float32 with few digits, of which gzip makes small files."""


def probability_folder(output_dir: str | os.PathLike, case: str) -> Path:
    """Where a case's maps lie: ``probabilities/CASE/``, with a file ``label_VALUE.nii.gz`` for each label."""
    return Path(output_dir) / "probabilities" / case


class SaveProbabilitiesd(MapTransform):
    """Writes a target's scores in its own space, one float32 file per label; the data pass through as they are.

    One label at a time is brought to the target's voxels, so that memory does not grow with the number of labels.

    Args:
        keys: the target, with its scores.
        predictor: the predictor that made them.
        output_dir: the run's output folder.

    Raises:
        ValueError: a generation task.
    """

    def __init__(self, keys: Hashable, predictor: ICLInferer, output_dir: str) -> None:
        super().__init__(keys)
        if predictor.task == "generation":
            raise ValueError("--probabilities true is for segmentation: what a generation task predicts is the score")
        self.predictor = predictor
        self.output_dir = output_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the maps of each key."""
        for target in (data[key] for key in self.keys):
            folder = probability_folder(self.output_dir, target.name)
            for value, placed in target.scores_by_label().items():
                # as the mask is made
                native = self.predictor.context.preprocessing.to_native(placed.scores[None], placed.target, 3)
                save_native((native.clamp(0, 1) * STEPS).round() / STEPS, folder / f"label_{value}.nii.gz")
        return dict(data)
