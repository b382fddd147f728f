"""The network's scores as files, for those who want to set their own threshold or to combine answers."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.transforms import MapTransform

from scripts.inferer import FINER, ICLInferer
from scripts.native_nifti import save_native

STEPS = 1024
"""Scores are stored in steps of 1/1024: float32 with few digits, of which gzip makes small files."""


def probability_folder(output_dir: str | os.PathLike, case: str) -> Path:
    """Where a case's maps lie: ``probabilities/CASE/``, with a file ``label_VALUE.nii.gz`` for each label."""
    return Path(output_dir) / "probabilities" / case


class SaveProbabilitiesd(MapTransform):
    """Writes a target's scores in its own space, one float32 file per label; the data pass through as they are.

    One label at a time is brought to the target's voxels, so that memory does not grow with the number of labels.

    Args:
        keys: the scores ``(K, h, w, d)`` on the grid.
        inferer: the predictor that made them.
        output_dir: the run's output folder.
        image_key: the preprocessed target.
        name_key: the case's name.

    Raises:
        ValueError: a generation task.
    """

    def __init__(
        self,
        keys: Hashable,
        inferer: ICLInferer,
        output_dir: str,
        image_key: str = "image",
        name_key: str = "case",
    ) -> None:
        super().__init__(keys)
        if inferer.task == "generation":
            raise ValueError("--probabilities true is for segmentation: the answer of a generation task is the score")
        self.inferer = inferer
        self.output_dir = output_dir
        self.image_key = image_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the maps of each key."""
        folder, target = probability_folder(self.output_dir, data[self.name_key]), data[self.image_key].cpu()
        for key in self.keys:
            for channel, value in enumerate(self.inferer.label_values):
                scores, finer = data[key][channel : channel + 1].cpu(), [data.get(FINER, {}).get(value)]
                native = self.inferer.context.preprocessing.to_native(scores, target, 3, finer)  # as the mask is made
                save_native((native.clamp(0, 1) * STEPS).round() / STEPS, folder / f"label_{value}.nii.gz")
        return dict(data)
