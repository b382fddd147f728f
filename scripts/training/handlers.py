"""Ignite handlers that MONAI does not have. Of several processes the first one alone writes and reports."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines.utils import IterationEvents
from monai.handlers import TensorBoardStatsHandler, from_engine
from monai.utils import optional_import
from torch.nn.utils import clip_grad_norm_

from scripts.data.episodes import as_episode
from scripts.reporting.pictures import episode_figure
from scripts.runtime.options import OPTIONS
from scripts.runtime.output_folder import write_text

logger = logging.getLogger(__name__)
SummaryWriter, _ = optional_import("torch.utils.tensorboard", name="SummaryWriter")  # tuning does without


class ClipGradient:
    """Clips the network's gradient norm before every optimiser step."""

    def __init__(self, network: torch.nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = float(max_norm)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip, where gradients are not still being accumulated."""
        if engine.steps_now:
            clip_grad_norm_(self.network.parameters(), self.max_norm)


class StopOnNan:
    """Ends the run with an error when the loss is not finite, before the weights are touched.

    Ignite's TerminateOnNan ends it after the step, and without an error.
    """

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        if not torch.isfinite(engine.state.output["loss"]):
            remedy = "lower --learning_rate" if engine.grad_scaler is None else "use --amp_dtype bfloat16"
            raise FloatingPointError(
                f"the loss became {engine.state.output['loss'].item()} in epoch {engine.state.epoch} "
                f"(cases {engine.state.batch.get('cases')}): {remedy} and go on with --resume true"
            )


class MetricsFile:
    """One row per epoch in ``metrics.csv``, and a line in the log with the time that is left.

    A resumed run appends; rows of epochs that are trained again are dropped first.

    Args:
        path: the file.
        evaluator: whose metrics go along with the trainer's.
        optimizer: whose learning rate is recorded.
    """

    scores = ("train_loss", "train_dice", "train_psnr", "val_loss", "val_dice", "val_psnr")
    fields = ("epoch", *scores, "learning_rate", "context_size", "seconds")

    def __init__(self, path: str | Path, evaluator: Engine, optimizer: torch.optim.Optimizer) -> None:
        self.path = Path(path)
        self.evaluator = evaluator
        self.optimizer = optimizer
        self._started = time.monotonic()
        self._first_epoch = 1

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the validation handler."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.open)
            engine.add_event_handler(Events.EPOCH_STARTED, self.note_time)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def open(self, engine: Engine) -> None:
        """Write the header, or keep the rows up to the epoch that is resumed from."""
        self._rows: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= engine.state.epoch]
        self._first_epoch = engine.state.epoch + 1
        self._run_started = time.monotonic()
        self._write()

    def note_time(self, engine: Engine) -> None:
        """Start of an epoch."""
        self._started = time.monotonic()

    def __call__(self, engine: Engine) -> None:
        """End of an epoch."""
        now = time.monotonic()
        metrics = _epoch_metrics(engine, self.evaluator)
        row = {
            "epoch": engine.state.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "context_size": engine.state.batch["image"].shape[1] - 1,
            "seconds": round(now - self._started, 2),
        } | {name: round(float(metrics[name]), 6) for name in self.fields if name in metrics}
        self._rows.append(row)
        self._write()
        per_epoch = (now - self._run_started) / (engine.state.epoch - self._first_epoch + 1)
        left = per_epoch * (engine.state.max_epochs - engine.state.epoch)
        logger.info(
            "epoch %d/%d: %s, %d s, %s left",
            engine.state.epoch,
            engine.state.max_epochs,
            ", ".join(f"{name} {row[name]:.4g}" for name in self.scores if name in row),
            row["seconds"],
            _duration(left),
        )

    def _write(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(text.getvalue(), self.path)


def require_wandb() -> ModuleType:
    """The package wandb, which only ``--wandb true`` needs.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("--wandb true needs the package wandb: pip install wandb") from error
    return wandb


class WandbMetrics:
    """A run in Weights & Biases: the options, and per epoch both engines' metrics and the learning rate.

    The package's own environment variables apply, such as ``WANDB_PROJECT`` and ``WANDB_MODE=offline``. A resumed
    training is a new run of the same group, whose epochs go on.

    Args:
        folder: the training run's folder; wandb's files go into ``wandb`` in it.
        evaluator: whose metrics go along with the trainer's.
        optimizer: whose learning rate is recorded.
        config: the configuration as run; its options are recorded.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(
        self, folder: str | Path, evaluator: Engine, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]
    ) -> None:
        self.wandb = require_wandb()
        self.folder = Path(folder)
        self.evaluator = evaluator
        self.optimizer = optimizer
        self.options = {name: config[name] for name in OPTIONS if name in config}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the validation handler."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.open)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)
            engine.add_event_handler(Events.COMPLETED, self.close)

    def open(self, engine: Engine) -> None:
        """Start a run."""
        self.folder.mkdir(parents=True, exist_ok=True)  # without it wandb would write elsewhere
        self._run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "neuroverse3d"),
            group=os.environ.get("WANDB_RUN_GROUP", self.folder.resolve().parent.name),
            job_type=self.folder.name,
            dir=str(self.folder),
            config=self.options,
        )
        self._run.define_metric("*", step_metric="epoch")

    def __call__(self, engine: Engine) -> None:
        """End of an epoch."""
        metrics = {name: float(value) for name, value in _epoch_metrics(engine, self.evaluator).items()}
        self._run.log(metrics | {"epoch": engine.state.epoch, "learning_rate": self.optimizer.param_groups[0]["lr"]})

    def close(self, engine: Engine) -> None:
        """End the run; one that breaks off is marked so by wandb itself."""
        self._run.finish()


class TensorBoard:
    """TensorBoard files of a run: loss of every iteration, metrics of every epoch, pictures of validation.

    Args:
        folder: where they go.
        evaluator: the validation engine, whose metrics and pictures go along with the trainer's metrics.
        image_interval: epochs between pictures; 0 for none.
    """

    def __init__(self, folder: str | Path, evaluator: Engine, image_interval: int = 1) -> None:
        self.folder = str(folder)
        self.evaluator = evaluator
        self.image_interval = image_interval

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`GroupTrainer`, after the validation handler."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.open)

    def open(self, engine: Engine) -> None:
        """Begin a file; the folder is not touched before the training starts."""
        writer = engine.files.enter_context(SummaryWriter(self.folder))
        loss = from_engine(["loss"], first=True)
        TensorBoardStatsHandler(writer, tag_name="train_iteration_loss", output_transform=loss).attach(engine)
        TensorBoardStatsHandler(writer, iteration_log=False).attach(self.evaluator)
        EpisodePictures(writer, self.image_interval).attach(self.evaluator)


class EpisodePictures:
    """TensorBoard pictures of validation: target, truth, prediction, first contexts of an episode.

    One picture for each dataset and task: the first episode of its kind.

    Args:
        writer: where they go.
        interval: epochs between pictures; 0 for none.
    """

    def __init__(self, writer: SummaryWriter, interval: int = 1) -> None:
        self.writer = writer
        self.interval = int(interval)
        self._drawn: set[str] = set()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator that runs episodes."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _forget(self, engine: Engine) -> None:
        self._drawn.clear()

    def __call__(self, engine: Engine) -> None:
        """Add a picture, if there is none of this kind yet."""
        batch, output = engine.state.batch, engine.state.output
        tag = f"validation/{batch['dataset'][0]}/{batch['task'][0]}"
        if self.interval < 1 or engine.state.epoch % self.interval or tag in self._drawn:
            return
        self._drawn.add(tag)
        image, label, context_in, context_out = as_episode(batch, 0)
        figure = episode_figure(
            image[0, 0].cpu(),
            label[0, 0].cpu(),
            output["pred"][0, 0].detach().float().cpu(),
            context_in[0, :, 0].cpu(),
            context_out[0, :, 0].cpu(),
        )
        self.writer.add_image(tag, np.asarray(figure), engine.state.epoch, dataformats="HWC")


class GroupProgress(ProgressBar):
    """Ignite's progress bar over an epoch's groups, with loss and Dice."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() > 0:
            return
        super().attach(
            engine,
            output_transform=lambda output: {
                name: output[0][name].item() for name in ("loss", "dice", "psnr") if output[0][name] is not None
            },
        )


class BestScore:
    """The lowest validation loss so far, in a form that checkpoints can keep."""

    def __init__(self) -> None:
        self.value = math.inf

    def improves(self, value: float) -> bool:
        """Whether this is the best yet; remembers it."""
        if not value < self.value:
            return False
        self.value = value
        return True

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.value = float(state["value"])


def _epoch_metrics(trainer: Engine, evaluator: Engine) -> dict[str, Any]:
    """Metrics of the epoch just trained, with those of its validation where there was one."""
    validated = evaluator.state.epoch == trainer.state.epoch
    return trainer.state.metrics | (evaluator.state.metrics if validated else {})


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
