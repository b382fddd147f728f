"""An inference run: which targets, what is already done, and the report."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import resource
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.transforms import Orientation, generate_spatial_bounding_box
from tqdm import tqdm

from scripts.confidence import ConfidentInferer
from scripts.data.collection import read_split
from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import Case, DatasetError, find_targets
from scripts.data.preprocessing import RAS_LABELS
from scripts.data.volumes import load_volume
from scripts.distributed import meet_processes
from scripts.inferer import ICLInferer
from scripts.manifest import MANIFEST, file_sha256, write_manifest
from scripts.output_folder import STATE, OutputFolder, placed_here, signature
from scripts.pictures import SHOWN_CONTEXTS, overlay_figure, save_png
from scripts.probabilities import probability_folder
from scripts.report_files import REPORT, VOLUMES, ReportFiles, remove_shards
from scripts.report_page import PAGE
from scripts.shards import this_shard

logger = logging.getLogger(__name__)

_PROBE_BYTES = 2**20
_FOLDER_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What is wrong with the output folder rather than with a case."""
_LOCKS = "inference-"
_CORRECTED = "the answer was changed after it was written: kept as it is"
_REASON_LENGTH = 300
_SETTINGS = ("overlap", "mini_context_size", "amp", "refine")


class InferenceRun(Sequence[Case]):
    """The targets still to do, as the data of the run's dataset, and an Ignite handler that reports on them.

    A case that is already done is skipped only if its image, the contexts, the weights and the settings are the
    same; results of anything else are never overwritten unasked, and what this program did not write is never
    overwritten at all. A target that fails is set aside with the reason, and the run goes on.

    Several runs with the same contexts, weights and settings may be at work in one folder at once.

    Files are looked into when their turn comes, so that a run over thousands of scans begins at once.

    Args:
        dataset_dir: one image, a folder of images, or an nnU-Net dataset.
        output_dir: where answers, pictures and the report go.
        inferer: the predictor.
        checkpoint: weights file, for the fingerprint.
        channel: image channel in nnU-Net folders.
        split_file: run only on the cases of a part of this split.
        target_split: which part.
        shard: ``"3/16"`` for the third of sixteen parts of the targets; None for all. Each of torchrun's processes
            takes its share of it.
        overlays: write a PNG per case.
        probabilities: the run also writes probability maps, without which a case is not done.
        overwrite: replace results of this program.
        debug: log the traceback of a target that fails.
        confidence: the predictor that the run's engine calls, if it is to report what that finds.
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
        shard: str | None = None,
        overlays: bool = True,
        probabilities: bool = False,
        overwrite: bool = False,
        debug: bool = False,
        confidence: ConfidentInferer | None = None,
    ) -> None:
        self.dataset_dir = dataset_dir
        self.output_dir = Path(output_dir)
        self.inferer = inferer
        self.checkpoint = checkpoint
        self.channel = channel
        self.split_file = split_file
        self.target_split = target_split
        self.shard = this_shard(shard)
        self.overlays = overlays
        self.probabilities = probabilities
        self.overwrite = overwrite
        self.debug = debug
        self.confidence = confidence
        self.report: dict[str, Any] = {}
        self._files = ReportFiles(self.output_dir, self.shard)
        self._output = OutputFolder(self.output_dir)
        self._at_work = contextlib.ExitStack()
        self._before: dict[Path, Any] = {}
        self._done = 0
        self._todo: list[Case] = []
        self._position = 0
        self._skipped = 0
        self._listing: list[tuple[str, Any]] = []
        self._bar = tqdm(disable=True)
        self._started = 0.0

    def __getitem__(self, index: int) -> Case:
        """A target: ``image`` (path), ``case`` (name) and what was found in the file.

        Raises:
            DatasetError: the file cannot be used.
        """
        (target,) = inspect_cases([self._todo[index]])
        if target["problems"]:
            raise DatasetError("; ".join(target["problems"]))
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
            ValueError: no ``dataset_dir``.
            FileNotFoundError, DatasetError: no targets.
            FileExistsError: results of other contexts, weights or settings are in the way, or files that this program
                did not write; or a run with others is at work in the folder.
            OSError: the output folder cannot be written.
        """
        if self.dataset_dir is None:
            raise ValueError("no targets: give --dataset_dir, a folder of images or one image")
        targets = self._find()
        self._check_inputs([target["image"] for target in targets], targets)
        self._probe()
        self._check_names(targets)
        weights = file_sha256(self.checkpoint)
        context = self.inferer.context
        self._check_inputs([*context.files, self.checkpoint, self.split_file], targets)
        self.report = {
            "fingerprint": self._fingerprint(weights),
            "task": self.inferer.task,
            "labels": self.inferer.label_values,
            "contexts": context.names,
            "warnings": context.warnings(self.inferer.label_values),
            "spacing_mm": context.preprocessing.spacing_mm,
            "weights": {"file": str(self.checkpoint), "sha256": weights},
            "settings": {name: getattr(self.inferer, name) for name in _SETTINGS},
            "device": _device_name(self.inferer.device),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "targets": len(targets),
            "shard": str(self.shard),
            "finished": False,
            "cases": {},
            "failed": {},
        }
        # files are not looked into here: their digests are in the report when they are done
        self._listing = [(target["case"], os.path.getsize(target["image"])) for target in targets]
        self._listing.append(("contexts", context.fingerprint))
        mine = self.shard.of(targets)
        alone = self._enter()
        self._set_aside(mine)
        self._skipped = len(mine) - len(self._todo)
        if self.confidence and self._todo:
            self_test = self.confidence.prepare(self.report.get("self_test"))
            self.report |= {} if self_test is None else {"self_test": self_test}
        self._files.begin(self.report, {target["case"] for target in self._todo}, alone)
        part = "" if self.shard.count == 1 else f" of shard {self.shard}"
        logger.info(
            "%d targets%s, %d of them done already, labels %s",
            len(mine),
            part,
            self._skipped,
            self.report["labels"],
        )

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._start_case)
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
        with self._at_work:
            self.prepare()
            if config is not None and self.shard.number == 1:
                write_manifest(self.output_dir, config, options or {}, self._listing)
            self._run(evaluator)

    def _run(self, evaluator: Engine) -> None:
        self.inferer.on_label = self._show_label
        name = "inference" if self.shard.count == 1 else f"shard {self.shard}"
        try:
            with tqdm(total=len(self._todo), desc=name, unit="case", dynamic_ncols=True) as self._bar:
                while self._todo:  # the engine stops at a target that fails, and goes on behind it
                    evaluator.state.epoch_length = len(self._todo)
                    evaluator.run()
                    self._todo, self._position = self._todo[self._position :], 0
        except BaseException:
            with contextlib.suppress(OSError):
                self._files.fold(self.report)
            raise
        finally:
            self.inferer.on_label = None
        self._conclude()

    def _conclude(self) -> None:
        """Write the final report, or this shard's, and say how it went."""
        self.report["finished"] = True
        failed = self.report["failed"]
        if self.shard.count == 1:
            self._files.publish(self.report)
            if self._enter():
                remove_shards(self.output_dir)
            where = f"{PAGE} and {REPORT} in {self.output_dir}"
        else:
            self._files.fold(self.report)
            where = f"shard {self.shard}, in {self.output_dir}"
            try:
                self._files.publish_merged()
                where += f", {PAGE} and {REPORT} of all shards"
            except FileNotFoundError:  # others are still at work
                pass
            except ValueError as error:
                logger.warning("the reports of the shards are not merged: %s", error)
        meet_processes()  # torchrun would end the others if this one ended with an error
        logger.info("%d done, %d skipped, %d failed: %s", self._done, self._skipped, len(failed), where)
        if failed:
            listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in list(failed.items())[:5])
            more = f"; and {len(failed) - 5} more, in {self._files.path}" if len(failed) > 5 else ""
            raise DatasetError(f"{len(failed)} targets were left out: {listing}{more}")

    def _set_aside(self, targets: Sequence[Case]) -> None:
        """Take what is done from earlier reports, and the rest as what is to do.

        Raises:
            FileExistsError: results of other contexts, weights or settings are in the way, or files of others.
        """
        self._output.remove_leftovers()
        self._files.adopt_earlier_version()
        files = set(os.listdir(self.output_dir))
        names = {target["case"] for target in targets}
        earlier = [] if self.overwrite else list(self._files.earlier())
        done: dict[str, Any] = {}
        in_the_way = set()
        for report in earlier:
            if report.get("fingerprint") == self.report["fingerprint"]:
                done |= report["cases"]
                self.report |= {"self_test": report["self_test"]} if "self_test" in report else {}
            else:
                in_the_way.update(name for name in report["cases"] if f"{name}.nii.gz" in files)
        same_run = any(report.get("fingerprint") == self.report["fingerprint"] for report in earlier)
        written = {target["case"] for target in targets if f"{target['case']}.nii.gz" in files}
        known = written & done.keys()
        in_the_way |= self._changed([target for target in targets if target["case"] in known], done)
        if not self.overwrite and not same_run:  # else: written by this very run, which was cut short
            in_the_way |= written
        # a user's own work, or of a version without record and not to be told from it
        corrected = {case for case in known if not self._output.wrote(self._answer(case))}
        for case in filter(lambda case: self._output.has_record_of(self._answer(case)), corrected):
            warnings = [*done[case].get("warnings", ()), _CORRECTED]
            done[case] |= {"warnings": list(dict.fromkeys(warnings))}
        self._todo = [
            {"image": target["image"], "case": target["case"]}
            for target in targets
            if target["case"] not in corrected
            and (target["case"] not in known or not self._complete(target["case"], files))
        ]
        todo = {target["case"] for target in self._todo}
        self._output.check(*(path for case in todo | in_the_way for path in self._planned(case)), *self._pages())
        self._before = {path: signature(path) for case in todo for path in self._planned(case)}
        if in_the_way:
            raise FileExistsError(
                f"{self.output_dir} holds answers made with other images, contexts, weights or settings "
                f"({', '.join(sorted(in_the_way)[:5])}{' ...' if len(in_the_way) > 5 else ''}): give another "
                "--output_dir or --overwrite true"
            )
        self.report["cases"] = {
            name: entry
            for name, entry in sorted(done.items())
            if name not in todo and f"{name}.nii.gz" in files and (self.shard.count == 1 or name in names)
        }

    def _answer(self, case: str) -> Path:
        return self.output_dir / f"{case}.nii.gz"

    def _planned(self, case: str) -> list[Path]:
        """What this run is to write for a case."""
        maps = probability_folder(self.output_dir, case)
        labels = self.report["labels"] if self.probabilities else ()
        picture = [self.output_dir / f"{case}.png"] if self.overlays else []
        return [self._answer(case), *picture, *(maps / f"label_{label}.nii.gz" for label in labels)]

    def _pages(self) -> list[Path]:
        return [self.output_dir / name for name in (REPORT, PAGE, VOLUMES, MANIFEST)]

    def _check_inputs(self, inputs: Sequence[str | os.PathLike | None], targets: Sequence[Case]) -> None:
        """Refuse if an answer would be written over an input, under whatever name or link that is given.

        Raises:
            FileExistsError: it would.
        """
        known = {_identity(path): path for path in inputs if path is not None}
        known.pop(None, None)
        answers = [path for t in targets for path in (self._answer(t["case"]), self.output_dir / f"{t['case']}.png")]
        for path in [*answers, *self._pages()]:
            if (itself := known.get(_identity(path))) is not None:
                same = os.path.abspath(itself) == os.path.abspath(path)
                raise FileExistsError(
                    f"{path}{'' if same else f' (the same file as {itself})'} is an input of this run, such as a scan, "
                    "and would be written over: give another --output_dir"
                )

    def _check_names(self, targets: Sequence[Case]) -> None:
        """Refuse targets whose answers would be one file where the file system does not tell upper from lower case.

        Raises:
            DatasetError: there are such targets.
        """
        self._output.open()
        if not self._output.state.with_name(STATE.upper()).exists():
            return
        first: dict[str, str] = {}
        for case in (target["case"] for target in targets):
            other = first.setdefault(unicodedata.normalize("NFC", case).casefold(), case)
            if other != case:
                raise DatasetError(
                    f"{other} and {case} are one file name in {self.output_dir}: rename one of the scans"
                )

    def _enter(self) -> bool:
        """Be at work in the folder, beside runs with the same contexts, weights and settings; whether there are none.

        Raises:
            FileExistsError: a run with others is at work there.
        """
        own = f"{_LOCKS}{self.report['fingerprint'][:16]}.lock"
        with self._output.locked():
            self._at_work.close()
            for path in self._output.state.glob(f"{_LOCKS}*.lock"):
                if path.name != own and not self._is_free(path.name):
                    raise FileExistsError(
                        f"a run with other contexts, weights or settings is at work in {self.output_dir}: wait, or "
                        "give another --output_dir"
                    )
            alone = self._is_free(own)
            self._at_work.enter_context(self._output.at_work(own, shared=True))
        return alone

    def _is_free(self, lock: str) -> bool:
        try:
            with self._output.at_work(lock):
                return True
        except BlockingIOError:
            return False

    def _changed(self, targets: Sequence[Case], done: dict[str, Any]) -> set[str]:
        """Names of the targets whose image is not the one that was done; only files that were touched are read."""
        touched = [t for t in targets if done[t["case"]].get("image_file") != _file_facts(t["image"])]
        found = inspect_cases([{"image": t["image"], "case": t["case"], "source": t["case"]} for t in touched])
        return {t["case"] for t in found if t["digest"] != done[t["case"]]["digest"]}

    def _complete(self, case: str, files: set[str]) -> bool:
        """Whether everything but the answer is there, too, that this run is to write for a case."""
        return all(path.name in files if path.parent == self.output_dir else path.is_file()
                   for path in self._planned(case))  # fmt: skip

    def _probe(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.output_dir, prefix=".probe.") as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
        except OSError as error:
            raise OSError(
                f"cannot write into {self.output_dir} ({error.strerror}): give another --output_dir or free some space"
            ) from error

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

    def _fingerprint(self, weights: str) -> str:
        inferer, context = self.inferer, self.inferer.context
        facts = [
            weights,
            context.fingerprint,
            context.preprocessing.fingerprint,
            inferer.task,
            inferer.label_values,
            inferer.overlap,
            inferer.amp,
            self.confidence.settings if self.confidence else None,
            *(["refine"] if inferer.refine else []),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _start_case(self, engine: Engine) -> None:
        self._started = time.monotonic()
        self._bar.set_postfix_str(self._todo[self._position]["case"])
        if self.inferer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.inferer.device)

    def _show_label(self, value: int, done: int, total: int) -> None:
        self._bar.set_postfix_str(f"{self._todo[self._position]['case']}, label {value}: {done} of {total} labels")

    def _finish_case(self, engine: Engine) -> None:
        batch, output = engine.state.batch[0], engine.state.output[0]
        answer = output["pred"]
        target = self._todo[self._position]
        warnings = self._warnings(batch, answer)
        if self.overlays:
            try:
                self._picture(target, answer)
            except Exception as error:  # the answer counts, whatever becomes of its picture
                self._stop_if_folder_is_to_blame(error)
                warnings.append(f"no picture: {_reason(error)}")
        self.report["cases"][target["case"]] = {
            "digest": batch["digest"],
            "image_file": _file_facts(target["image"]),
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_mb": _peak_memory_mb(self.inferer.device),
            "contexts": {str(value): names for value, names in self.inferer.used.items()},
            "volumes_mm3": self._volumes(answer),
            "warnings": warnings,
            **({"refined": {str(v): done for v, done in self.inferer.refined.items()}} if self.inferer.refine else {}),
            **(self.confidence.found if self.confidence else {}),
        }
        self._done += 1
        self._note(target["case"])

    def _set_failed_case_aside(self, engine: Engine, error: BaseException) -> None:
        """Enter the target at which the engine stopped as failed; errors that are not its fault go on."""
        if not isinstance(error, Exception) or self._position >= len(self._todo):
            raise error
        self._stop_if_folder_is_to_blame(error)
        case = self._todo[self._position]["case"]
        self.report["cases"].pop(case, None)
        if not self._files.withdraw(case, lambda: self._remove(case)):
            logger.warning("%s failed here (%s), and was done by another process", case, _reason(error))
            self._next()
            return
        self.report["failed"][case] = [_reason(error)]
        logger.warning("%s is left out: %s", case, _reason(error), exc_info=error if self.debug else None)
        self._note(case)
        if self.inferer.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note(self, case: str) -> None:
        """Put a case on record, done or failed, and go on to the next."""
        try:
            self._files.note(self.report, case)
        except OSError as error:
            self._stop_if_folder_is_to_blame(error)
            raise
        self._next()

    def _next(self) -> None:
        self._position += 1
        self._bar.update()

    def _remove(self, case: str) -> None:
        """Delete what there is of a failed case: of this run, and what it was to replace; not what others wrote."""
        for path in self._planned(case):
            if placed_here(path) or (self._before.get(path) is not None and signature(path) == self._before[path]):
                path.unlink()
        with contextlib.suppress(OSError):
            probability_folder(self.output_dir, case).rmdir()

    def _stop_if_folder_is_to_blame(self, error: BaseException) -> None:
        for cause in _causes(error):
            if isinstance(cause, OSError) and cause.errno in _FOLDER_ERRORS:
                raise OSError(
                    f"{self.output_dir} takes no more files ({cause.strerror}): free some space and give the same "
                    f"command again; {len(self.report['cases'])} targets are done"
                ) from error

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

    def _picture(self, target: Case, answer: Any) -> None:
        to_ras = Orientation(axcodes="RAS", labels=RAS_LABELS)
        image, shown = to_ras(load_volume(target["image"]))[0].numpy(), to_ras(answer)
        names, pairs = self._shown_contexts()
        if self.inferer.task == "generation":  # the answer itself is what is to be seen
            image, mask = shown[0].numpy(), np.zeros(shown.shape[1:], int)
            pairs = [(picture, np.zeros(picture.shape, int)) for picture, _ in pairs]
        else:
            mask = shown[0].numpy()
        figure = overlay_figure(
            image, mask, nib.affines.voxel_sizes(shown.affine.numpy()), pairs, target["case"], names
        )  # fmt: skip
        save_png(figure, self.output_dir / f"{target['case']}.png")

    def _shown_contexts(self) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
        """Names, and images and labels without the grid's empty border, of the first contexts that were used."""
        context = self.inferer.context
        used = list(dict.fromkeys(name for names in self.inferer.used.values() for name in names))[:SHOWN_CONTEXTS]
        pairs = []
        for number in map(context.names.index, used):
            both = torch.cat([part[0].float() for part in context.pairs([number])])
            low, high = generate_spatial_bounding_box(both)
            pairs.append(both[:, *map(slice, low, high)].numpy())
        return used, [(image, label) for image, label in pairs]


def _identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """What a file is, whatever its names; None for no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _file_facts(path: str) -> dict[str, Any]:
    """What a file is recognised by without being read."""
    status = os.stat(path)
    return {"path": os.path.abspath(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what led to it, down to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _reason(error: BaseException) -> str:
    """One line on what went wrong, without the wrappers that MONAI puts around an error in a transform."""
    cause = error
    while isinstance(cause, RuntimeError) and cause.__cause__ and str(cause).startswith("applying transform"):
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    known = isinstance(cause, (ValueError, OSError))
    text = lines[0] if known else f"{type(cause).__name__}: {lines[0]}".removesuffix(": ")
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 1] + "…"


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _peak_memory_mb(device: torch.device) -> float:
    """Peak of the GPU's memory for this case, or of the whole process so far on the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
