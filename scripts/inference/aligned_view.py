"""A region of a target with the contexts that were brought there: what they vote, and what the network says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from torch import Tensor

from scripts.data.evidence import evidence, evidence_table
from scripts.data.label_decision import MASK_THRESHOLD, winning_label
from scripts.data.preprocessing import PERCENTILES
from scripts.inference.views import Members, Parts, WindowScores
from scripts.registration import Alignment, vote, vote_weights
from scripts.registration.grids import oriented
from scripts.registration.similarity import likeness

LIKENESS = (0.76, 0.82)
"""Correlation of intensities, median over the contexts, up to which the target's evidence comes from its own
intensities, by where contexts vote, and from which it comes from the contexts' intensities. Without evidence the
network says nothing up to the one, and has its full share from the other. In one contrast it is 0.80 to 0.91, in
different ones -0.3 to 0.75 (development cases)."""

LONE_VOTE = 0.5
"""What counts of the vote of a context that is alone, without another to agree with; the rest is the network's."""

COVERING_PART = 0.2
"""A context votes only if it covers at least so much of the region."""


class AlignedView:
    """A region of a target. Contexts are added one by one; then it is closed.

    Args:
        image: ``(1, h, w, d)`` in [0, 1], with its place in the scan.
        values: labels.
        generation: the contexts' labels are images; there is one label, 1.
        window: what the network sees at once; a larger region is tiled.
        evidence: show the network evidence for each label instead of intensities; not for generation.

    Attributes:
        image: as given.
        values: as given.
        similarity: by number of each context, after alignment, -1 to 1.
        words: by number, the transform in words.
        facts: for ``report.json``: ``labels``, ``spacing_mm``, ``region_mm`` (edges along R, A, S), ``centre_mm``, and
            the share of ``folded`` voxels.
    """

    def __init__(
        self, image: MetaTensor, values: Sequence[int], generation: bool, window: Sequence[int], evidence: bool
    ) -> None:
        self.image = image
        self.values = tuple(values)
        self.similarity: dict[int, float] = {}
        self.words: dict[int, str] = {}
        self.facts: dict[str, Any] = {}
        self._generation = generation
        self._window = list(window)
        self._evidence = evidence and not generation
        self._kind = ""
        self._alike = 1.0
        self._folded = 0.0
        self._images: dict[int, Tensor] = {}
        self._labels: dict[int, Tensor] = {}

    def add(self, number: int, found: Alignment, k: int, image: MetaTensor, label: MetaTensor) -> None:
        """Bring a context to the region, if it covers enough of it.

        Args:
            number: of the context.
            found: transforms of this region to contexts.
            k: which of them.
            image: ``(1, H, W, D)`` around the region, from 0 to 1.
            label: the same voxels.
        """
        # in the order that they are sampled in, while there is one channel and not one per label
        (voxels, grid), (label, _) = oriented(image), oriented(label)
        wanted = label[0].contiguous()
        both = torch.ones(2 + (1 if self._generation else len(self.values)), *grid.shape)
        both[0] = voxels[0]
        if self._generation:
            both[2] = wanted
        else:
            for mask, value in zip(both[2:], self.values, strict=True):
                torch.eq(wanted, value, out=mask)
        device = found.displacement.device if found.displacement is not None else self.image.device
        both = MetaTensor(both.to(device), affine=grid.affine)
        warped = found.warp(both, k, self.image.shape[1:], self.image.affine).cpu()
        seen = warped[1] > MASK_THRESHOLD
        if seen.float().mean() < COVERING_PART:
            return
        self._images[number] = _scaled(warped[:1], seen)
        self._labels[number] = (_scaled(warped[2:], seen) if self._generation else warped[2:]).half()
        self.similarity[number] = float(found.similarity[k])
        self.words[number] = found.describe(k)
        self._folded = max(self._folded, float(found.folded[k]))
        self._kind = found.kind

    def close(self, scan: MetaTensor, box: Sequence[tuple[int, int]]) -> AlignedView | None:
        """The view, with its :attr:`facts`; None if no context was added."""
        if not self._images:
            return None
        centre = nib.affines.apply_affine(np.asarray(scan.affine), [(low + high - 1) / 2 for low, high in box])
        spacing = float(nib.affines.voxel_sizes(np.asarray(self.image.affine))[0])
        low, high = LIKENESS
        alike = float(likeness(self.image.as_tensor()[None], torch.stack([*self._images.values()])).quantile(0.5))
        self._alike = min(max((alike - low) / (high - low), 0.0), 1.0)
        self.facts = {
            "labels": list(self.values),
            "spacing_mm": round(spacing, 3),
            "region_mm": [round(size * spacing, 1) for size in self.image.shape[1:]],
            "centre_mm": [round(float(place), 1) for place in centre],
            "compared": self._kind,
            "intensities_alike": round(alike, 3),
            "folded": round(self._folded, 5),
        }
        return self

    def shown(self, number: int) -> tuple[Tensor, Tensor]:
        """A context's image and label map as they lie on the region, each ``(h, w, d)``; for generation its output."""
        label = self._labels[number].float()
        if self._generation:
            return self._images[number][0], label[0]
        return self._images[number][0], torch.tensor((0, *self.values))[winning_label(label)[0]]

    def showing(self, numbers: Sequence[int]) -> list[int]:
        """As :class:`~scripts.inference.views.View`: those that are aligned with the region."""
        return [number for number in numbers if number in self._images]

    def pairs(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As :class:`~scripts.inference.views.View`; the masks are soft, as they were sampled."""
        images = torch.stack([self._images[number] for number in numbers])
        return images, torch.stack([self._labels[number].float() for number in numbers])

    def parts(self, members: Members, of_window: WindowScores, overlap: float) -> Parts:
        """As :class:`~scripts.inference.views.View`; contexts that are not aligned with the region are left out."""
        members = {value: self.showing(chosen) for value, chosen in members.items()}
        numbers = sorted({number for chosen in members.values() for number in chosen})
        target = self.image.as_tensor()
        if not numbers:
            empty = target.new_zeros((len(self.values), *target.shape[1:]))
            return empty, empty
        images, labels = self.pairs(numbers)
        votes = self._votes(members, numbers, images, labels)
        share = 1.0 if self._generation or self._evidence else self._alike
        if share == 0:
            return votes, votes
        place = {number: i for i, number in enumerate(numbers)}
        lenses = self._lenses(members, place, images, labels, votes) if self._evidence else {}
        wanted = labels if self._generation else (labels > MASK_THRESHOLD).float()
        stack = torch.cat([target, images.flatten(0, 1), wanted.flatten(0, 1)])[None]

        def scores_of(window: Tensor) -> Tensor:
            return of_window(window[:, :1], _Seen(window[0, 1:], place, self.values, lenses), members)

        roi = [min(size, most) for size, most in zip(target.shape[1:], self._window, strict=True)]
        scores = sliding_window_inference(stack, roi, 1, scores_of, overlap, mode="gaussian")[0]
        network = torch.lerp(votes, scores, share)
        for channel, value in enumerate(self.values):
            if len(members[value]) == 1:
                votes[channel] = torch.lerp(network[channel], votes[channel], LONE_VOTE)
        return network, votes

    def _lenses(
        self, members: Members, place: dict[int, int], images: Tensor, labels: Tensor, votes: Tensor
    ) -> dict[int, _Lens]:
        """By label, what shows target and contexts as evidence for it."""
        lenses = {}
        for channel, value in enumerate(self.values):
            rows = [place[number] for number in members[value]]
            if not rows:
                continue
            of_contexts = of_target = evidence_table(images[rows], labels[rows, channel : channel + 1])
            if self._alike < 1:
                voted = votes[None, channel : channel + 1]
                own = evidence_table(self.image.as_tensor()[None], voted / voted.max().clamp(min=1e-6))
                of_target = torch.lerp(own, of_contexts, self._alike)
            lenses[value] = _Lens(of_target, of_contexts)
        return lenses

    def _votes(self, members: Members, numbers: Sequence[int], images: Tensor, labels: Tensor) -> Tensor:
        votes, weights = [], {}
        for channel, value in enumerate(self.values):
            chosen = tuple(members[value])
            if not chosen:
                votes.append(torch.zeros(images.shape[2:]))
                continue
            if chosen not in weights:
                counting = torch.tensor([number in chosen for number in numbers])
                weights[chosen] = vote_weights(self.image.as_tensor(), images, self._kind, counting)
            votes.append(vote(weights[chosen], labels[:, channel : channel + 1])[0])
        return torch.stack(votes)


class EmptyView:
    """Labels that lie outside of a target: their scores are 0.

    Args:
        image: ``(1, h, w, d)``, the preprocessed target.
        values: labels.
    """

    def __init__(self, image: MetaTensor, values: Sequence[int]) -> None:
        self.image = image
        self.values = tuple(values)

    def showing(self, numbers: Sequence[int]) -> list[int]:
        """As :class:`~scripts.inference.views.View`: none."""
        return []

    def parts(self, members: Members, of_window: WindowScores, overlap: float) -> Parts:
        """As :class:`~scripts.inference.views.View`."""
        return self.image.as_tensor().new_zeros((len(self.values), *self.image.shape[1:])), None


class _Lens(NamedTuple):
    """Tables of :mod:`scripts.data.evidence` for a label; of one contrast they are the same."""

    of_target: Tensor
    of_contexts: Tensor


class _Seen:
    """The part of aligned contexts that a window shows.

    Args:
        channels: ``(L + L * K, H, W, D)``: L images, and K wanted outputs of each.
        place: position among the L by number.
        values: the K labels.
        lenses: by label, what it is shown through; those without are shown as they are.
    """

    def __init__(
        self, channels: Tensor, place: dict[int, int], values: Sequence[int], lenses: dict[int, _Lens]
    ) -> None:
        count = len(place)
        self._images = channels[:count]
        self._wanted = channels[count:].unflatten(0, (count, len(values)))
        self._place = place
        self._values = values
        self._lenses = lenses

    def episode(self, numbers: Sequence[int], value: int) -> tuple[Tensor, Tensor]:
        """As :class:`~scripts.inference.views.Episodes`."""
        rows = [self._place[number] for number in numbers]
        images = self._images[rows][:, None]
        if value in self._lenses:
            images = evidence(images, self._lenses[value].of_contexts)
        return images, self._wanted[rows, self._values.index(value)][:, None]

    def shown(self, window: Tensor, value: int) -> Tensor:
        """As :class:`~scripts.inference.views.Episodes`."""
        return evidence(window, self._lenses[value].of_target) if value in self._lenses else window


def _scaled(image: Tensor, inside: Tensor) -> Tensor:
    """From 0 to 1 between the percentiles of what is inside, as the target is; 0 outside."""
    values = image[:, inside]
    low, high = (float(np.percentile(values.numpy(), q)) for q in PERCENTILES)
    return ((image - low) / max(high - low, 1e-12)).clamp(0, 1) * inside
