"""What the Ignite engines do with groups and episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.metrics import compute_dice
from torch import Tensor

from scripts.data.episodes import as_episode

MASK_THRESHOLD = 0.5
"""A mask is where the network's (linear) output exceeds this."""


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


def episode_dice(output: Mapping[str, Tensor]) -> Tensor:
    """Mean Dice of an engine output's thresholded prediction; an empty pair of masks counts as 1."""
    mask = (output["pred"].detach() > MASK_THRESHOLD).float()
    return compute_dice(mask, output["label"], ignore_empty=False).mean()


class GroupTrainer(SupervisedTrainer):
    """Trainer whose iteration is one batch of groups: every member in turn is the target, one step each.

    The engine's output holds the last member's tensors, and ``loss`` and ``dice`` averaged over the members.
    """

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        losses, dices = [], []
        for target in range(batchdata["image"].shape[1]):
            output = super()._iteration(engine, {**batchdata, "target": target})
            losses.append(output["loss"].detach())
            dices.append(episode_dice(output))
        output["loss"], output["dice"] = torch.stack(losses).mean(), torch.stack(dices).mean()
        return output


class EpisodeInferer(SimpleInferer):
    """Runs the network on an episode, under bfloat16 autocast where asked for, on any device.

    MONAI's trainer knows autocast on CUDA only; bfloat16 needs no gradient scaler.
    """

    def __init__(self, amp: bool = False) -> None:
        super().__init__()
        self.amp = bool(amp)

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Prediction in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            return network(inputs, *args, **kwargs).float()
