"""A training run in its folder: start, checkpoints, resume."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import random
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from scripts.checkpoint import CheckpointError, atomic_save, load_weights, read_checkpoint
from scripts.data import Collection, PreparedCases
from scripts.data.files import read_json
from scripts.networks import Neuroverse3D
from scripts.runtime.manifest import MANIFEST, write_manifest
from scripts.runtime.output_folder import OutputFolder, write_json, write_text
from scripts.runtime.termination import STATUS, StopRequest
from scripts.training.engine import GroupTrainer
from scripts.training.handlers import BestScore

logger = logging.getLogger(__name__)

BEST, LAST, SPLIT = "model.pt", "last.pt", "splits.json"
_WEIGHTS = (LAST, BEST)
_FILES = (*_WEIGHTS, "metrics.csv", SPLIT, "rows.json", "config.json", MANIFEST)
_EVENTS = "tensorboard/events.out.tfevents.*"
_LOCK = "training.lock"

_claims: dict[Path, tuple[threading.Thread, contextlib.ExitStack]] = {}
"""Folders that trainings of this process have claimed, by the thread that each is in."""


def continues(folder: str | os.PathLike, resume: bool) -> bool:
    """Whether there is a run to go on with; with ``resume`` and none, one that saved nothing yet begins anew."""
    return resume and (Path(folder) / LAST).is_file()


def claim_folder(folder: str, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that training into a folder loses nothing, and that no other training goes into it meanwhile.

    The operating system's lock on the folder ends with the training, however that ends. Of several processes the
    first holds it.

    Args:
        folder: the run's folder.
        resume: continue what is there; a run that saved no weights yet begins anew.
        overwrite: start anew where there is a run; :func:`clear_folder` deletes it once all else is in order.

    Raises:
        FileNotFoundError: there are weights, but nothing to resume from.
        FileExistsError: another training is at work in the folder; or it holds a run, and neither ``resume`` nor
            ``overwrite`` is given; or files that this program did not write.
    """
    first = idist.get_rank() == 0
    if first:
        _lock(Path(folder).resolve())
    try:
        _check_run(Path(folder), resume, overwrite)
        if first:
            _check_files(Path(folder), resume)
    except BaseException:
        release_folder(folder)
        raise


def _check_run(path: Path, resume: bool, overwrite: bool) -> None:
    if resume and not continues(path, resume):
        if (path / BEST).exists():
            raise FileNotFoundError(
                f"nothing to resume: no {path / LAST}, only {BEST}: train on from it with --init_checkpoint and "
                "another --output_dir"
            )
        logger.info("nothing to resume in %s: the training begins", path)
    held = [name for name in _WEIGHTS if (path / name).exists()]
    if held and not resume and not overwrite:
        raise FileExistsError(
            f"{path} already holds a run ({', '.join(held)}): continue it with --resume true, replace it "
            "with --overwrite true, or give another --output_dir"
        )


def _check_files(path: Path, resume: bool) -> None:
    output = OutputFolder(path)
    _adopt_earlier_version(path, output)
    output.remove_leftovers()
    output.check(*(path / name for name in _FILES if not (resume and name == LAST)))  # that one by its content


def release_folder(folder: str | os.PathLike) -> None:
    """End the claim of :func:`claim_folder`."""
    _, held = _claims.pop(Path(folder).resolve(), (None, contextlib.ExitStack()))
    held.close()


def clear_folder(folder: str | os.PathLike) -> None:
    """Delete what this program wrote of a run in a folder, and put on record what TensorBoard is to write.

    Raises:
        FileExistsError: something else bears the name of one of the run's files.
    """
    path, output = Path(folder), OutputFolder(folder)
    output.remove(*(path / name for name in _FILES))
    output.remove(*(file for file in path.glob(_EVENTS) if output.wrote(file)))
    # its files bear the name of the host and the number of the process
    output.claim(f"{_EVENTS}{glob.escape(socket.gethostname())}.{os.getpid()}.*")


def _lock(path: Path) -> None:
    thread, held = _claims.pop(path, (None, contextlib.ExitStack()))
    if thread is not None and thread.is_alive() and thread is not threading.current_thread():
        _claims[path] = thread, held
    else:
        held.close()  # of a training in this thread that failed before it began
    stack = contextlib.ExitStack()
    try:
        stack.enter_context(OutputFolder(path).at_work(_LOCK))
    except BlockingIOError as error:
        raise FileExistsError(f"another training is at work in {path}: wait, or give another --output_dir") from error
    _claims[path] = threading.current_thread(), stack


def _adopt_earlier_version(path: Path, output: OutputFolder) -> None:
    """Put a run of a version without record on record: the folder has its manifest, and no record of anything."""
    if any(output.wrote(path / name) for name in _FILES):
        return
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        ours = {"bundle", "environment", "options", "config", "earlier"} <= manifest.keys()
    except (OSError, ValueError, AttributeError):
        return
    if ours and manifest["config"].get("stage") == path.name:
        output.adopt(*(path / name for name in _FILES), *path.glob(_EVENTS))


def earlier_split(folder: str) -> str | None:
    """Split of the run in a folder, so that its test cases stay out of what follows; None if there is no run.

    Of a run that has lost it the path is given all the same: whoever needs it is to miss it, not to draw another one.
    """
    path = Path(folder) / SPLIT
    return str(path) if path.is_file() or (Path(folder) / LAST).is_file() else None


def recorded_amp(folder: str) -> bool | None:
    """Whether the run in a folder was under autocast, by its manifest; None if that does not say."""
    path = Path(folder) / MANIFEST
    found = read_json(path, dict, "expected the manifest of a run") if path.is_file() else {}
    amp = found.get("options", {}).get("amp")
    return amp if isinstance(amp, bool) else None


class TrainingRun:
    """Trains into a folder: ``model.pt`` (best on validation), ``last.pt`` (to resume), configuration, split.

    ``last.pt`` holds the network, optimiser, scheduler, epoch, random state, best score and early-stop count,
    and is written whole or not at all after every epoch, before ``model.pt``. Of several processes the first one
    writes.

    SIGTERM (``docker stop``, Slurm) ends the run after the group that is being trained, with a ``last.pt`` that also
    says how far the epoch has come: resumed, the run ends with the same weights as one that was never stopped. During
    validation it ends after that.

    Args:
        folder: the run's folder, claimed by :func:`claim_folder` before the training runs.
        trainer: training engine, with the network (a wrapper's ``module`` is looked through) and the optimiser.
        evaluator: validation engine, run by the trainer; its ``val_loss`` decides which model is best.
        lr_scheduler: the plateau scheduler, stepped on validation.
        collection: where the split comes from; it is not written if the cases were given directly.
        init_checkpoint: weights to start from; None for random ones.
        resume: continue what is in the folder.
        compile: have PyTorch compile the network's parts.
        early_stop_patience: stop after this many validations without gain; None never does.
    """

    def __init__(
        self,
        folder: str,
        trainer: GroupTrainer,
        evaluator: Engine,
        lr_scheduler: ReduceLROnPlateau,
        collection: Collection | None = None,
        init_checkpoint: str | None = None,
        resume: bool = False,
        compile: bool = False,
        early_stop_patience: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.network: Neuroverse3D = getattr(trainer.network, "module", trainer.network)
        self.trainer = trainer
        self.evaluator = evaluator
        self.lr_scheduler = lr_scheduler
        self.learning_rate = trainer.optimizer.param_groups[0]["lr"]
        self.fixed = self._fixed()
        self.collection = collection
        self.init_checkpoint = init_checkpoint
        self.resume = resume
        self.compile = compile
        self.stopped = False
        self._request = StopRequest()
        self.best = BestScore()
        self.state = {
            "network": self.network,
            "optimizer": trainer.optimizer,
            "lr_scheduler": lr_scheduler,
            "trainer": trainer,
            "best": self.best,
            "random": RandomState(),
        }
        if trainer.grad_scaler is not None:
            self.state["scaler"] = trainer.grad_scaler
        if early_stop_patience is not None:
            # Ignite's own handler: MONAI's wrapper has no state to resume from
            stop = EarlyStopping(early_stop_patience, lambda engine: -engine.state.metrics["val_loss"], trainer)
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, stop)
            self.state["early_stopping"] = stop

    def run(self, config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        """Prepare the data, load the weights or what is to be resumed, and train.

        Args:
            config: the configuration as run, kept in ``config.json``.
            options: its options' values, with which ``manifest.json`` is written.

        Raises:
            DatasetError: faulty or too few cases.
            CheckpointError: the weights do not fit, or what is there cannot be resumed with these options.
        """
        try:
            self._prepare()
            with self._request:
                self._train(config, options)
        finally:
            release_folder(self.folder)
        if not self.stopped:
            logger.info("best validation loss %.4g; weights in %s", self.best.value, self.folder / BEST)

    def _fixed(self) -> dict[str, Any]:
        """Options that a resumed run must share, by name."""
        loader: DataLoader = self.trainer.data_loader
        return {
            "seed": loader.dataset.seed,
            "spatial_size": self.network.grid.tolist(),
            "channels": list(self.network.channels),
            "convs_per_block": self.network.convs_per_block,
            "groups_per_epoch": loader.dataset.groups_per_epoch,
            "batch_size": loader.batch_size,
        }

    def _prepare(self) -> None:
        """Data and starting weights; only then an earlier run is deleted."""
        with idist.one_rank_first():  # the first process reads and makes each file, the others find it
            for engine in (self.trainer, self.evaluator):
                engine.data_loader.dataset.prepare()
        if self.init_checkpoint and not self.resume:
            load_weights(self.network, self.init_checkpoint)
        if idist.get_rank() == 0 and not self.resume:
            clear_folder(self.folder)
        if self.compile:
            self.network.compile_parts()

    def _train(self, config: Mapping[str, Any], options: Mapping[str, Any] | None) -> None:
        if self.resume:
            self._restore(self.folder / LAST)
        if idist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(config, indent=2, default=str), self.folder / "config.json")
            if self.collection is not None and self.collection.is_read:
                self.collection.write_split(self.folder / SPLIT)
                write_json(self.collection.describe(), self.folder / "rows.json")
            if options is not None:
                path = self.folder / MANIFEST
                before = None
                if self.resume and path.is_file():
                    before = read_json(path, dict, "expected the manifest of a run")
                write_manifest(self.folder, config, dict(options) | {"resume": self.resume}, self._listing(), before)
        logger.info(
            "training %d parameters, channels %s, epochs %d to %d, into %s",
            sum(p.numel() for p in self.network.parameters()),
            list(self.network.channels),
            self.trainer.state.epoch + 1,
            self.trainer.state.max_epochs,
            self.folder,
        )
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop_after_epoch)
        self.trainer.run()

    def conclude(self) -> None:
        """End the program with SIGTERM's status if that stopped the run; the last thing a workflow does.

        Raises:
            SystemExit: status 143.
        """
        if self.stopped:
            raise SystemExit(STATUS)

    def _listing(self) -> list[tuple[str, str]]:
        """Part and name of every case, and its digest."""
        prepared: PreparedCases = self.trainer.data_loader.dataset.prepared
        return [
            (f"{part}/{source}/{case['case'].rpartition('/')[2]}", case["digest"])
            for part, sources in prepared.cases.items()
            for source, cases in sources.items()
            for case in cases
        ]

    def _restore(self, path: Path) -> None:
        content = read_checkpoint(path)
        needed = set(self.state) - {"early_stopping", "scaler"} | {"fixed", "learning_rate"}
        missing = needed - set(content) if isinstance(content, dict) else needed
        if missing:
            raise CheckpointError(f"{path} cannot be resumed: it has no {', '.join(sorted(missing))}")
        other = [f"--{n} {content['fixed'].get(n)}" for n, v in self.fixed.items() if content["fixed"].get(n) != v]
        if other:
            raise CheckpointError(f"{path} was trained with {', '.join(other)}: keep that when resuming")
        epochs, patience = self.trainer.state.max_epochs, self.lr_scheduler.patience
        for name, part in self.state.items():
            if name in content:
                part.load_state_dict(content[name])
        if self.trainer.state.epoch >= epochs:
            raise ValueError(f"{path} has already finished epoch {self.trainer.state.epoch} of --epochs {epochs}")
        self.trainer.state.max_epochs = epochs
        # another number of processes deals an epoch's groups out in shares of another length
        self.trainer.state.iteration = self.trainer.state.epoch * len(self.trainer.data_loader)
        self.trainer.state.epoch_length = len(self.trainer.data_loader)
        if "within_epoch" in content:
            self._enter_epoch(content["within_epoch"], content["random"])
        self.lr_scheduler.patience = patience
        before = content["learning_rate"]
        if self.learning_rate != before:  # the schedule goes on from where it was, scaled
            logger.info("learning rate changed from %g to %g", before, self.learning_rate)
            for group in self.trainer.optimizer.param_groups:
                group["lr"] = group["lr"] * self.learning_rate / before if before else self.learning_rate
            self.lr_scheduler.min_lrs = [0.01 * self.learning_rate for _ in self.lr_scheduler.min_lrs]
        within = self.trainer.state.iteration % self.trainer.state.epoch_length
        where = f" and {within} of {self.trainer.state.epoch_length} steps of the next one" if within else ""
        logger.info("resuming after epoch %d%s", self.trainer.state.epoch, where)
        if idist.get_rank() == 0:
            OutputFolder.of(path).adopt(path)  # a run of this program by its content, wherever it was made
            if content.get("best_of_all"):  # the process may have ended before it wrote them
                atomic_save(self.network.state_dict(), self.folder / BEST)

    def _enter_epoch(self, done: Mapping[str, Any], random_state: Mapping[str, Any]) -> None:
        """Go on within an epoch: with its remaining groups, and with the metrics of those that are done."""
        state, loader = self.trainer.state, self.trainer.data_loader
        # with another number of processes the steps may not come out even: then a few groups are trained again
        steps = done["groups"] // (loader.batch_size * idist.get_world_size())
        state.iteration += steps
        loader.sampler.skip(state.epoch + 1, steps * loader.batch_size)

        def restore_metrics() -> None:  # the start of an epoch resets them
            for name, metric in self.trainer.metrics.items():
                metric.load_state_dict(done["metrics"][name])

        def restore_random_state() -> None:  # a new iterator over the data draws from it
            self.state["random"].load_state_dict(random_state)

        if done["processes"] == idist.get_world_size():
            self.trainer.add_event_handler(Events.EPOCH_STARTED(once=state.epoch + 1), restore_metrics)
        else:
            logger.warning("trained with %d processes before: this epoch's metrics cover the rest of it only",
                           done["processes"])  # fmt: skip
        if steps:
            self.trainer.add_event_handler(Events.GET_BATCH_STARTED(once=state.iteration), restore_random_state)

    def _stop_asked(self) -> bool:
        """Whether any process got SIGTERM; they all have to stop at the same step."""
        return bool(idist.all_reduce(int(self._request.made), "MAX"))

    def _stop_within_epoch(self, engine: Engine) -> None:
        steps = engine.state.iteration % engine.state.epoch_length
        # the epoch's end is saved as ever; gradients that still wait for a step could not be saved
        if not steps or not engine.steps_now or not self._stop_asked():
            return
        processes = idist.get_world_size()
        done = {
            "groups": steps * engine.data_loader.batch_size * processes,
            "processes": processes,
            "metrics": {name: metric.state_dict() for name, metric in self.trainer.metrics.items()},
        }
        self._write(within_epoch=done)
        self._stop(engine, f"in epoch {engine.state.epoch} after {steps} of {engine.state.epoch_length} steps")

    def _stop_after_epoch(self, engine: Engine) -> None:
        if engine.state.epoch < engine.state.max_epochs and self._stop_asked():
            self._stop(engine, f"after epoch {engine.state.epoch}")

    def _stop(self, engine: Engine, where: str) -> None:
        self.stopped = True
        logger.info("stopped by SIGTERM %s: %s is complete, go on with --resume true", where, self.folder / LAST)
        engine.terminate()

    def _save(self, engine: Engine) -> None:
        best = False
        if self.evaluator.state.epoch == engine.state.epoch:  # validated in this epoch
            val_loss = float(self.evaluator.state.metrics["val_loss"])
            if not np.isfinite(val_loss):
                logger.warning("the validation loss is %s: these weights are not kept as the best", val_loss)
            best = self.best.improves(val_loss)
        self._write(best_of_all=best)  # first: what it says of the best weights, a resumed run makes true
        if best and idist.get_rank() == 0:
            atomic_save(self.network.state_dict(), self.folder / BEST)

    def _write(self, **more: Any) -> None:
        if idist.get_rank() == 0:
            content = {name: part.state_dict() for name, part in self.state.items()}
            content |= {"learning_rate": self.learning_rate, "fixed": self.fixed}
            atomic_save(content | more, self.folder / LAST)


class RandomState:
    """State of the global random generators, as tensors and numbers that load without unpickling."""

    def state_dict(self) -> dict[str, Any]:
        """Take the state."""
        version, python, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": [version, list(python), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the state back."""
        version, python, gauss = state["python"]
        random.setstate((version, tuple(python), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
