"""Cases on the network's grid, preprocessed once and cached on disk."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from monai.data import PersistentDataset
from torch import Tensor

from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case
from scripts.data.preprocessing import LoadCase, Preprocessing, fit_spacing

logger = logging.getLogger(__name__)

_FILES = ("image", "label", "output")
_ATTEMPTS = 4


class PreparedCases:
    """Cases on the network's grid, one spacing per dataset, cached on disk.

    A cached case is keyed by the content of its files and by the preprocessing settings, so a changed file or
    setting makes a new entry, and a moved dataset keeps its own.

    Args:
        parts: part name -> case dicts (lazy sequences are fine).
        spatial_size: the network's grid.
        spacing: isotropic voxel size in mm; None fits each dataset's largest case into the grid.
        cache_dir: where the cache goes.
        skip_bad_cases: leave faulty cases out instead of raising.
        num_workers: threads that read.
    """

    def __init__(
        self,
        parts: dict[str, Sequence[Case]],
        spatial_size: Sequence[int],
        cache_dir: str,
        spacing: float | None = None,
        skip_bad_cases: bool = False,
        num_workers: int = 4,
    ) -> None:
        self.sources = parts
        self.spatial_size = tuple(spatial_size)
        self.spacing = spacing
        self.cache_dir = Path(cache_dir)
        self.skip_bad_cases = skip_bad_cases
        self.num_workers = num_workers
        self.cases: dict[str, dict[str, list[Case]]] = {}  # part -> source -> cases
        self.spacing_mm: dict[str, float] = {}
        self._stores: dict[str, PersistentDataset] = {}

    def prepare(self) -> None:
        """Check the files and fix each dataset's spacing; images are resampled later, when first drawn.

        Raises:
            DatasetError: faulty cases.
        """
        if self.cases:
            return
        sources: dict[str, list[Case]] = defaultdict(list)
        datasets: dict[str, list[Case]] = defaultdict(list)
        for part, given in self.sources.items():
            inspected = inspect_cases(list(given), self.cache_dir / "integrity.json", self.num_workers)
            grouped: dict[str, list[Case]] = defaultdict(list)
            for case in sound_cases(inspected, self.skip_bad_cases) if inspected else []:
                dataset = case.setdefault("dataset", "dataset")
                source = case.setdefault("source", dataset)
                case.setdefault("case", str(case["image"]))
                for group, key in ((grouped, source), (sources, source), (datasets, dataset)):
                    group[key].append(case)
            self.cases[part] = dict(grouped)
        for name, cases in datasets.items():
            fitting = fit_spacing(cases, self.spatial_size)
            self.spacing_mm[name] = self.spacing or fitting
            if self.spacing and self.spacing < fitting * 0.999:
                logger.warning(
                    "%s: at --spacing %g the largest case is cropped (it fits at %.3g)", name, self.spacing, fitting
                )
            logger.info(
                "%s: %d cases, %.3g mm voxels on a grid of %s",
                name, len({case["case"] for case in cases}), self.spacing_mm[name],
                "x".join(map(str, self.spatial_size)),
            )  # fmt: skip
        for name, cases in sources.items():
            preprocessing = Preprocessing(self.spatial_size, self.spacing_mm[cases[0]["dataset"]])
            for index, case in enumerate(cases):
                case["index"] = index
            items = [
                {kind: case[kind] for kind in _FILES if kind in case} | {"key": _cache_key(case, preprocessing)}
                for case in cases
            ]
            self._stores[name] = PersistentDataset(items, LoadCase(preprocessing), self.cache_dir, _cache_name)

    def load(self, case: Case) -> tuple[Tensor, Tensor | None]:
        """Image of a prepared case and what goes with it, from the cache where possible.

        Returns:
            The image in [0, 1], and label numbers, a second image in [0, 1], or None; each ``(1, *spatial_size)``.
        """
        store, index = self._stores[case["source"]], case["index"]
        for attempt in range(_ATTEMPTS):
            try:
                found = store[index]
                break
            except (RuntimeError, EOFError, OSError):
                # a cached file was cut short (full disk, killed run, another process still at it): make it again
                if attempt + 1 == _ATTEMPTS:
                    raise
                (self.cache_dir / f"{_cache_name(store.data[index]).decode()}.pt").unlink(missing_ok=True)
        return found["image"], found.get("answer")


def _cache_key(case: Case, preprocessing: Preprocessing) -> str:
    kinds = "+".join(kind for kind in _FILES if kind in case)
    return f"{kinds}-{case['digest']}-{preprocessing.fingerprint}"


def _cache_name(item: dict[str, str]) -> bytes:
    return hashlib.sha256(item["key"].encode()).hexdigest().encode()
