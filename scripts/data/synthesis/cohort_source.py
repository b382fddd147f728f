"""Training groups from synthetic cohorts that are made when they are needed and kept nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scripts.data.synthesis.cohort import Cohort, checked_size, synthesize_cohort
from scripts.data.synthesis.label_map_anatomy import LabelMaps

_LABELS = (2, 5)  # of a cohort: some to choose from


class SyntheticCohorts:
    """Cohorts by number: every group is another cohort, and the same number always the same one.

    Args:
        spatial_size: the network's grid.
        label_maps: folder of label maps of real subjects to draw anatomies from; None makes all of them up.
        held_out_maps: names of files there, without ending, that are never drawn from.
        label_map_share: share of the cohorts that come from the label maps.
        spread: lowest and highest of how far a cohort's subjects are put apart, from 0 (all in one pose) to 1; None
            draws it as :func:`scripts.data.synthesis.cohort.synthesize_cohort` does, mostly high.
    """

    def __init__(
        self,
        spatial_size: int | Sequence[int],
        label_maps: str | None = None,
        held_out_maps: Sequence[str] = (),
        label_map_share: float = 0.5,
        spread: Sequence[float] | None = None,
    ) -> None:
        if not 0 <= label_map_share <= 1:
            raise ValueError(f"label_map_share must be from 0 to 1, got {label_map_share}")
        if spread is not None and not (len(spread) == 2 and 0 <= spread[0] <= spread[1] <= 1):
            raise ValueError(f"cohort_spread must be two numbers [low, high] from 0 to 1, got {spread}")
        self.spatial_size = spatial_size
        self.folder = label_maps
        self.held_out = tuple(held_out_maps or ())
        self.label_map_share = label_map_share
        self.spread = spread
        self._maps: LabelMaps | None = None
        self._latest: tuple[tuple, Cohort] | None = None

    def prepare(self) -> None:
        """Check the grid and read the label maps, once; loading processes that start later share the memory.

        Raises:
            FileNotFoundError, ValueError: no usable label maps, or too small a grid.
        """
        checked_size(self.spatial_size)
        if self.folder is not None and self._maps is None:
            self._maps = LabelMaps(self.folder, self.held_out)

    def cohort(self, key: Sequence[int], subjects: int, modalities: int = 1) -> Cohort:
        """The cohort of a key, such as (seed, part, number); the latest one is kept.

        Args:
            key: whole numbers that are not negative.
            subjects: how many subjects.
            modalities: contrasts of every subject.
        """
        wanted = (*key, subjects, modalities)
        if self._latest is None or self._latest[0] != wanted:
            self.prepare()
            rng = np.random.default_rng([*key, 0])
            labels = int(rng.integers(_LABELS[0], _LABELS[1] + 1))
            spread = None if self.spread is None else float(rng.uniform(*self.spread))
            cohort = synthesize_cohort(
                key, subjects, self.spatial_size, labels, modalities, self._maps, self.label_map_share, spread
            )
            self._latest = wanted, cohort
        return self._latest[1]
