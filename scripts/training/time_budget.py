"""A training of some seconds, or steps: the learning rate falls to the end, and the weights are averaged on the way."""

from __future__ import annotations

import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

FLOOR = 0.05
"""Learning rate at the end, as a part of that at the start."""

RECENT = 8.0
"""How much the average favours recent weights (eta of Shamir & Zhang 2013, "polynomial-decay averaging")."""


class TimeBudget:
    """Ends an epoch when its time is over; until then the learning rate falls linearly.

    Args:
        optimizer: whose learning rate falls from where it is.
        steps: of an epoch, in place of a time; None for time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> None:
        self.optimizer = optimizer
        self.steps = steps
        self.seconds = float("inf")
        self._highest = [group["lr"] for group in optimizer.param_groups]
        self.spent = 0.0
        self.done = 0
        self._since = 0.0

    def begin(self, seconds: float) -> None:
        """Start anew."""
        self.seconds, self.spent, self.done = seconds, 0.0, 0
        self._since = time.monotonic()

    @property
    def share(self) -> float:
        """Of the budget that is spent, 0 to 1."""
        if self.steps is not None:
            return min(1.0, self.done / self.steps)
        return min(1.0, self.spent / self.seconds) if self.seconds > 0 else 1.0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set_rate)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def _set_rate(self, engine: Engine) -> None:
        for group, highest in zip(self.optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * (1 - (1 - FLOOR) * self.share)

    def _count(self, engine: Engine) -> None:
        now = time.monotonic()
        self.spent, self._since, self.done = self.spent + now - self._since, now, self.done + 1
        if self.share >= 1:
            engine.terminate_epoch()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "spent": self.spent, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; what was spent stays spent."""
        self.seconds, self.spent, self.done = state["seconds"], state["spent"], state["done"]
        self._since = time.monotonic()


class RunningAverage:
    """Average of a network's weights after every step, in which the recent ones count more, however many there are.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.average = AveragedModel(network, avg_fn=_recent)

    def begin(self) -> None:
        """Start anew."""
        self.average.n_averaged.zero_()

    @property
    def network_so_far(self) -> nn.Module:
        """A network with the averaged weights, in evaluation mode."""
        return self.average.module.eval()

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.average.load_state_dict(state)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.average.update_parameters(self.network))


def _recent(average: Tensor, current: Tensor, count: Tensor) -> Tensor:
    return average.lerp(current, (RECENT + 1) / (int(count) + 1 + RECENT))
