"""What a context set is tuned and judged on: its own pairs, each in turn the target of the others."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from scripts.data.preprocessing import bounding_box
from scripts.inference.self_test import Tested, predictable
from scripts.inferer import ICLInferer
from scripts.tuning.deformations import random_affine, smooth_field, warped

logger = logging.getLogger(__name__)

MOST_CASES = 64
"""Of more contexts these many are targets, evenly spread."""

MOST_CONTEXTS = 8
"""That are brought to one of them."""

FOLDS = 4
"""Of the contexts, or as many as there are: each is tuned without one of four, for a fourth of the time."""

FEWEST = 3
"""Contexts that are dealt out into folds: with fewer, each fold would have one and be judged on one."""

JUDGED_COPIES = 4
"""Deformed copies that fewer contexts are judged on."""

TUNED_COPIES = 9
"""Deformed copies that are tuned on, where contexts cannot be predicted from each other."""

COPY_TURN, COPY_SCALE = 8.0, 0.1
COPY_BEND, COPY_SPACING = 0.06, 0.4
"""Standard deviation of a copy's displacements, and distance of their control points, as parts of the labels' edge."""
COPY_GAMMA, COPY_NOISE, COPY_BIAS = 1.3, 0.03, 0.15
COPY_TEXTURE, COPY_GRAIN = 0.1, 4.0
"""Standard deviation of what a copy has of its own where it is predicted from the very scan that it is of, in
intensities from 0 to 1, and its size in voxels: the same texture would be brought back better than another scan's."""


@dataclass(frozen=True, eq=False)
class TuningCase:
    """A labelled scan of a context set.

    Attributes:
        tested: the scan with the contexts that were brought to it.
        judged_in: the fold in which it is kept out of the tuning, and judged; None for never.
        tuned_in: the folds in which it is tuned on.
    """

    tested: Tested
    judged_in: int | None
    tuned_in: tuple[int, ...]


@dataclass(frozen=True)
class TuningCases:
    """The cases of a context set.

    Attributes:
        cases: some for every fold.
        folds: how many tunings it takes until every case that is to be judged was kept out of one.
        copies: those that are judged are deformed copies of contexts, not contexts.
        from_others: and are predicted from other contexts than their own.
    """

    cases: list[TuningCase]
    folds: int
    copies: bool
    from_others: bool

    def tuned_in(self, fold: int) -> list[Tested]:
        """Those that a fold is tuned on."""
        return [case.tested for case in self.cases if fold in case.tuned_in]

    def judged_in(self, fold: int) -> list[Tested]:
        """Those that are kept out of a fold, and judged."""
        return [case.tested for case in self.cases if case.judged_in == fold]


def find_cases(predictor: ICLInferer, seconds: float, seed: int) -> TuningCases:
    """Bring contexts to each other; where they are too few, to deformed copies of themselves as well.

    Args:
        predictor: with its context set.
        seconds: about how long it may take; from the second target on it ends when they are over.
        seed: of the choices.

    Raises:
        ValueError: no context has a label that could be seen.
    """
    until = time.monotonic() + seconds
    tested = list(_in_turn(predictor, until, np.random.default_rng([seed, 1])))
    if len(tested) >= FEWEST:
        folds = min(FOLDS, len(tested))
        every = set(range(folds))
        cases = [TuningCase(one, i % folds, tuple(every - {i % folds})) for i, one in enumerate(tested)]
        return TuningCases(cases, folds, copies=False, from_others=True)
    from_others = bool(tested)
    copies = _copies(predictor, from_others, np.random.default_rng([seed, 2]))
    judged = list(itertools.islice(copies, JUDGED_COPIES))
    tested = tested or list(itertools.islice(copies, TUNED_COPIES))
    if not judged or not tested:
        raise ValueError("the contexts cannot be tuned on: none can be brought to another, or to a copy of itself")
    cases = [*(TuningCase(one, 0, ()) for one in judged), *(TuningCase(one, None, (0,)) for one in tested)]
    return TuningCases(cases, 1, copies=True, from_others=from_others)


def _in_turn(predictor: ICLInferer, until: float, rng: np.random.Generator) -> Iterator[Tested]:
    """Contexts that can be predicted from others, with those brought to them."""
    context = predictor.context
    numbers = predictable(context, predictor.label_values, MOST_CASES)
    order = rng.permutation(sorted(numbers)).tolist()
    began = time.monotonic()
    for count, number in enumerate(tqdm(order, "aligning contexts", unit="context", disable=not order)):
        now = time.monotonic()
        if count >= FEWEST and now + (now - began) / count > until:
            logger.info("%d of %d contexts are tuned on: the time is too short for all", count, len(order))
            return
        others = [other for other in range(len(context)) if other != number]
        among = rng.permutation(others)[:MOST_CONTEXTS].tolist()
        image, label, counted = context.counted_native(number)
        target = predictor.target(image)
        predictor.prepare_views(target, None if context.chooses else among)
        if any(view.showing(among) for view in target.views):
            yield Tested(context.names[number], target, label, counted, numbers[number])


def _copies(predictor: ICLInferer, from_others: bool, rng: np.random.Generator) -> Iterator[Tested]:
    """Deformed copies of contexts, with other contexts brought to them, or the very ones that they are copies of."""
    context = predictor.context
    holding = sorted({number for value in predictor.label_values for number in context.holding(value)})
    for count, number in zip(range(2 * (JUDGED_COPIES + TUNED_COPIES)), itertools.cycle(holding), strict=False):
        among = [other for other in holding if other != number] if from_others else [number]
        image, label, counted = deformed(*context.counted_native(number), rng, 0.0 if from_others else COPY_TEXTURE)
        values = [value for value in predictor.label_values if bool((label == value).any())]
        if not values:
            continue
        target = predictor.target(image)
        predictor.prepare_views(target, among)
        if any(view.showing(among) for view in target.views):
            yield Tested(f"copy {count + 1} of {context.names[number]}", target, label, counted, values)


def deformed(
    image: MetaTensor, label: MetaTensor, counted: Tensor, rng: np.random.Generator, texture: float = 0.0
) -> tuple[MetaTensor, MetaTensor, Tensor]:
    """Another anatomy, and another scan of it: a pair bent at random, in other light.

    Args:
        image: (1, H, W, D) on its own voxels.
        label: its label map.
        counted: where that counts.
        rng: the draw.
        texture: standard deviation of a texture of its own.
    """
    shape = image.shape[1:]
    box = bounding_box(label[0].as_tensor() > 0)
    edge = float(np.mean([high - low for low, high in box]))
    matrix, shift = random_affine(rng, COPY_TURN, COPY_SCALE, 0.0, shape)
    middle = np.array([(low + high - size) / 2 for (low, high), size in zip(box, shape, strict=True)])
    shift = shift + middle - matrix @ middle  # about the labels' middle
    field = smooth_field(rng, COPY_BEND * edge, COPY_SPACING * edge, shape)
    numbers = label.as_tensor().unique().tolist()
    low, high = image.min(), image.max()
    masks = [label.as_tensor() == number for number in numbers]
    volumes = [(image.as_tensor() - low) / (high - low), *masks, ~counted.as_subclass(Tensor)]
    found = warped(torch.cat([one.float() for one in volumes])[None], matrix[None], shift[None], field[None])[0]
    bias = 1 + COPY_BIAS * smooth_field(rng, 1.0, edge, shape)[:1]
    lit = found[:1].clamp(0, 1) ** float(COPY_GAMMA ** rng.uniform(-1, 1)) * bias
    lit = lit + texture * smooth_field(rng, 1.0, COPY_GRAIN, shape)[:1]
    lit = lit + rng.uniform(0, COPY_NOISE) * torch.from_numpy(rng.standard_normal(lit.shape, np.float32))
    winner = torch.tensor(numbers, dtype=label.dtype)[found[1:-1].argmax(0)][None]
    return (
        MetaTensor(low + lit.clamp(0, 1) * (high - low), affine=image.affine),
        MetaTensor(winner, affine=label.affine),
        MetaTensor(found[-1:] < 0.5, affine=label.affine),
    )
