"""One scan on its way to a prediction: a value that every step adds to, so that no step remembers another's target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.preprocessing import PlacedScores
from scripts.inference.contexts import ContextSet
from scripts.inference.views import View, WholeView

OnLabel = Callable[[int, int, int], None]
"""Called with label, labels done and labels in all."""


NOT_TO_BE_TRUSTED = "no context could be aligned: the prediction is not to be trusted"
HARDLY_TO_BE_TRUSTED = "most contexts could not be aligned: the prediction is not to be trusted"


@dataclass(eq=False)
class Target:
    """A scan, and what was found about it so far.

    Attributes:
        scan: ``(1, H, W, D)`` on its own voxels.
        image: ``(1, h, w, d)`` in [0, 1] on the context set's grid, with its place in the scan.
        digest: recognises the scan (``volume_digest``).
        name: what reports call it; its file is named after it.
        case: what the folder it comes from says of it.
        views: where the network looked; empty before.
        scores: of each view, ``(k, h, w, d)`` for its labels.
        as_it_is: labels for which the target is shown as it is, beside contexts that are not brought to it.
        aligned: by number of each context that was brought to the scan, its similarity there.
        used: names of the contexts by label.
        alignment: for ``report.json``, how the contexts were brought to the scan; None if they were not.
        confidence: for ``report.json``, see :class:`~scripts.inference.confidence.ConfidentInferer`.
        warnings: what a reader of the prediction should know.
        prediction: ``(1, H, W, D)`` on the scan's own voxels; None before.
        seconds: what each step took.
        on_label: told of every label that a window is done with, for whoever waits.
    """

    scan: MetaTensor
    image: MetaTensor
    digest: str
    name: str = ""
    case: Mapping[str, Any] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    as_it_is: set[int] = field(default_factory=set)
    aligned: dict[int, float] = field(default_factory=dict)
    used: dict[int, list[str]] = field(default_factory=dict)
    alignment: dict[str, Any] | None = None
    confidence: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    prediction: MetaTensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    on_label: OnLabel | None = None

    @property
    def doubt(self) -> str | None:
        """Why the prediction is not to be trusted: less than half of the contexts could be brought to the scan."""
        if self.alignment is None:
            return None
        if not self.aligned:
            return NOT_TO_BE_TRUSTED
        return HARDLY_TO_BE_TRUSTED if self.part_aligned < 0.5 else None

    @property
    def part_aligned(self) -> float:
        """Of the contexts that were tried, how many could be brought to the scan; 1 where it is shown as it is."""
        if self.alignment is None or not self.aligned:
            return 1.0
        return len(self.aligned) / (len(self.aligned) + len(self.alignment["left_out"]))

    def show_as_it_is(self, values: Sequence[int], context: ContextSet) -> None:
        """Add a view of the whole target beside the contexts as they are, for some labels."""
        self.views.append(WholeView(self.image, values, context))
        self.as_it_is.update(values)

    def scores_by_label(self) -> dict[int, PlacedScores]:
        """Scores of each label on the voxels of the view that shows it, with that view's place in the scan."""
        return {
            value: PlacedScores(score, view.image)
            for view, scores in zip(self.views, self.scores, strict=True)
            for value, score in zip(view.values, scores, strict=True)
        }


def collate_target(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of one target for MONAI's engines: its image ``(1, 1, h, w, d)``, the rest as it is.

    Raises:
        ValueError: more than one; targets differ in size.
    """
    if len(batch) != 1:
        raise ValueError(f"targets are predicted one by one, got a batch of {len(batch)}")
    (data,) = batch
    return {**data, "image": torch.as_tensor(data["image"])[None]}
