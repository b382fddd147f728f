"""An inference run: which targets, what is already done, and the report."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Orientation

from scripts.atomic import write_json
from scripts.data.collection import read_split
from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import Case, DatasetError, find_targets
from scripts.data.preprocessing import RAS_LABELS
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer
from scripts.pictures import overlay_figure, save_png

logger = logging.getLogger(__name__)

REPORT = "report.json"


class InferenceRun(Sequence[Case]):
    """The targets still to do, as the data of the run's dataset, and an Ignite handler that reports on them.

    A case that is already done is skipped only if its image, the contexts, the weights and the settings are the
    same; results of anything else are never overwritten unasked.

    Args:
        dataset_dir: one image, a folder of images, or an nnU-Net dataset.
        output_dir: where answers, pictures and ``report.json`` go.
        inferer: the predictor.
        checkpoint: weights file, for the fingerprint.
        channel: image channel in nnU-Net folders.
        split_file: run only on the cases of a part of this split.
        target_split: which part.
        overlays: write a PNG per case.
        overwrite: replace results.
        record: where to remember what was found in the files.
    """

    def __init__(
        self,
        dataset_dir: str | None,
        output_dir: str,
        inferer: ICLInferer,
        checkpoint: str,
        channel: int = 0,
        split_file: str | None = None,
        target_split: str = "test",
        overlays: bool = True,
        overwrite: bool = False,
        record: str | None = None,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.output_dir = Path(output_dir)
        self.inferer = inferer
        self.checkpoint = checkpoint
        self.channel = channel
        self.split_file = split_file
        self.target_split = target_split
        self.overlays = overlays
        self.overwrite = overwrite
        self.record = record
        self.report: dict[str, Any] = {}
        self._todo: list[Case] = []
        self._started = 0.0

    def __getitem__(self, index: Any) -> Any:
        """A target: ``image`` (path) and ``case``."""
        return self._todo[index]

    def __len__(self) -> int:
        """Targets still to do; 0 before :meth:`prepare`."""
        return len(self._todo)

    def __iter__(self) -> Iterator[Case]:
        """Targets still to do."""
        return iter(self._todo)

    def prepare(self) -> None:
        """Find and check the targets, set aside what is done.

        Raises:
            ValueError: no ``dataset_dir``.
            FileNotFoundError, DatasetError: no targets.
            FileExistsError: results of other contexts, weights or settings are in the way.
        """
        if self.dataset_dir is None:
            raise ValueError("no targets: give --dataset_dir, a folder of images or one image")
        targets = inspect_cases(self._find(), self.record)
        good = [target for target in targets if not target["problems"]]
        old = self._old_report()
        self._todo = []
        self.report = {
            "fingerprint": self._fingerprint(),
            "task": self.inferer.task,
            "labels": self.inferer.label_values,
            "contexts": self.inferer.context.names,
            "spacing_mm": self.inferer.context.preprocessing.spacing_mm,
            "cases": {},
            "failed": {target["case"]: target["problems"] for target in targets if target["problems"]},
        }
        for name, problems in self.report["failed"].items():
            logger.warning("%s is left out: %s", name, "; ".join(problems))
        same_run = old.get("fingerprint") == self.report["fingerprint"]
        in_the_way = []
        for target in good:
            done = old.get("cases", {}).get(target["case"], {}) if same_run else {}
            written = self._answer_path(target["case"]).is_file()
            if not self.overwrite and written and done.get("image_digest") == target["image_digest"]:
                self.report["cases"][target["case"]] = done
                continue
            cut_short = same_run and not done  # written by this very run, but not reported any more
            if written and not self.overwrite and not cut_short:
                in_the_way.append(target["case"])
            self._todo.append({key: target[key] for key in ("image", "case", "image_digest")})
        if in_the_way:
            raise FileExistsError(
                f"{self.output_dir} holds answers made with other images, contexts, weights or settings "
                f"({', '.join(in_the_way[:5])}{' ...' if len(in_the_way) > 5 else ''}): give another --output_dir "
                "or --overwrite true"
            )
        if self.report["cases"]:
            logger.info("%d cases are done already and are skipped", len(self.report["cases"]))
        write_json(self.report, self.output_dir / REPORT)
        logger.info("%d targets, labels %s", len(self._todo), self.report["labels"])

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start_case)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish_case)

    def run(self, evaluator: Engine) -> None:
        """Run the engine over the targets still to do, write the report and say how it went.

        Args:
            evaluator: the engine this is attached to, with these targets as its data.

        Raises:
            DatasetError: some targets could not be done.
        """
        self.prepare()
        if self._todo:
            evaluator.state.epoch_length = len(self._todo)  # the engine may have been built before they were known
            evaluator.run()
        write_json(self.report, self.output_dir / REPORT)
        logger.info("%d answers and %s in %s", len(self.report["cases"]), REPORT, self.output_dir)
        if self.report["failed"]:
            listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in self.report["failed"].items())
            raise DatasetError(f"{len(self.report['failed'])} targets were left out: {listing}")

    def _find(self) -> list[Case]:
        targets = find_targets(self.dataset_dir, self.channel)
        if self.split_file is None:
            return targets
        folder = Path(self.dataset_dir).absolute()
        name = folder.parent.name if folder.name in ("imagesTr", "imagesTs") else folder.name
        parts = read_split(self.split_file, [{**target, "dataset": name} for target in targets])
        if not parts.get(self.target_split):
            known = ", ".join(part for part in parts if parts[part])
            raise DatasetError(f"{self.split_file} has no '{self.target_split}' cases of {name} (it has {known})")
        return parts[self.target_split]

    def _old_report(self) -> dict[str, Any]:
        path = self.output_dir / REPORT
        if self.overwrite or not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return {}

    def _fingerprint(self) -> str:
        inferer, context = self.inferer, self.inferer.context
        facts = [
            hashlib.sha256(Path(self.checkpoint).read_bytes()).hexdigest(),
            context.digests,
            hashlib.sha256(context.labels.numpy().tobytes()).hexdigest(),
            context.preprocessing.fingerprint,
            inferer.task,
            inferer.label_values,
            inferer.overlap,
            inferer.amp,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _answer_path(self, case: str) -> Path:
        return self.output_dir / f"{case}.nii.gz"

    def _start_case(self, engine: Engine) -> None:
        self._started = time.monotonic()
        if self.inferer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.inferer.device)

    def _finish_case(self, engine: Engine) -> None:
        batch, output = engine.state.batch[0], engine.state.output[0]
        answer = output["pred"]
        self.report["cases"][batch["case"]] = {
            "image_digest": batch["image_digest"],
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_mb": _peak_memory_mb(self.inferer.device),
            "contexts": {str(value): names for value, names in self.inferer.used.items()},
            "volumes_mm3": self._volumes(answer),
            "warnings": self._warnings(batch, answer),
        }
        write_json(self.report, self.output_dir / REPORT)
        if self.overlays:
            self._picture(batch, answer)

    def _volumes(self, answer: Any) -> dict[str, float]:
        if self.inferer.task == "generation":
            return {}
        voxel_mm3 = float(np.prod(nib.affines.voxel_sizes(answer.affine.numpy())))
        return {str(value): round(int((answer == value).sum()) * voxel_mm3, 3) for value in self.report["labels"]}

    def _warnings(self, batch: dict[str, Any], answer: Any) -> list[str]:
        context = self.inferer.context
        found = []
        if itself := context.same_image(batch["image_digest"]):
            found.append(f"the target is also context {context.names[itself[0]]}: it was left out of its own contexts")
        alone = [str(value) for value, names in self.inferer.used.items() if not names]
        if alone:
            found.append(f"no context but the target itself has label {', '.join(alone)}: left empty")
        grid = context.preprocessing.spatial_size
        if any(n > size for n, size in zip(batch["image"].shape[1:], grid, strict=True)):
            found.append("larger than the grid at the contexts' spacing: predicted in overlapping windows")
        if self.inferer.task == "segmentation" and not answer.any():
            found.append("nothing was found: the answer is all background")
        return found

    def _picture(self, batch: dict[str, Any], answer: Any) -> None:
        path = batch["image"].meta["filename_or_obj"]
        to_ras = Orientation(axcodes="RAS", labels=RAS_LABELS)
        image, shown = to_ras(load_volume(path))[0].numpy(), to_ras(answer)
        context = self.inferer.context
        labels = context.labels[:, 0].numpy()
        if self.inferer.task == "generation":  # the answer itself is what is to be seen
            image, mask, labels = shown[0].numpy(), np.zeros(shown.shape[1:], int), np.zeros(labels.shape, int)
        else:
            mask = shown[0].numpy()
        pairs = list(zip(context.images[:, 0].numpy(), labels, strict=True))
        figure = overlay_figure(image, mask, nib.affines.voxel_sizes(shown.affine.numpy()), pairs, title=batch["case"])
        save_png(figure, self.output_dir / f"{batch['case']}.png")


def _peak_memory_mb(device: torch.device) -> float:
    """Peak of the GPU's memory for this case, or of the whole process so far on the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
