"""A run over many scans: goes on where it was cut off, sets failing ones aside, and reports."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from scripts.data.nnunet import Case, DatasetError
from scripts.inference.case_report import case_entry, file_facts, save_picture
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.failures import folder_fault, reason_of
from scripts.inference.result_folder import ResultFolder
from scripts.inference.target import Target
from scripts.inference.target_source import TargetSource
from scripts.reporting.report_files import REPORT, remove_shards
from scripts.reporting.report_page import PAGE
from scripts.runtime.manifest import write_manifest
from scripts.runtime.output_folder import file_sha256
from scripts.runtime.processes import meet_processes

logger = logging.getLogger(__name__)

_SAID_OF_TUNING = ("minutes", "kept", "dice_before", "dice_after", "gain", "judged", "judged_on")
_SETTINGS = ("overlap", "mini_context_size", "amp", "align", "evidence")


class InferenceRun(Sequence[Case]):
    """The targets still to do, as the data of the run's dataset, and an Ignite handler that reports on them.

    A target that fails is set aside with the reason, and the run goes on. Files are looked into when their turn
    comes, so that a run over thousands of scans begins at once.

    Args:
        targets: where the scans come from.
        results: where predictions, pictures and the report go.
        inferer: what the run's engine calls.
        checkpoint: weights file, for the fingerprint.
        debug: log the traceback of a target that fails.
        refine: of earlier versions: regions are now always looked at in voxels that suit them.
        tune: minutes for tuning the network on the contexts first, once; 0 does not.
    """

    def __init__(
        self,
        targets: TargetSource,
        results: ResultFolder,
        inferer: ConfidentInferer,
        checkpoint: str,
        debug: bool = False,
        refine: bool = False,
        tune: float = 0,
    ) -> None:
        self.targets = targets
        self.results = results
        self.inferer = inferer
        self.checkpoint = checkpoint
        self.debug = debug
        self.refine = refine
        self.tune = tune
        self.report: dict[str, Any] = {}
        self._done = 0
        self._todo: list[Case] = []
        self._position = 0
        self._skipped = 0
        self._listing: list[tuple[str, Any]] = []
        self._bar = tqdm(disable=True)
        self._started = 0.0

    def __getitem__(self, index: int) -> Case:
        """A target: ``image`` (path) and ``case`` (name).

        Raises:
            DatasetError: the folder shows that its file cannot be used.
        """
        target = self._todo[index]
        if target.get("folder_problems"):
            raise DatasetError("; ".join(target["folder_problems"]))
        return target

    def __len__(self) -> int:
        """Targets still to do; 0 before :meth:`prepare`."""
        return len(self._todo)

    def __iter__(self) -> Iterator[Case]:
        """Targets still to do, not looked into."""
        return iter(self._todo)

    def prepare(self) -> None:
        """Find the targets and set aside what is done.

        Raises:
            ValueError: no targets are given.
            FileNotFoundError, DatasetError: there are none.
            FileExistsError: results of other contexts, weights or settings are in the way, or files that this program
                did not write; or a run with others is at work in the folder.
            OSError: the output folder cannot be written.
        """
        if self.refine:
            logger.info("--refine is of earlier versions: with --align, regions are always looked at in fine voxels")
        targets = self.targets.find()
        self.results.open(targets)
        weights = file_sha256(self.checkpoint)
        predictor = self.inferer.predictor
        context = predictor.context
        self.results.check_inputs([*context.files, self.checkpoint, self.targets.split_file], targets)
        shard, labels = self.targets.shard, predictor.label_values
        self.report = {
            "fingerprint": self._fingerprint(weights),
            "task": predictor.task,
            "labels": labels,
            "contexts": context.names,
            "warnings": context.warnings(labels),
            "spacing_mm": context.preprocessing.spacing_mm,
            "weights": {"file": str(self.checkpoint), "sha256": weights},
            "settings": {name: getattr(predictor, name) for name in _SETTINGS},
            "device": _device_name(predictor.device),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "targets": len(targets),
            "shard": str(shard),
            "finished": False,
            "cases": {},
            "failed": {},
        }
        # files are not looked into here: their digests are in the report when they are done
        self._listing = [(target["case"], (file_facts(target["image"]) or {}).get("bytes")) for target in targets]
        self._listing.append(("contexts", context.fingerprint))
        mine = shard.of(targets)
        alone = self.results.enter(self.report["fingerprint"], self.report["settings"])
        left = self.results.unfinished(mine, self.report["fingerprint"], self.report["settings"], labels)
        self._todo, self.report["cases"] = left.todo, left.done
        self._skipped = len(mine) - len(self._todo)
        if self.tune:
            self.report["tuning"] = self._tuned()
        self_test = self.inferer.prepare(left.self_test) if self._todo else left.self_test
        self.report |= {} if self_test is None else {"self_test": self_test}
        self.results.files.begin(self.report, {target["case"] for target in self._todo}, alone)
        part = "" if shard.count == 1 else f" of shard {shard}"
        logger.info("%d targets%s, %d of them done already, labels %s", len(mine), part, self._skipped, labels)

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start_case)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._follow_case)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._finish_case)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._set_failed_case_aside)

    def run(
        self, evaluator: Engine, config: Mapping[str, Any] | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """Run the engine over the targets still to do, write the report and say how it went.

        Args:
            evaluator: the engine this is attached to, with these targets as its data.
            config: the configuration as run; with it and the options' values goes a manifest.
            options: see there.

        Raises:
            DatasetError: some targets could not be done.
            OSError: the output folder takes no more files.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.results.leave)
            self.prepare()
            if config is not None and self.targets.shard.number == 1:
                write_manifest(self.results.path, config, options or {}, self._listing)
            self._run(evaluator)
            self._conclude()

    def _run(self, evaluator: Engine) -> None:
        shard = self.targets.shard
        name = "inference" if shard.count == 1 else f"shard {shard}"
        try:
            with tqdm(total=len(self._todo), desc=name, unit="case", dynamic_ncols=True) as self._bar:
                while self._todo:  # the engine stops at a target that fails, and goes on behind it
                    evaluator.state.epoch_length = len(self._todo)
                    evaluator.run()
                    self._todo, self._position = self._todo[self._position :], 0
        except BaseException:
            with contextlib.suppress(OSError):
                self.results.files.fold(self.report)
            raise

    def _conclude(self) -> None:
        """Write the final report, or this shard's, and say how it went."""
        self.report["finished"] = True
        failed = self.report["failed"]
        if self.targets.shard.count == 1:
            self.results.files.publish(self.report)
            if self.results.enter(self.report["fingerprint"], self.report["settings"]):
                remove_shards(self.results.path)
            where = f"{PAGE} and {REPORT} in {self.results.path}"
        else:
            self.results.files.fold(self.report)
            where = f"shard {self.targets.shard}, in {self.results.path}"
            try:
                self.results.files.publish_merged()
                where += f", {PAGE} and {REPORT} of all shards"
            except FileNotFoundError:  # others are still at work
                pass
            except ValueError as error:
                logger.warning("the reports of the shards are not merged: %s", error)
        meet_processes()  # torchrun would end the others if this one ended with an error
        logger.info("%d done, %d skipped, %d failed: %s", self._done, self._skipped, len(failed), where)
        if failed:
            listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in list(failed.items())[:5])
            more = f"; and {len(failed) - 5} more, in {self.results.files.path}" if len(failed) > 5 else ""
            raise DatasetError(f"{len(failed)} targets were left out: {listing}{more}")

    def _tuned(self) -> dict[str, Any]:
        """Tune on the contexts, or take what an earlier run has; what is to be said of it."""
        with self.results.tuning() as folder:
            found = self.inferer.predictor.tune(self.tune, folder, self.results.overwrite)
        kept = "the tuned weights are used" if found["kept"] else "too little, so the weights are as they were"
        self.report["warnings"].append(
            f"tuned on the contexts: mean Dice {found['dice_before']:.3f} before, {found['dice_after']:.3f} after on "
            f"{found['judged']} {found['judged_on']}; {kept}"
        )
        return {name: found[name] for name in _SAID_OF_TUNING}

    def _fingerprint(self, weights: str) -> str:
        predictor, context = self.inferer.predictor, self.inferer.predictor.context
        facts = [
            weights,
            context.fingerprint,
            context.preprocessing.fingerprint,
            predictor.task,
            predictor.label_values,
            predictor.overlap,
            predictor.amp,
            predictor.align,
            predictor.evidence,
            self.inferer.settings,
            *([["tune", self.tune]] if self.tune else []),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _start_case(self, engine: Engine) -> None:
        self._started = time.monotonic()
        self._bar.set_postfix_str(self._todo[self._position]["case"])
        if self.inferer.predictor.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.inferer.predictor.device)

    def _follow_case(self, engine: Engine) -> None:
        engine.state.batch["target"].on_label = self._show_label

    def _show_label(self, value: int, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"{self._todo[self._position]['case']}, label {value}: {done} of {total} labels")

    def _finish_case(self, engine: Engine) -> None:
        target: Target = engine.state.batch["target"]
        predictor = self.inferer.predictor
        if self.results.overlays:
            try:
                save_picture(target, predictor.context, self.results.picture(target.name))
            except Exception as error:  # the prediction counts, whatever becomes of its picture
                self._stop_if_folder_is_to_blame(error)
                target.warnings.append(f"no picture: {reason_of(error)}")
        seconds = time.monotonic() - self._started
        self.report["cases"][target.name] = case_entry(target, predictor.context, predictor.device, seconds)
        self._done += 1
        self._note(target.name)

    def _set_failed_case_aside(self, engine: Engine, error: BaseException) -> None:
        """Enter the target at which the engine stopped as failed; errors that are not its fault go on."""
        if not isinstance(error, Exception) or self._position >= len(self._todo):
            raise error
        self._stop_if_folder_is_to_blame(error)
        case = self._todo[self._position]["case"]
        self.report["cases"].pop(case, None)
        if not self.results.files.withdraw(case, lambda: self.results.remove(case)):
            logger.warning("%s failed here (%s), and was done by another process", case, reason_of(error))
            self._next()
            return
        self.report["failed"][case] = [reason_of(error)]
        logger.warning("%s is left out: %s", case, reason_of(error), exc_info=error if self.debug else None)
        self._note(case)
        if self.inferer.predictor.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note(self, case: str) -> None:
        """Put a case on record, done or failed, and go on to the next."""
        try:
            self.results.files.note(self.report, case)
        except OSError as error:
            self._stop_if_folder_is_to_blame(error)
            raise
        self._next()

    def _next(self) -> None:
        self._position += 1
        self._bar.update()

    def _stop_if_folder_is_to_blame(self, error: BaseException) -> None:
        if fault := folder_fault(error):
            raise OSError(
                f"{self.results.path} takes no more files ({fault.strerror}): free some space and give the same "
                f"command again; {len(self.report['cases'])} targets are done"
            ) from error


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
