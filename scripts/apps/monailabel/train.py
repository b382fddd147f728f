"""MONAI Label's train task around the bundle's stage 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monai.data import partition_dataset
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from scripts.apps.monailabel.annotations import Annotations
from scripts.apps.monailabel.model_folder import CURRENT, SHIPPED, ModelFolder
from scripts.apps.monailabel.statuses import TooFewAnnotationsError
from scripts.apps.monailabel.uploads import setting
from scripts.runtime.workflow import plain_errors, start_workflow

FEWEST = 3
"""Annotations: a target and a context to train with, and one to validate on."""

DATASET = "annotations"

_OPTIONS = {"max_epochs": "epochs", "val_split": "val_fraction"}
"""Options of the stage that MONAI Label's settings of other names are."""


class FineTuning(TrainTask):
    """Stage 2 on the finished annotations; the best weights become the next version in the model folder.

    Args:
        annotations: what to train on.
        model_folder: weights to start from, and where the result goes; each run keeps a folder in ``runs``.
        device: where to compute; None takes a GPU if there is one.
    """

    def __init__(self, annotations: Annotations, model_folder: ModelFolder, device: str | None = None) -> None:
        super().__init__("Fine-tuning (stage 2) on the finished annotations")
        self.annotations = annotations
        self.model_folder = model_folder
        self.device = device

    def config(self) -> dict[str, Any]:
        """Settings that a viewer shows; of a list it sends the first unless another is chosen."""
        return {
            "max_epochs": 5,
            "groups_per_epoch": 40,
            "learning_rate": 1e-5,
            "augment": True,
            "val_split": 0.2,
            "start_from": [CURRENT, SHIPPED],
        }

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train.

        Args:
            request: settings by name, as in :meth:`config`; others are not looked at.
            datastore: not used; the annotations know theirs.

        Returns:
            ``weights`` (name of the new version), ``started_from``, ``annotations`` (how many) and ``val_loss``.

        Raises:
            TooFewAnnotationsError: fewer than three annotations.
            ValueError: settings that make no sense.
        """
        chosen = {name: request.get(name, value) for name, value in self.config().items()}
        chosen = {name: value[0] if value and isinstance(value, list) else value for name, value in chosen.items()}
        start = self.model_folder.named(chosen.pop("start_from"))
        chosen = {name: setting(name, _OPTIONS.get(name, name), value) for name, value in chosen.items()}
        training, validation = self._parts(chosen["val_split"])
        most = len(training) - 1
        options = {
            "init_checkpoint": str(start),
            "cache_dir": str(self.model_folder.folder / "cache"),
            "split_file": None,
            "epochs": chosen["max_epochs"],
            "groups_per_epoch": chosen["groups_per_epoch"],
            "learning_rate": chosen["learning_rate"],
            "augment": chosen["augment"],
            "context_size": [min(2, most), min(9, most)],
            "val_context_size": min(3, len(training)),
            "val_groups": 3 * len(validation),
            "num_workers": 0,
            "train#dataset#data": training,
            "validate#dataset#data": validation,
        }
        options |= {"device": self.device} if self.device else {}
        run = self._new_folder()
        workflow = start_workflow("train_stage2.json", options | {"output_dir": str(run)})
        try:
            with plain_errors():
                workflow.run()
        finally:
            workflow.finalize()
        version = self.model_folder.publish(run / "stage2" / "model.pt")
        result = {
            "weights": version.name,
            "started_from": start.name,
            "annotations": len(training) + len(validation),
            "val_loss": workflow.parser.get_parsed_content("training_run").best.value,
        }
        print(json.dumps(result), flush=True)  # the last line that GET /train/ shows of a run in the background
        return result

    def _parts(self, val_split: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and validation cases."""
        if not 0 < val_split < 1:
            raise ValueError(f"val_split must be between 0 and 1, got {val_split}")
        annotated = self.annotations.read()
        cases = [
            {"image": case["image"], "label": case["label"], "case": case["case"], "dataset": DATASET}
            for case in annotated.cases
            if case["values"]
        ]
        if len(cases) < FEWEST:
            left_out = "".join(f"; {line}" for line in annotated.left_out)
            raise TooFewAnnotationsError(
                f"fine-tuning needs {FEWEST} finished annotations, and there are {len(cases)}{left_out}"
            )
        count = min(max(1, round(val_split * len(cases))), len(cases) - 2)
        ratios = [len(cases) - count, count]
        return tuple(partition_dataset(cases, ratios=ratios, shuffle=True, seed=0))

    def _new_folder(self) -> Path:
        """A run's folder, claimed by being made."""
        runs = self.model_folder.folder / "runs"
        runs.mkdir(exist_ok=True)
        number = 1 + max((int(path.name) for path in runs.iterdir() if path.name.isdigit()), default=0)
        folder = runs / f"{number:04d}"
        folder.mkdir()
        return folder
