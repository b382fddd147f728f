"""MONAI Label's train task: tuning on the finished annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from scripts.apps.monailabel.annotations import Annotations
from scripts.apps.monailabel.model_folder import CURRENT, SHIPPED, ModelFolder
from scripts.apps.monailabel.statuses import TooFewAnnotationsError
from scripts.apps.monailabel.uploads import setting
from scripts.runtime.workflow import plain_errors, start_workflow

_SAME = (
    "labels",
    "context_size",
    "context_selection",
    "spacing",
    "align",
    "evidence",
    "cache_mb",
    "amp",
    "seed",
    "device",
)
"""Options that the app's predictor and its tuning share."""

_SAID = ("kept", "dice_before", "dice_after", "gain", "judged", "judged_on")


class Tuning(TrainTask):
    """Tunes on the finished annotations; weights that win become the next version in the model folder.

    Args:
        annotations: what to tune on.
        model_folder: weights to start from, and where the result goes; each run keeps a folder in ``runs``.
        options: of ``inference.json`` that the app's predictor has.
    """

    def __init__(self, annotations: Annotations, model_folder: ModelFolder, options: Mapping[str, Any]) -> None:
        super().__init__("Tuning on the finished annotations, for a minute; kept only if it wins")
        self.annotations = annotations
        self.model_folder = model_folder
        self.options = {name: value for name, value in options.items() if name in _SAME}

    def config(self) -> dict[str, Any]:
        """Settings that a viewer shows; of a list it sends the first unless another is chosen."""
        return {"seconds": 60, "learning_rate": 3e-4, "start_from": [CURRENT, SHIPPED]}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Tune.

        Args:
            request: settings by name, as in :meth:`config`; others are not looked at.
            datastore: not used; the annotations know theirs.

        Returns:
            ``weights`` (name of the new version, or of those it started from), ``started_from``, ``annotations`` (how
            many), and of the report ``kept``, ``dice_before``, ``dice_after``, ``gain``, ``judged``, ``judged_on``.

        Raises:
            TooFewAnnotationsError: no annotation.
            ValueError: settings that make no sense, or annotations that cannot be tuned on.
        """
        chosen = {name: request.get(name, value) for name, value in self.config().items()}
        chosen = {name: value[0] if value and isinstance(value, list) else value for name, value in chosen.items()}
        start = self.model_folder.named(chosen.pop("start_from"))
        seconds = setting("seconds", "minutes", chosen.pop("seconds"))
        if not seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds:g}")
        chosen = {name: setting(name, name, value) for name, value in chosen.items()}
        annotated = self.annotations.read()
        cases = [case for case in annotated.cases if case["values"]]
        if not cases:
            left_out = "".join(f"; {line}" for line in annotated.left_out)
            raise TooFewAnnotationsError(f"tuning needs a finished annotation, and there is none{left_out}")
        run = self._new_folder()
        given = self.options | chosen
        given |= {
            "checkpoint": str(start),
            "minutes": seconds / 60,
            "context_images": [case["image"] for case in cases],
            "context_labels": [case["label"] for case in cases],
            "output_dir": str(run),
        }
        workflow = start_workflow("tune.json", given)
        try:
            with plain_errors():
                workflow.run()
        finally:
            workflow.finalize()
        report = workflow.parser.get_parsed_content("tuning_run").report
        version = self.model_folder.publish(run / "model.pt") if report["kept"] else start
        result = {"weights": version.name, "started_from": start.name, "annotations": len(cases)}
        result |= {name: report[name] for name in _SAID}
        print(json.dumps(result), flush=True)  # the last line that GET /train/ shows of a run in the background
        return result

    def _new_folder(self) -> Path:
        """A run's folder, claimed by being made."""
        runs = self.model_folder.folder / "runs"
        runs.mkdir(exist_ok=True)
        number = 1 + max((int(path.name) for path in runs.iterdir() if path.name.isdigit()), default=0)
        folder = runs / f"{number:04d}"
        folder.mkdir()
        return folder
