"""What the Ignite engines do with groups and episodes."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Average, Metric
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.metrics import PSNRMetric, compute_dice
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from scripts.data.augmentation import NO_GIN
from scripts.data.episodes import IGNORED, as_episode
from scripts.data.label_decision import MASK_THRESHOLD
from scripts.runtime.precision import TYPES


def prepare_episode(
    group: Mapping[str, Any],
    device: str | torch.device | None = None,
    non_blocking: bool = False,
    mini_context_size: int = 3,
    **_: Any,
) -> tuple[Tensor, Tensor, tuple, dict[str, Any]]:
    """``prepare_batch`` of MONAI's engines for a batch of groups.

    Args:
        group: ``image`` and ``label``, each ``(B, L+1, 1, H, W, D)``; ``target`` says which member is the
            target (default 0).
        device: where the target goes; the contexts stay where they are, the network fetches them piecewise.
        non_blocking: of the transfer.
        mini_context_size: handed to the network.

    Returns:
        target image, target label, no positional arguments, the network's keyword arguments.
    """
    image, label, context_in, context_out = as_episode(group, group.get("target", 0))
    return (
        image.to(device, non_blocking=non_blocking),
        label.to(device, non_blocking=non_blocking),
        (),
        {"context_in": context_in, "context_out": context_out, "mini_context_size": mini_context_size},
    )


def episode_scores(pred: Tensor, label: Tensor, generation: Tensor) -> dict[str, Tensor | None]:
    """Mean scores of a batch of episodes, each over the episodes it suits.

    Args:
        pred: ``(B, K, H, W, D)``.
        label: the wanted output, the same shape.
        generation: ``(B,)``, true where the output is an image.

    Returns:
        ``dice`` of the thresholded predictions (an empty pair of masks counts as 1) and ``psnr`` in dB for outputs
        in [0, 1]; None where no episode is of that kind.
    """
    pred, generation = pred.detach(), generation.to(pred.device)
    scores: dict[str, Tensor | None] = {"dice": None, "psnr": None}
    if not generation.all():
        mask = (pred[~generation] > MASK_THRESHOLD).float()
        scores["dice"] = compute_dice(mask, label[~generation], ignore_empty=False).mean()
    if generation.any():
        scores["psnr"] = PSNRMetric(max_val=1.0)(pred[generation], label[generation]).mean()
    return scores


def leave_out_ignored(group: Mapping[str, Any], pred: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Prediction and wanted output, both 0 where the output is :data:`IGNORED`: any loss and score is of the rest.

    Args:
        group: a batch; without ``ignores`` nothing is ignored.
        pred: ``(B, K, H, W, D)``.
        label: the same shape.
    """
    if "ignores" not in group or not group["ignores"].any():
        return pred, label
    ignored = label == IGNORED
    return pred.masked_fill(ignored, 0), label.masked_fill(ignored, 0)


class AverageWhereDefined(Average):
    """Ignite's average over the iterations whose value is not None; without any there is no metric."""

    def iteration_completed(self, engine: Engine) -> None:
        """Take an iteration's value."""
        if self._output_transform(engine.state.output) is not None:
            super().iteration_completed(engine)

    def completed(self, engine: Engine, name: str) -> None:
        """Give the epoch's value."""
        engine.state.metrics.pop(name, None)
        with contextlib.suppress(NotComputableError):
            super().completed(engine, name)


def score_metrics(prefix: str, output_of: Callable[[Any], Mapping[str, Any]]) -> dict[str, Metric]:
    """Averages over an epoch of what :func:`episode_scores` found.

    Args:
        prefix: of the metrics' names.
        output_of: gives the dict with the scores, out of the engine's output.
    """
    return {
        f"{prefix}_dice": AverageWhereDefined(lambda output: output_of(output)["dice"]),
        f"{prefix}_psnr": AverageWhereDefined(lambda output: output_of(output)["psnr"]),
    }


class GroupTrainer(SupervisedTrainer):
    """Trainer whose iteration is one batch of groups: every member in turn is the target, one episode each.

    Of groups that say how many of their members are ``targets`` only so many, the first, are.

    The optimiser steps after every ``accumulation_steps`` episodes, and after the last one of an epoch. A group's
    ``loss_weight`` multiplies its loss. Under float16 the gradients are scaled. The engine's output is a list of one
    dict, a form that MONAI's handlers and its experiment tracking read: the last member's tensors, and ``loss``
    (weighted), ``dice`` and ``psnr`` averaged over the members. The scores' averages over an epoch are the metrics
    ``train_dice`` and ``train_psnr``.

    Args:
        args: as MONAI's trainer takes them.
        mini_context_size: handed to the network.
        gin: intensity augmentation, called with ``(L+1, 1, H, W, D)`` images on the engine's device and a seed.
        fp16: scale the gradients, for a network that runs in float16.
        key_train_metric: a metric by its name; without one there are no metrics.
        kwargs: as MONAI's trainer takes them.

    Attributes:
        metrics: all metrics by name.
        files: closed when a run ends, in whichever way; handlers put what they write into here.
    """

    def __init__(
        self,
        *args: Any,
        mini_context_size: int = 3,
        gin: Callable[[Tensor, int], Tensor] | None = None,
        fp16: bool = False,
        key_train_metric: Mapping[str, Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        scores = score_metrics("train", lambda output: output[0])
        self.metrics = {**key_train_metric, **scores} if key_train_metric else {}
        self.files = contextlib.ExitStack()
        episodes = {"prepare_batch": prepare_episode, "to_kwargs": {"mini_context_size": mini_context_size}}
        steps = {"optim_set_to_none": True, "decollate": False}
        metrics = {"key_train_metric": key_train_metric, "additional_metrics": scores}
        super().__init__(*args, **episodes | steps | metrics | kwargs)
        self.gin = gin
        # not `scaler`, which MONAI makes anew when it runs
        self.grad_scaler = torch.amp.GradScaler(torch.device(self.state.device).type) if fp16 else None
        self.steps_now = True

    def run(self) -> None:
        """Train."""
        with self.files:
            super().run()

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> list[dict[str, Any]]:
        if self.gin is not None and (batchdata["gin"] != NO_GIN).any():
            batchdata = {**batchdata, "image": self._augmented(batchdata["image"], batchdata["gin"])}
        # once for all members, from pinned memory without waiting: picking members out first would give pageable copies
        moved = {key: batchdata[key].to(self.state.device, non_blocking=True) for key in ("image", "label")}
        batchdata = {**batchdata, **moved}
        targets = int(batchdata["targets"].min()) if "targets" in batchdata else batchdata["image"].shape[1]
        done = (self.state.iteration - 1) % self.state.epoch_length * targets
        self.network.train()
        outputs = []
        for target in range(targets):
            into_step = (done + target) % self.accumulation_steps
            left = self.state.epoch_length * targets - (done + target)
            share = min(self.accumulation_steps, into_step + left)  # the last step of an epoch may have fewer episodes
            self.steps_now = into_step + 1 == share
            outputs.append(self._episode({**batchdata, "target": target}, into_step == 0, share))
        output = self.state.output
        for name in ("loss", "dice", "psnr"):
            values = [found[name] for found in outputs if found[name] is not None]
            output[name] = torch.stack(values).mean() if values else None
        return [output]

    def _episode(self, batchdata: dict[str, Any], first: bool, share: int) -> dict[str, Tensor | None]:
        """Forward, backward and, where it is due, a step for ``share`` episodes; MONAI's order of events."""
        inputs, label, args, kwargs = self.prepare_batch(
            batchdata, self.state.device, self.non_blocking, **self.to_kwargs
        )
        if first:
            self.optimizer.zero_grad(set_to_none=self.optim_set_to_none)
        output = self.state.output = {Keys.IMAGE: inputs, Keys.LABEL: label}
        pause = not self.steps_now and hasattr(self.network, "no_sync")  # ranks exchange gradients before steps only
        with self.network.no_sync() if pause else contextlib.nullcontext():
            output[Keys.PRED] = self.inferer(inputs, self.network, *args, **kwargs)
            output[Keys.PRED], label = leave_out_ignored(batchdata, output[Keys.PRED], label)
            output[Keys.LABEL] = label
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            weight = batchdata["loss_weight"]
            weighted = {} if (weight == 1).all() else {"group_weight": weight.to(label.device)}  # any loss will do then
            output[Keys.LOSS] = self.loss_function(output[Keys.PRED], label, **weighted).mean()
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            loss = output[Keys.LOSS] / share
            (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        if self.grad_scaler is not None and self.steps_now:
            self.grad_scaler.unscale_(self.optimizer)
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if self.steps_now and self.grad_scaler is None:
            self.optimizer.step()
        elif self.steps_now:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        scores = episode_scores(output[Keys.PRED], label, batchdata["generation"])
        return scores | {"loss": output[Keys.LOSS].detach()}

    def _augmented(self, images: Tensor, seeds: Tensor) -> Tensor:
        """GIN on the engine's device, group by group; the result goes back to where the images were."""
        groups = [
            self.gin(group.to(self.state.device), int(seed)).to(group.device) if seed != NO_GIN else group
            for group, seed in zip(images, seeds, strict=True)
        ]
        return torch.stack(groups)


class EpisodeEvaluator(SupervisedEvaluator):
    """Evaluator over episodes: its output also has ``dice`` and ``psnr``, as the trainer's.

    Their averages are the metrics ``val_dice`` and ``val_psnr``. Of the key metric, a loss, less is better.

    Args:
        args: as MONAI's evaluator takes them.
        mini_context_size: handed to the network.
        kwargs: as MONAI's evaluator takes them.
    """

    def __init__(self, *args: Any, mini_context_size: int = 3, **kwargs: Any) -> None:
        episodes = {"prepare_batch": prepare_episode, "to_kwargs": {"mini_context_size": mini_context_size}}
        metrics = {"additional_metrics": score_metrics("val", lambda output: output), "metric_cmp_fn": operator.lt}
        super().__init__(*args, **episodes | metrics | {"decollate": False} | kwargs)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        output = super()._iteration(engine, batchdata)
        output[Keys.PRED], output[Keys.LABEL] = leave_out_ignored(batchdata, output[Keys.PRED], output[Keys.LABEL])
        output |= episode_scores(output[Keys.PRED], output[Keys.LABEL], batchdata["generation"])
        return output


class EpisodeInferer(SimpleInferer):
    """Runs the network on an episode, under autocast where asked for, on any device.

    MONAI's trainer knows autocast on CUDA only, and always scales gradients, which bfloat16 does not need.

    Args:
        amp: run under autocast.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
    """

    def __init__(self, amp: bool = False, amp_dtype: str = "bfloat16") -> None:
        super().__init__()
        if amp_dtype not in TYPES:
            raise ValueError(f"amp_dtype must be {' or '.join(TYPES)}, got {amp_dtype!r}")
        self.amp = bool(amp)
        self.dtype = getattr(torch, amp_dtype)

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Prediction in float32."""
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.amp):
            return network(inputs, *args, **kwargs).float()
