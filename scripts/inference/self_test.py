"""The contexts tested on each other: what Dice to expect before any target is seen, and which label may be wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor
from tqdm import tqdm

from scripts.data.preprocessing import Preprocessing
from scripts.inference.contexts import ContextSet
from scripts.inference.target import Target
from scripts.inference.views import View

logger = logging.getLogger(__name__)

MAX_TESTED = 32
"""Of more contexts these many are tested, evenly spread over the set."""

LOW_FENCE = 3.0
"""A Dice this many interquartile ranges below the lower quartile of its label is called out of line (Tukey)."""

LOW_MARGIN = 0.1
"""...if it is also this much below the median: contexts that agree very well have a tiny spread."""

MISSED_PART = 0.05
"""A label lies partly outside of its view if so much of it does; less is what resampling changes."""


@dataclass(frozen=True, eq=False)
class Tested:
    """A labelled scan that is predicted from contexts.

    Attributes:
        name: what reports call it.
        target: with its views.
        label: its label map, ``(1, H, W, D)`` on its own voxels.
        counted: where that counts, the same shape.
        values: labels that are looked at: those that it and some context have.
    """

    name: str
    target: Target
    label: MetaTensor
    counted: Tensor
    values: list[int]


@dataclass(frozen=True)
class Outcome:
    """What came of it, for each share of the network in the scores: Dice and agreement by label."""

    name: str
    dice: Mapping[float, Mapping[int, float]]
    agreement: Mapping[float, Mapping[int, float]]

    def mean_dice(self, share: float) -> float:
        """Over the labels."""
        return float(np.mean(list(self.dice[share].values())))


def dice_by_label(prediction: Tensor, truth: Tensor, count: int) -> list[float]:
    """MONAI's Dice of each of ``count`` labels.

    Args:
        prediction: ``(1, h, w, d)``, as from :func:`~scripts.data.label_decision.winning_label`.
        truth: the same.
        count: K.

    Returns:
        K values; NaN where neither has the label, 0 where only one has it.
    """
    masks = [one_hot(x[None], count + 1) for x in (prediction, truth)]
    dice = compute_dice(*masks, include_background=False, ignore_empty=False)[0]
    absent = ~(masks[0].flatten(2).any(2) | masks[1].flatten(2).any(2))[0, 1:]
    return torch.where(absent, torch.nan, dice).tolist()


def predictable(context: ContextSet, values: Sequence[int], limit: int = MAX_TESTED) -> dict[int, list[int]]:
    """Contexts to test, with the labels that at least one other context has as well.

    Args:
        context: the context set.
        values: label numbers.
        limit: at most so many contexts.

    Returns:
        Number of a context -> its labels that can be predicted from others.
    """
    holders = {value: context.holding(value) for value in values}
    found = {}
    for number in range(len(context)):
        others = set(fellows(context, number))
        labels = [value for value, having in holders.items() if number in having and others.intersection(having)]
        if labels:
            found[number] = labels
    return {number: found[number] for number in spread(list(found), limit)}


def spread(numbers: Sequence[int], limit: int) -> list[int]:
    """At most ``limit`` of the numbers, evenly over all of them."""
    places = np.linspace(0, len(numbers) - 1, min(len(numbers), limit)).round().astype(int)
    return [numbers[i] for i in places]


def fellows(context: ContextSet, number: int) -> list[int]:
    """Contexts to predict one of them from: all whose image is another, and of another subject."""
    itself = context.of_same_subject(context.digests[number])
    return [other for other in range(len(context)) if other not in itself]


def held_out(
    context: ContextSet,
    values: Sequence[int],
    limit: int = MAX_TESTED,
    title: str = "self-test",
    progress: bool = True,
) -> Iterator[tuple[int, MetaTensor, MetaTensor, Tensor, list[int]]]:
    """Contexts to predict from the others.

    Args:
        context: the context set.
        values: label numbers.
        limit: test at most so many contexts.
        title: of the progress bar.
        progress: show it.

    Yields:
        A context's number, its image, its label map and where that counts, each ``(1, H, W, D)``, and those of its
        labels that others have too.
    """
    cases = predictable(context, values, limit)
    for number, labels in tqdm(cases.items(), title, unit="context", disable=not (progress and cases)):
        yield number, *context.counted_native(number), labels


def dice_in_views(
    views: Sequence[View], winners: Sequence[Tensor], label: MetaTensor, counted: Tensor | None = None
) -> dict[int, float]:
    """Dice of each label on the voxels of the view that shows it.

    What of a label lies outside of its view counts as missed.

    Args:
        views: of a target.
        winners: of each view, ``(1, h, w, d)``, from :func:`~scripts.data.label_decision.winning_label`.
        label: ``(1, H, W, D)``, the target's label map.
        counted: where that counts, the same shape; None for everywhere.
    """
    scan_voxel = float(np.prod(nib.affines.voxel_sizes(np.asarray(label.affine))))
    dice = {}
    for view, winner in zip(views, winners, strict=True):
        shown = Preprocessing.label_on(label, view.image)
        if counted is not None:
            winner = winner * Preprocessing.label_on(counted, view.image)
        ratio = scan_voxel / float(np.prod(nib.affines.voxel_sizes(np.asarray(view.image.affine))))
        truth = sum((k + 1) * (shown == value).long() for k, value in enumerate(view.values))
        found = dict(zip(view.values, dice_by_label(winner, truth, len(view.values)), strict=True))
        for k, value in enumerate(view.values):
            inside = int((truth == k + 1).sum())
            missed = max(int((label == value).sum()) * ratio - inside, 0.0)
            both = int((winner == k + 1).sum()) + inside
            dice[value] = found[value] * both / (both + missed) if missed > MISSED_PART * inside else found[value]
    return dice


def summary(dice: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """What a leave-one-out says about targets to come.

    Args:
        dice: context's name -> label -> Dice.

    Returns:
        For ``report.json``: ``mean_dice``, ``sd_dice`` (of one case, not of the mean; None of a single one) and
        ``lowest_dice`` by label, ``contexts`` (name -> label -> Dice), ``worst`` (name of the context with the
        lowest mean Dice) and ``out_of_line`` (names far below the others in some label).
    """
    labels = sorted({value for found in dice.values() for value in found})
    columns = {value: np.array([found[value] for found in dice.values() if value in found]) for value in labels}
    odd = [
        name
        for name, found in dice.items()
        if any(_out_of_line(value, columns[label]) for label, value in found.items())
    ]
    return {
        "mean_dice": {str(v): round(float(x.mean()), 4) for v, x in columns.items()},
        "sd_dice": {str(v): round(float(x.std(ddof=1)), 4) if len(x) > 1 else None for v, x in columns.items()},
        "lowest_dice": {str(v): round(float(x.min()), 4) for v, x in columns.items()},
        "contexts": {name: {str(v): round(x, 4) for v, x in found.items()} for name, found in dice.items()},
        "worst": min(dice, key=lambda name: np.mean(list(dice[name].values()))),
        "out_of_line": odd,
    }


def table(found: Mapping[str, Any]) -> str:
    """The summary as lines of text: a row per label, then the worst context."""
    rows = [f"{'label':>8}{'mean Dice':>11}{'sd':>7}{'lowest':>8}{'contexts':>10}"]
    for label, mean in found["mean_dice"].items():
        sd = found["sd_dice"][label]
        tested = sum(label in dice for dice in found["contexts"].values())
        spread = f"{sd:7.3f}" if sd is not None else f"{'-':>7}"
        rows.append(f"{label:>8}{mean:11.3f}{spread}{found['lowest_dice'][label]:8.3f}{tested:10d}")
    worst = found["worst"]
    dice = ", ".join(f"label {label}: {value:.3f}" for label, value in found["contexts"][worst].items())
    rows.append(f"lowest: {worst} ({dice})")
    return "\n".join(rows)


def _out_of_line(value: float, all_values: np.ndarray) -> bool:
    low, middle, high = np.percentile(all_values, (25, 50, 75))
    return value < min(low - LOW_FENCE * (high - low), middle - LOW_MARGIN)
