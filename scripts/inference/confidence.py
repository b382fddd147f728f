"""How far a prediction can be trusted: agreement, expected Dice, and scans unlike every context.

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

from scripts.data.label_decision import score_to_beat, winning_label
from scripts.inference.context_similarity import ContextSimilarity
from scripts.inference.contexts import ContextSet
from scripts.inference.ensemble import AXES, AXIS_NAMES, draw_members, mirrored
from scripts.inference.self_test import (
    MAX_TESTED,
    Outcome,
    Tested,
    dice_in_views,
    held_out,
    spread,
    summary,
    table,
)
from scripts.inference.target import Target
from scripts.inference.views import EVEN_SHARE, Members, mixed
from scripts.inferer import ICLInferer, Volume

logger = logging.getLogger(__name__)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the network in the scores of aligned views, of which the self-test takes the best."""

THRESHOLD_SHIFTS = (-0.3, -0.15, 0.0, 0.15, 0.3)
"""A mask that hardly changes when the threshold moves by these was predicted firmly."""

FLIP_LOSS = 0.02
"""An axis is mirrored in the ensemble if that costs the contexts no more mean Dice than this."""

FLIP_TESTED = 4
"""Contexts, evenly spread, on which mirroring is tried."""

DICE_EXPONENT = 1.75
"""Dice falls faster than agreement, since wrong predictions may be firm. Fitted on half of the cases of
``benchmarks.confidence``, hippocampus data, and checked on the other half."""

LOW_AGREEMENT_MARGIN = 0.05
"""An agreement this much below that of every context is flagged."""


class Firmness:
    """Masks of all members of an ensemble at all shifted thresholds, added up voxel by voxel, for one view."""

    def __init__(self) -> None:
        self._total: Tensor | int = 0
        self._count = 0

    def add(self, scores: Tensor) -> None:
        """A member's scores ``(K, h, w, d)``."""
        firmness = scores - score_to_beat(scores)
        shifts = torch.tensor(THRESHOLD_SHIFTS, device=firmness.device, dtype=firmness.dtype)
        self._total = self._total + torch.bucketize(firmness, shifts, out_int32=True)  # how many it exceeds
        self._count += len(THRESHOLD_SHIFTS)

    def agreement(self, scores: Tensor) -> list[float]:
        """Agreement of the masks with the prediction.

        With P the part of the masks that have a label at a voxel, and M the prediction's mask: 2 Σ P M / (Σ P + Σ M),
        a Dice of the prediction with all masks; 1 if they are all the same.

        Args:
            scores: those of the prediction, ``(K, h, w, d)``.

        Returns:
            One value per label, 0 to 1; 0 for a label that the prediction does not have.
        """
        winner = winning_label(scores)[0]
        values = []
        for channel, total in enumerate(self._total):
            mask = winner == channel + 1
            part = total.float() / self._count
            both = float(part.sum()) + int(mask.sum())
            values.append(2 * float(part[mask].sum()) / both if both else 0.0)
        return values


class ConfidentInferer(Inferer):
    """An :class:`ICLInferer` that says beside each prediction how far it can be trusted.

    - **agreement**, by label: how far the prediction's mask agrees with the masks that the ensemble's members give at
      thresholds from 0.2 to 0.8, see :meth:`Firmness.agreement`. Without an ensemble there is one member.
    - **expected Dice**, by label, after a self-test in which the contexts, each predicted from the others, had a mean
      Dice and a mean agreement: mean Dice · (agreement / mean agreement)^1.75, at most 1; less where less than half
      of the contexts could be aligned.
    - **similarity** to the nearest context, and **flags** in words: unlike every context
      (:class:`~scripts.inference.context_similarity.ContextSimilarity`), in less agreement than any context, or not
      aligned.

    The self-test also chooses the network's share in the scores of aligned views (:data:`SHARES`).

    Args:
        predictor: the predictor.
        ensemble: predictions per target that are averaged, see :func:`~scripts.inference.ensemble.draw_members`; 1 is
            the plain prediction.
        self_test: predict every context from the others first.
        seed: of the ensemble's draws.
        progress: show a progress bar of the self-test.
    """

    def __init__(
        self,
        predictor: ICLInferer,
        ensemble: int = 1,
        self_test: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if ensemble < 1:
            raise ValueError(f"--ensemble must be at least 1, got {ensemble}")
        self.predictor = predictor
        self.ensemble = ensemble
        self.self_test = self_test
        self.seed = seed
        self.progress = progress
        self._flip_axes: tuple[int, ...] = ()
        self._similarity: ContextSimilarity | None = None
        self._prepared_for: ContextSet | None = None
        self._self_test_means: dict[int, tuple[float, float]] = {}
        self._lowest_agreement: dict[int, float] = {}

    @property
    def context(self) -> ContextSet:
        """The predictor's context set."""
        return self.predictor.context

    @property
    def label_values(self) -> list[int]:
        """As :attr:`ICLInferer.label_values`."""
        return self.predictor.label_values

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.predictor.device

    def target(self, image: Volume, name: str = "") -> Target:
        """As :meth:`ICLInferer.target`."""
        return self.predictor.target(image, name)

    @property
    def settings(self) -> list[Any]:
        """What changes predictions; the seed does so only with an ensemble, the self-test only with alignment."""
        chooses_share = self.self_test and self.predictor.align != "off"
        ensemble = [self.ensemble, self.seed] if self.ensemble > 1 else [1]
        return [*ensemble, "share by self-test"] if chooses_share else ensemble

    def prepare(self, known: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Look at the contexts, and test them on each other as far as asked for; before the first target.

        Args:
            known: the summary of a self-test of the same contexts, weights and settings, which is not made again.

        Returns:
            The self-test's summary for ``report.json``; None if there is none.
        """
        predictor = self.predictor
        context = self._prepared_for = predictor.context
        predictor.share = EVEN_SHARE
        self._flip_axes, self._self_test_means, self._lowest_agreement = (), {}, {}
        self._similarity = ContextSimilarity(context.pairs(spread(range(len(context)), MAX_TESTED))[0])
        if predictor.aligned is not None:
            predictor.aligned.describe(predictor.label_values)
        if predictor.task == "generation":
            if self.self_test:
                logger.warning("no self-test: its measure is Dice, and an image-to-image task has none")
            return None
        if self.ensemble > 1:
            self._flip_axes = self._harmless_flips()
        tuned = predictor.tuned["self_test"] if predictor.tuned else None
        if not self.self_test and tuned is None:
            return None
        # contexts that were tuned on look too good: what they had while they were kept out stands for them
        if tuned is None and predictor.tuned and predictor.tuned["kept"]:
            logger.warning("no self-test: the weights were tuned on these contexts, of which none was kept out")
            return None
        known = tuned or known
        found = dict(known) if known and "lowest_agreement" in known else self._test()
        if found is not None:
            self._expect(found)
        return found

    def __call__(
        self, inputs: Tensor, network: torch.nn.Module, *args: Any, target: Target | None = None, **kwargs: Any
    ) -> Tensor:
        """Scores of a preprocessed target, as :class:`ICLInferer`; what was found is in ``target``."""
        target = target or self.predictor.target_of(inputs)
        self.look(target, network)
        return self.predictor.on_grid(target)

    def predict(self, image: Volume) -> MetaTensor:
        """Prediction for one target in its own space, as :meth:`ICLInferer.predict`."""
        return self.complete(self.predictor.target(image)).prediction

    def complete(self, target: Target) -> Target:
        """As :meth:`ICLInferer.complete`, with the target's ``confidence``."""
        return self.predictor.to_native(self.look(target, self.predictor.network))

    def look(self, target: Target, network: nn.Module) -> Target:
        """As :meth:`ICLInferer.look`, with the target's ``confidence``.

        That has ``similarity``, ``agreement``, ``expected_dice`` and ``flags``, for ``report.json``.
        """
        if self._prepared_for is not self.predictor.context:
            self.prepare()
        agreement = self._predict(target, network)
        grid = self.predictor.context.preprocessing.spatial_size
        similarity, unlike = self._similarity(ResizeWithPadOrCrop(grid)(target.image.as_tensor()))
        flags = [f"unlike every context in {' and '.join(unlike)}"] if unlike else []
        flags += [target.doubt] if target.doubt else []
        flags += [
            f"label {value}: agreement {agreement[value]:.2f}, in the contexts at least {lowest:.2f}"
            for value, lowest in self._lowest_agreement.items()
            if agreement[value] < lowest - LOW_AGREEMENT_MARGIN
        ]
        support = min(1.0, 2 * target.part_aligned)  # few contexts agree easily
        expected = {
            value: min(1.0, support * dice * (agreement[value] / firmness) ** DICE_EXPONENT) if firmness else 0.0
            for value, (dice, firmness) in self._self_test_means.items()
        }
        target.confidence = {
            "similarity": round(similarity, 4),
            "agreement": {str(value): round(x, 4) for value, x in agreement.items()},
            "expected_dice": {str(value): round(x, 4) for value, x in expected.items()},
            "flags": flags,
        }
        return target

    def _predict(self, target: Target, network: nn.Module) -> dict[int, float]:
        """Scores of the ensemble go into the target; its agreement by label (none for generation tasks)."""
        predictor = self.predictor
        predictor.look(target, network)
        if predictor.task == "generation" and self.ensemble == 1:
            return {}
        by_member = [target.scores]
        for member, flips in self._members(target):
            parts = predictor.parts(target, mirrored(network, flips), member)
            by_member.append([mixed(part, predictor.share) for part in parts])
        target.scores, agreement = _combined(target, by_member)
        return {} if predictor.task == "generation" else agreement

    def _members(self, target: Target) -> list[tuple[Members, tuple[int, ...]]]:
        """Contexts by label, and mirrored axes, of each member of the ensemble but the plain one."""
        predictor = self.predictor
        drawn = draw_members(predictor.members_of(target), self.ensemble - 1, self._flip_axes, self.seed)
        return [(predictor.members_of(target, member.among), member.flips) for member in drawn]

    def _harmless_flips(self) -> tuple[int, ...]:
        """Axes along which the contexts may be mirrored without being predicted worse from each other."""
        tried = ((), *((axis,) for axis in AXES))
        predictor, dice = self.predictor, {axes: [] for axes in tried}
        tested = held_out(predictor.context, predictor.label_values, FLIP_TESTED, "mirroring", self.progress)
        for _, image, label, counted, labels in tested:
            target = predictor.target(image)
            predictor.prepare_views(target)
            members = predictor.members_of(target)
            for axes in tried:
                parts = predictor.parts(target, mirrored(predictor.network, axes), members)
                winners = [winning_label(mixed(part, predictor.share)) for part in parts]
                found = dice_in_views(target.views, winners, label, counted)
                dice[axes].append(np.mean([found[value] for value in labels]))
        means = {axes: float(np.mean(found)) if found else float("nan") for axes, found in dice.items()}
        harmless = tuple(axis for axis in AXES if means[axis,] >= means[()] - FLIP_LOSS)
        logger.info(
            "mean Dice of contexts predicted from each other: %.3f, mirrored %s; mirrored in the ensemble: %s",
            means[()],
            ", ".join(f"{AXIS_NAMES[axis]} {means[axis,]:.3f}" for axis in AXES),
            ", ".join(AXIS_NAMES[axis] for axis in harmless) or "none",
        )
        return harmless

    def _test(self) -> dict[str, Any] | None:
        """Leave one out, and what it says about targets' agreement and the network's share."""
        predictor, outcomes = self.predictor, []
        for number, image, label, counted, labels in held_out(
            predictor.context, predictor.label_values, progress=self.progress
        ):
            target = predictor.target(image)
            predictor.prepare_views(target)
            outcomes.append(self.tested(Tested(predictor.context.names[number], target, label, counted, labels)))
        if not outcomes:
            logger.warning("no self-test: it needs two contexts or more with a label in common")
            return None
        found = self.summary_of(outcomes)
        logger.info("self-test, each context predicted from the others:\n%s", table(found))
        if found["out_of_line"]:
            logger.warning("far below the other contexts, check their labels: %s", ", ".join(found["out_of_line"]))
        return found

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the network in the scores, among which a test chooses."""
        return SHARES if self.predictor.aligned is not None else (EVEN_SHARE,)

    def tested(self, case: Tested, network: nn.Module | None = None) -> Outcome:
        """Predict a labelled scan as one of a user's is, with every share of the network.

        Args:
            case: the scan.
            network: another one than the predictor's.
        """
        predictor, target = self.predictor, case.target
        network = predictor.network if network is None else network
        members = [(predictor.members_of(target), ()), *self._members(target)]
        by_member = [predictor.parts(target, mirrored(network, flips), chosen) for chosen, flips in members]
        dice, agreements = {}, {}
        for share in self.shares:
            mean, agreements[share] = _combined(target, [[mixed(part, share) for part in parts] for parts in by_member])
            found = dice_in_views(target.views, [winning_label(view) for view in mean], case.label, case.counted)
            dice[share] = {value: found[value] for value in case.values}
        return Outcome(case.name, dice, agreements)

    def summary_of(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What tests say about targets to come, for ``report.json``; with the best share of the network."""
        means = {share: float(np.mean([one.mean_dice(share) for one in outcomes])) for share in self.shares}
        best = max(self.shares, key=lambda share: (means[share], -abs(share - EVEN_SHARE)))
        found = summary({one.name: one.dice[best] for one in outcomes})
        found |= {"mean_agreement": {}, "lowest_agreement": {}}
        for label in found["mean_dice"]:
            of_label = [one.agreement[best][int(label)] for one in outcomes if int(label) in one.dice[best]]
            found["mean_agreement"][label] = round(float(np.mean(of_label)), 4)
            found["lowest_agreement"][label] = round(min(of_label), 4)
        if self.predictor.aligned is not None:
            found |= {"network_share": best, "mean_dice_by_share": {str(s): round(x, 4) for s, x in means.items()}}
        return found

    def _expect(self, found: Mapping[str, Any]) -> None:
        """Take from a self-test's summary what targets are compared with, and the network's share."""
        for label, lowest in found["lowest_agreement"].items():
            self._self_test_means[int(label)] = found["mean_dice"][label], found["mean_agreement"][label]
            self._lowest_agreement[int(label)] = lowest
        self.predictor.share = found.get("network_share", EVEN_SHARE)
        if "network_share" in found:
            logger.info(
                "share of the network in the scores: %g, the rest by vote of the contexts", self.predictor.share
            )


def _combined(target: Target, by_member: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], dict[int, float]]:
    """Mean scores of each view over the members, and their agreement by label."""
    means, agreement = [], {}
    for view, members in zip(target.views, zip(*by_member, strict=True), strict=True):
        firmness, mean = Firmness(), sum(members) / len(members)
        for scores in members:
            firmness.add(scores)
        means.append(mean)
        agreement |= dict(zip(view.values, firmness.agreement(mean), strict=True))
    return means, agreement
