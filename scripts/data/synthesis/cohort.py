"""Synthetic cohorts: subjects that share one hidden anatomy, and whose labels therefore correspond.

A cohort is what an in-context network learns from: given some labelled subjects, label another one. The recipe
follows SynthICL (arXiv 2509.19711), SynthSeg (Billot et al. 2023, Medical Image Analysis 86) and SynthMorph (Hoffmann
et al. 2021, IEEE TMI). No published code is used.

1. *Anatomy*, once per cohort: made up (:mod:`scripts.data.synthesis.anatomy`), or of real subjects
   (:mod:`scripts.data.synthesis.label_map_anatomy`).
2. *Pose*, once per subject (:mod:`scripts.data.synthesis.subject_pose`): so far from the others that a label cannot be
   guessed from where it lies in them.
3. *Image* (:mod:`scripts.data.synthesis.contrast`): nearly the same contrast for all subjects of a cohort, and another
   one in every cohort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor

from scripts.data.synthesis.anatomy import Anatomy, NoRoomError, draw_anatomy
from scripts.data.synthesis.contrast import draw_contrast, draw_image
from scripts.data.synthesis.label_map_anatomy import LabelMaps
from scripts.data.synthesis.seeded_draws import Draws
from scripts.data.synthesis.subject_pose import (
    MAX_LABELS,
    add_lesion,
    draw_shape,
    draw_strength,
    label_table,
    pool_labels,
    show_subject,
)

MIN_SIZE = 8
"""Fewest voxels along an axis of a grid on which structures still have a shape."""

MIN_LABEL_FRACTION = 0.001
"""Least share of a subject's voxels that every label has; lesions are missing in some subjects."""

LESION = "lesion"
"""Name of a label that some subjects lack and that lies elsewhere in each."""

_LESION_COHORTS = 0.2
_LABELLED_LESIONS = 0.6
_SUPERSAMPLING = 2
_ATTEMPTS = 10


class Cohort(NamedTuple):
    """Subjects of one anatomy.

    Attributes:
        images: (N, M, H, W, D) float32 within [0, 1]: M contrasts of every subject.
        labels: (N, 1, H, W, D) uint8, 0 for none.
        names: of the labels, first of label 1: ``structure1`` and so on, and perhaps :data:`LESION`.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]


def synthesize_cohort(
    seed: int | Sequence[int],
    subjects: int,
    spatial_size: int | Sequence[int],
    num_labels: int = 4,
    modalities: int = 1,
    label_maps: LabelMaps | None = None,
    label_map_share: float = 1.0,
    spread: float | None = None,
    device: str | torch.device = "cpu",
) -> Cohort:
    """Draw one cohort; the same arguments give the same tensors, and no global random state is touched.

    Args:
        seed: not negative; or several, such as (run, cohort).
        subjects: how many subjects N.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labels. In some cohorts of two or more, the last one is a lesion that some subjects lack.
        modalities: contrasts of every subject.
        label_maps: real anatomies to draw from.
        label_map_share: share of the cohorts that are drawn from them.
        spread: how far the subjects are put apart, from 0 (all in one pose) to 1; None draws it, mostly high.
        device: where to compute, and where the tensors are. Another kind of device gives another noise.

    Raises:
        ValueError: an argument is out of range, or so many labels do not fit into so small a grid.
    """
    size = checked_size(spatial_size)
    check_range("subjects", subjects, 1)
    check_range("num_labels", num_labels, 1, MAX_LABELS)
    check_range("modalities", modalities, 1)
    if not 0 <= label_map_share <= 1:
        raise ValueError(f"label_map_share must be from 0 to 1, got {label_map_share}")
    if spread is not None and not 0 <= spread <= 1:
        raise ValueError(f"spread must be from 0 to 1, got {spread}")
    for attempt in range(_ATTEMPTS):
        draws = Draws(seed, 0, attempt, device=device)
        lesions = num_labels > 1 and draws.chance(_LESION_COHORTS)
        labelled = lesions and draws.chance(_LABELLED_LESIONS)
        structures = num_labels - labelled
        real = draws.chance(label_map_share) and label_maps is not None
        try:
            anatomy = (
                label_maps.draw(draws, size, structures, subjects) if real else draw_anatomy(draws, size, structures)
            )
            strength = draw_strength(draws) if spread is None else spread
            found = _show(seed, attempt, draws, anatomy, subjects, size, modalities, lesions, labelled, strength)
        except NoRoomError:
            continue
        names = [f"structure{number}" for number in range(1, structures + 1)] + [LESION] * labelled
        return Cohort(*found, tuple(names))
    raise ValueError(f"{num_labels} labels do not fit into a grid of {size}: use fewer labels or a larger grid")


def _show(
    seed: int | Sequence[int],
    attempt: int,
    draws: Draws,
    anatomy: Anatomy,
    subjects: int,
    size: tuple[int, ...],
    modalities: int,
    lesions: bool,
    labelled: bool,
    strength: float,
) -> tuple[Tensor, Tensor]:
    """Images and labels of an anatomy's subjects; of each label ``MIN_LABEL_FRACTION`` of the grid at the least."""
    least = max(1, round(2 * MIN_LABEL_FRACTION * math.prod(size)))
    tissues = anatomy.tissues + 1  # the last one is the lesions'
    shape = draw_shape(draws)
    contrasts = [draw_contrast(draws, anatomy, size, tissues) for _ in range(modalities)]
    all_labels = [*anatomy.labels, (anatomy.tissues,)] if labelled else anatomy.labels
    table = label_table(all_labels).to(draws.device)
    images, labels = [], []
    for subject in range(subjects):
        own = Draws(seed, 1, attempt, subject, device=draws.device)
        seen, inside = show_subject(own, anatomy, subject, size, _SUPERSAMPLING, strength, shape, least)
        whole = pool_labels(seen, table, _SUPERSAMPLING, len(all_labels))
        counts = whole.flatten().bincount(minlength=len(all_labels) + 1)[1 : len(anatomy.labels) + 1]
        if counts.min() < least // 2:
            raise NoRoomError("a label is too thin to be seen")
        if lesions:
            seen = add_lesion(own, seen, anatomy.tissues)
            whole = pool_labels(seen, table, _SUPERSAMPLING, len(all_labels))
        images.append(torch.stack([draw_image(own, seen, inside, c, _SUPERSAMPLING) for c in contrasts]))
        labels.append(whole)
    return torch.stack(images), torch.stack(labels).unsqueeze(1)


def checked_size(spatial_size: int | Sequence[int]) -> tuple[int, ...]:
    """Voxels along each of three axes.

    Raises:
        ValueError: fewer than ``MIN_SIZE``, or no whole numbers.
    """
    size = ensure_tuple_rep(spatial_size, 3)
    for n in size:
        check_range("spatial_size", n, MIN_SIZE)
    return tuple(int(n) for n in size)


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise a ValueError that names the argument, unless it is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")
