"""Cases on the network's grid, preprocessed once and cached on disk."""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.data import PersistentDataset
from monai.transforms import Transform
from torch import Tensor

from scripts.data.integrity import ignored_values, inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError
from scripts.data.preprocessing import LoadCase, Preprocessing, fit_spacing

logger = logging.getLogger(__name__)

_FILES = ("image", "label", "output")
_ATTEMPTS = 4


class PreparedCases:
    """Cases on the network's grid, one spacing per dataset, cached on disk.

    A cached case is keyed by the content of its files and by the preprocessing settings, so a changed file or
    setting makes a new entry, and a moved dataset keeps its own. The content is compared with the key when a case is
    read, and every entry holds a digest of its own, so that a damaged one is made again.

    Args:
        parts: part name -> case dicts (lazy sequences are fine); every :class:`EpisodeDataset` adds its own.
        spatial_size: the network's grid.
        cache_dir: where the cache goes.
        spacing: isotropic voxel size in mm; None fits each dataset's largest case into the grid.
        skip_bad_cases: leave faulty cases out instead of raising.
        num_workers: threads that read.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[Case]] | None = None,
        spatial_size: Sequence[int] = (128, 128, 128),
        cache_dir: str = "cache",
        spacing: float | None = None,
        skip_bad_cases: bool = False,
        num_workers: int = 4,
    ) -> None:
        self.sources: dict[str, Sequence[Case]] = dict(parts or {})
        self.spatial_size = tuple(spatial_size)
        self.spacing = spacing
        self.cache_dir = Path(cache_dir)
        self.skip_bad_cases = skip_bad_cases
        self.num_workers = num_workers
        self.cases: dict[str, dict[str, list[Case]]] = {}  # part -> source -> cases
        self.spacing_mm: dict[str, float] = {}
        self._stores: dict[str, PersistentDataset] = {}

    def add(self, part: str, cases: Sequence[Case]) -> None:
        """Let these be the cases of a part; what was prepared without them is prepared anew."""
        if self.sources.get(part) is not cases:
            self.sources[part] = cases
            self.cases = {}

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
                {kind: case[kind] for kind in _FILES if kind in case}
                | {"digest": case["digest"], "ignored": ignored_values(case), "key": _cache_key(case, preprocessing)}
                for case in cases
            ]
            self._stores[name] = PersistentDataset(items, _SealedCase(preprocessing), self.cache_dir, _cache_name)

    def load(self, case: Case) -> tuple[Tensor, Tensor | None]:
        """Image of a prepared case and what goes with it, from the cache where possible.

        Returns:
            The image in [0, 1], and label numbers, a second image in [0, 1], or None; each ``(1, *spatial_size)``.

        Raises:
            DatasetError: a file of the case is gone or another one; the case is named.
        """
        store, index = self._stores[case["source"]], case["index"]
        entry = self.cache_dir / f"{_cache_name(store.data[index]).decode()}.pt"
        for _ in range(_ATTEMPTS):
            cached = entry.is_file()
            try:
                found = store[index]
            except Exception as error:  # of a damaged entry anything may be said
                if not (cached or entry.is_file()):
                    raise DatasetError(f"{case['dataset']}/{case['case']}: {_cause(error)}") from error
            else:
                if _is_whole(found):
                    return found["image"], found.get("label")
            entry.unlink(missing_ok=True)  # cut short, damaged, or another process is still at it
        raise DatasetError(f"{case['dataset']}/{case['case']}: {entry} is damaged as soon as written: check the disk")


class _SealedCase(Transform):
    """:class:`LoadCase`, with a digest of the result under ``seal``."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.load = LoadCase(preprocessing)

    def __call__(self, case: Case) -> dict[str, Any]:
        found = self.load(case)
        return {**found, "seal": _seal(found)}


def _seal(found: Mapping[str, Tensor]) -> str:
    """A checksum is enough: it is to find damage, not forgery, and is taken with every draw."""
    checksum = 0
    for key in ("image", "label"):
        if key in found:
            checksum = zlib.crc32(found[key].contiguous().numpy(), checksum)
    return f"{checksum:08x}-{[(key, list(x.shape), str(x.dtype)) for key, x in sorted(found.items()) if key != 'seal']}"


def _cause(error: BaseException) -> BaseException:
    """What was raised inside a transform, without MONAI's wrapping."""
    while isinstance(error, RuntimeError) and error.__cause__ and str(error).startswith("applying transform"):
        error = error.__cause__
    return error


def _is_whole(found: Any) -> bool:
    try:
        return found["seal"] == _seal(found)
    except Exception:  # damage may have made anything of it
        return False


def _cache_key(case: Case, preprocessing: Preprocessing) -> str:
    kinds = "+".join(kind for kind in _FILES if kind in case)
    ignored = f"-without{ignored_values(case)}" if ignored_values(case) else ""
    return f"sealed-{kinds}-{case['digest']}-{preprocessing.fingerprint}{ignored}"


def _cache_name(item: dict[str, str]) -> bytes:
    return hashlib.sha256(item["key"].encode()).hexdigest().encode()
