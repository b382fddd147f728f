"""How far an answer can be trusted: agreement, expected Dice, and scans unlike every context.

:class:`ConfidentInferer` stands in front of :class:`~scripts.inferer.ICLInferer` and finds all three beside the
scores; with an ensemble it also averages the members' scores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import ResizeWithPadOrCrop
from torch import Tensor, nn

from scripts.contexts import ContextSet
from scripts.data.preprocessing import least_score
from scripts.engine import MASK_THRESHOLD
from scripts.ensemble import AXES, AXIS_NAMES, draw_members, mirrored
from scripts.inferer import ICLInferer, Volume
from scripts.self_test import MAX_TESTED, label_map, leave_one_out, spread, summary, table
from scripts.similarity import ContextSimilarity

logger = logging.getLogger(__name__)

THRESHOLD_SHIFTS = (-0.3, -0.15, 0.0, 0.15, 0.3)
"""A mask that hardly changes when the threshold moves by these was answered firmly."""

FLIP_LOSS = 0.02
"""An axis is mirrored in the ensemble if that costs the contexts no more mean Dice than this."""

FLIP_TESTED = 4
"""Contexts, evenly spread, on which mirroring is tried."""

DICE_EXPONENT = 1.75
"""Dice falls faster than agreement, since wrong answers may be firm. Fitted on half of the cases of
``benchmarks.expected_quality``, hippocampus data, and checked on the other half."""

LOW_AGREEMENT_MARGIN = 0.05
"""An agreement this much below that of every context is flagged."""


class Votes:
    """Masks of all members at all shifted thresholds, added up voxel by voxel."""

    def __init__(self) -> None:
        self._total: Tensor | int = 0
        self._count = 0

    def add(self, scores: Tensor) -> None:
        """A member's scores ``(1, K, h, w, d)``."""
        firmness = scores[0] - _to_beat(scores[0])
        shifts = torch.tensor(THRESHOLD_SHIFTS, device=firmness.device, dtype=firmness.dtype)
        self._total = self._total + torch.bucketize(firmness, shifts, out_int32=True)  # how many it exceeds
        self._count += len(THRESHOLD_SHIFTS)

    def agreement(self, scores: Tensor) -> list[float]:
        """Agreement of the votes with the answer.

        With P the part of the votes for a label at a voxel, and M the answer's mask: 2 Σ P M / (Σ P + Σ M), a Dice of
        the answer with the vote; 1 if all masks are the same.

        Args:
            scores: those of the answer, ``(1, K, h, w, d)``.

        Returns:
            One value per label, 0 to 1; 0 for a label that the answer does not have.
        """
        answer = label_map(scores[0])[0]
        values = []
        for channel, total in enumerate(self._total):
            mask = answer == channel + 1
            part = total.float() / self._count
            both = float(part.sum()) + int(mask.sum())
            values.append(2 * float(part[mask].sum()) / both if both else 0.0)
        return values


class ConfidentInferer(Inferer):
    """An :class:`ICLInferer` that says beside each answer how far it can be trusted.

    - **agreement**, by label: how far the answer's mask agrees with the masks that the ensemble's members give at
      thresholds from 0.2 to 0.8, see :meth:`Votes.agreement`. Without an ensemble there is one member.
    - **expected Dice**, by label, after a self-test in which the contexts, each predicted from the others, had a mean
      Dice and a mean agreement: mean Dice · (agreement / mean agreement)^1.75, at most 1.
    - **similarity** to the nearest context, and **flags** in words: unlike every context
      (:class:`~scripts.similarity.ContextSimilarity`), or in less agreement than any context.

    Args:
        inferer: the predictor.
        ensemble: predictions per target that are averaged, see :func:`~scripts.ensemble.draw_members`; 1 is the
            plain prediction.
        self_test: predict every context from the others first.
        seed: of the ensemble's draws.
        progress: show a progress bar of the self-test.
    """

    def __init__(
        self,
        inferer: ICLInferer,
        ensemble: int = 1,
        self_test: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if ensemble < 1:
            raise ValueError(f"--ensemble must be at least 1, got {ensemble}")
        self.inferer = inferer
        self.ensemble = ensemble
        self.self_test = self_test
        self.seed = seed
        self.progress = progress
        self.found: dict[str, Any] = {}
        """Of the last target: ``similarity``, ``agreement``, ``expected_dice`` and ``flags``, for ``report.json``."""
        self._flip_axes: tuple[int, ...] = ()
        self._similarity: ContextSimilarity | None = None
        self._prepared_for: ContextSet | None = None
        self._self_test_means: dict[int, tuple[float, float]] = {}
        self._lowest_agreement: dict[int, float] = {}

    @property
    def settings(self) -> list[int]:
        """What changes answers; the seed does so only with an ensemble."""
        return [self.ensemble, self.seed] if self.ensemble > 1 else [1]

    def prepare(self, known: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Look at the contexts, and test them on each other as far as asked for; before the first target.

        Args:
            known: the summary of a self-test of the same contexts, weights and settings, which is not made again.

        Returns:
            The self-test's summary for ``report.json``; None if there is none.
        """
        context = self._prepared_for = self.inferer.context
        self._flip_axes, self._self_test_means, self._lowest_agreement = (), {}, {}
        self._similarity = ContextSimilarity(context.pairs(spread(range(len(context)), MAX_TESTED))[0])
        if self.inferer.task == "generation":
            if self.self_test:
                logger.warning("no self-test: its measure is Dice, and an image-to-image task has none")
            return None
        if self.ensemble > 1:
            self._flip_axes = self._harmless_flips()
        if not self.self_test:
            return None
        found = dict(known) if known and "lowest_agreement" in known else self._test()
        if found is not None:
            self._expect(found)
        return found

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Scores of a preprocessed target, as :class:`ICLInferer`; what was found is in :attr:`found`."""
        if self._prepared_for is not self.inferer.context:
            self.prepare()
        scores, agreement = self._predict(inputs, network)
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        grid = self.inferer.context.preprocessing.spatial_size
        similarity, unlike = self._similarity(ResizeWithPadOrCrop(grid)(image[0]))
        flags = [f"unlike every context in {' and '.join(unlike)}"] if unlike else []
        flags += [
            f"label {value}: agreement {agreement[value]:.2f}, in the contexts at least {lowest:.2f}"
            for value, lowest in self._lowest_agreement.items()
            if agreement[value] < lowest - LOW_AGREEMENT_MARGIN
        ]
        expected = {
            value: min(1.0, dice * (agreement[value] / firmness) ** DICE_EXPONENT) if firmness else 0.0
            for value, (dice, firmness) in self._self_test_means.items()
        }
        self.found = {
            "similarity": round(similarity, 4),
            "agreement": {str(value): round(x, 4) for value, x in agreement.items()},
            "expected_dice": {str(value): round(x, 4) for value, x in expected.items()},
            "flags": flags,
        }
        return scores

    def predict(self, image: Volume) -> MetaTensor:
        """Answer for one target in its own space, as :meth:`ICLInferer.predict`; see :attr:`found` for the rest."""
        return self.inferer.predict(image, self)

    def _predict(
        self, image: Tensor, network: nn.Module, among: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, float]]:
        """Scores of the ensemble, and its agreement by label (none for generation tasks)."""
        votes = Votes() if self.inferer.task == "segmentation" else None
        scores = self.inferer(image, network, among=among)
        used = self.inferer.used
        number = {name: i for i, name in enumerate(self.inferer.context.names)}
        chosen = {value: [number[name] for name in names] for value, names in used.items()}
        members = draw_members(chosen, self.ensemble - 1, self._flip_axes, self.seed)
        total = scores.clone()
        for member in members:
            if votes is not None:
                votes.add(scores)
            scores = self.inferer(image, mirrored(network, member.flips), among=member.among)
            total += scores
        self.inferer.used = used  # of which the members use parts
        if votes is None:
            return total / (1 + len(members)), {}
        votes.add(scores)
        mean = total / (1 + len(members))
        return mean, dict(zip(self.inferer.label_values, votes.agreement(mean), strict=True))

    def _harmless_flips(self) -> tuple[int, ...]:
        """Axes along which the contexts may be mirrored without being predicted worse from each other."""
        dice = [self._flipped_dice(axes) for axes in ((), *((axis,) for axis in AXES))]
        harmless = tuple(axis for axis in AXES if dice[1 + axis] >= dice[0] - FLIP_LOSS)
        logger.info(
            "mean Dice of contexts predicted from each other: %.3f, mirrored %s; mirrored in the ensemble: %s",
            dice[0],
            ", ".join(f"{name} {x:.3f}" for name, x in zip(AXIS_NAMES, dice[1:], strict=True)),
            ", ".join(AXIS_NAMES[axis] for axis in harmless) or "none",
        )
        return harmless

    def _flipped_dice(self, axes: Sequence[int]) -> float:
        """Mean Dice of a few contexts, each predicted from the others in a mirror; NaN if there are no others."""
        inferer = self.inferer

        def predict(image: Tensor, among: list[int]) -> Tensor:
            return inferer(image.to(inferer.device), mirrored(inferer.network, axes), among=among)

        title = f"mirrored {AXIS_NAMES[axes[0]]}" if axes else "not mirrored"
        tested = leave_one_out(
            inferer.context, inferer.label_values, predict, FLIP_TESTED, title, progress=self.progress
        )
        means = [np.mean(list(dice.values())) for _, dice in tested]
        return float(np.mean(means)) if means else float("nan")

    def _test(self) -> dict[str, Any] | None:
        """Leave one out, and what it says about targets' agreement."""
        inferer = self.inferer
        agreements: list[dict[int, float]] = []

        def predict(image: Tensor, among: list[int]) -> Tensor:
            scores, agreement = self._predict(image.to(inferer.device), inferer.network, among)
            agreements.append(agreement)
            return scores

        tested = list(leave_one_out(inferer.context, inferer.label_values, predict, progress=self.progress))
        if not tested:
            logger.warning("no self-test: it needs two contexts or more with a label in common")
            return None
        found = summary({inferer.context.names[number]: dice for number, dice in tested})
        found |= {"mean_agreement": {}, "lowest_agreement": {}}
        for label in found["mean_dice"]:
            of_label = [a[int(label)] for (_, dice), a in zip(tested, agreements, strict=True) if int(label) in dice]
            found["mean_agreement"][label] = round(float(np.mean(of_label)), 4)
            found["lowest_agreement"][label] = round(min(of_label), 4)
        logger.info("self-test, each context predicted from the others:\n%s", table(found))
        if found["out_of_line"]:
            logger.warning("far below the other contexts, check their labels: %s", ", ".join(found["out_of_line"]))
        return found

    def _expect(self, found: Mapping[str, Any]) -> None:
        """Take from a self-test's summary what targets are compared with."""
        for label, lowest in found["lowest_agreement"].items():
            self._self_test_means[int(label)] = found["mean_dice"][label], found["mean_agreement"][label]
            self._lowest_agreement[int(label)] = lowest


def _to_beat(scores: Tensor) -> Tensor:
    """What each label's score has to exceed to win a voxel: background, and every other label's score."""
    rival = torch.zeros_like(scores)
    if len(scores) > 1:
        best, second = scores.topk(2, dim=0).values
        rival = torch.where(scores == best, second, best)
    return torch.maximum(rival, least_score(rival, MASK_THRESHOLD))
