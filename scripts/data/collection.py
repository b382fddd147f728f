"""A collection: datasets on disk (or made up), checked, split by case, and preprocessed once."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import PersistentDataset
from torch import Tensor

from scripts.atomic import write_text
from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError, find_datasets
from scripts.data.preprocessing import LoadPair, Preprocessing, fit_spacing
from scripts.data.synthesis import write_cohorts

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


class Collection:
    """The cases of one or several nnU-Net datasets, split by case. Nothing is read before it is needed.

    Args:
        dataset_dir: a dataset folder or a folder of them; None makes synthetic cohorts in ``synthetic_dir``.
        synthetic_dir: where synthetic cohorts go.
        cache_dir: where the integrity record goes.
        datasets: keep only these datasets.
        channel: image channel.
        val_fraction: part of each dataset's cases for validation, at least one case.
        test_fraction: part that is used for neither training nor validation.
        sample_rate: part of each dataset's training cases that is used; a split file has its own say.
        split_file: split of an earlier run to repeat.
        skip_bad_cases: leave faulty cases out instead of raising.
        synthetic: ``write_cohorts`` arguments for the synthetic cohorts.
        seed: of the split.
        num_workers: threads that read.
    """

    def __init__(
        self,
        dataset_dir: str | None,
        synthetic_dir: str,
        cache_dir: str,
        datasets: Sequence[str] | None = None,
        channel: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        sample_rate: float = 1.0,
        split_file: str | None = None,
        skip_bad_cases: bool = False,
        synthetic: dict[str, Any] | None = None,
        seed: int = 0,
        num_workers: int = 4,
    ) -> None:
        if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 or val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        self.dataset_dir = dataset_dir
        self.synthetic_dir = synthetic_dir
        self.record = Path(cache_dir) / "integrity.json"
        self.datasets = datasets
        self.channel = channel
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.sample_rate = sample_rate
        self.split_file = split_file
        self.skip_bad_cases = skip_bad_cases
        self.synthetic = synthetic or {}
        self.seed = seed
        self.num_workers = num_workers
        self._parts: dict[str, list[Case]] | None = None

    def part(self, name: str) -> CaseList:
        """``train``, ``val`` or ``test``: a sequence of case dicts that is found when first looked at."""
        return CaseList(self, name)

    def parts(self) -> dict[str, list[Case]]:
        """All parts; finds, checks and splits on the first call.

        Raises:
            DatasetError: faulty or too few cases.
        """
        if self._parts is None:
            folder = self.dataset_dir if self.dataset_dir is not None else self._synthesise()
            found = [case for dataset in find_datasets(folder, self.datasets) for case in dataset.cases(self.channel)]
            good = sound_cases(inspect_cases(found, self.record, self.num_workers), self.skip_bad_cases)
            self._parts = read_split(self.split_file, good) if self.split_file else self._split(good)
        return self._parts

    def write_split(self, path: str | Path) -> None:
        """Write which case is in which part, as JSON: part -> dataset -> case names."""
        content = {part: defaultdict(list) for part in PARTS}
        for part, cases in self.parts().items():
            for case in cases:
                content[part][case["dataset"]].append(case["case"])
        write_text(json.dumps(content, indent=1), path)

    def _synthesise(self) -> str:
        folder = Path(self.synthetic_dir)
        made_with = folder / "settings.json"
        settings = json.dumps(self.synthetic, sort_keys=True)
        complete = len(list(folder.glob("Dataset*/dataset.json"))) == self.synthetic["cohorts"]
        if not complete or not made_with.is_file() or made_with.read_text(encoding="utf-8") != settings:
            logger.info("no dataset_dir given: making synthetic cohorts in %s", folder)
            for old in folder.glob("Dataset*_Synthetic*"):  # those of other settings would be trained on as well
                shutil.rmtree(old)
            write_cohorts(folder, **self.synthetic)
            write_text(settings, made_with)
        return str(folder)

    def _split(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        parts: dict[str, list[Case]] = {part: [] for part in PARTS}
        by_dataset = defaultdict(list)
        for case in cases:
            by_dataset[case["dataset"]].append(case)
        for name, members in by_dataset.items():
            rng = np.random.default_rng([self.seed, *name.encode()])
            order = [members[i] for i in rng.permutation(len(members))]
            num_val = max(1, round(self.val_fraction * len(order)))
            num_test = round(self.test_fraction * len(order))
            if len(order) <= num_val + num_test:
                raise DatasetError(
                    f"{name}: {len(order)} cases cannot be split into {num_val} for validation, {num_test} for testing "
                    "and the rest for training: add cases or lower --val_fraction or --test_fraction"
                )
            parts["val"] += order[:num_val]
            parts["test"] += order[num_val : num_val + num_test]
            training = order[num_val + num_test :]
            parts["train"] += training[: max(1, round(self.sample_rate * len(training)))]
        for part in parts.values():  # in the order of a split that is read back, so that the same groups are drawn
            part.sort(key=lambda case: (case["dataset"], case["case"]))
        return parts

    @property
    def is_read(self) -> bool:
        """Whether the cases have been found; not if a run was given its cases directly."""
        return self._parts is not None


class CaseList(Sequence[Case]):
    """One part of a collection; reading it is what starts the search and the checks."""

    def __init__(self, collection: Collection, part: str) -> None:
        self.collection = collection
        self.part = part

    def __getitem__(self, index: Any) -> Any:
        """Case dict(s)."""
        return self.collection.parts()[self.part][index]

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.collection.parts()[self.part])

    def __iter__(self) -> Iterator[Case]:
        """Case dicts."""
        return iter(self.collection.parts()[self.part])


def read_split(path: str | Path, cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Cases by part, as an earlier run's ``splits.json`` says.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: unreadable, or no case of these datasets is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no split file {path} (training writes splits.json into its output folder)")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        where = {(d, c): part for part, sets in content.items() for d, names in sets.items() for c in names}
    except (ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path} is not a split file: {error}") from error
    parts: dict[str, list[Case]] = {part: [] for part in PARTS}
    for case in cases:
        part = where.get((case["dataset"], case["case"]))
        if part in parts:
            parts[part].append(case)
    unnamed = [f"{case['dataset']}/{case['case']}" for case in cases if (case["dataset"], case["case"]) not in where]
    if unnamed:
        logger.warning("%s does not name %d of the cases found; they are not used: %s", path, len(unnamed), unnamed[:5])
    if not any(parts.values()):
        raise DatasetError(f"{path} names none of the cases found")
    return parts


class PreparedCases:
    """Labelled cases on the network's grid, one spacing per dataset, cached on disk.

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
        self.cases: dict[str, dict[str, list[Case]]] = {}
        self.spacing_mm: dict[str, float] = {}
        self._stores: dict[str, PersistentDataset] = {}

    def prepare(self) -> None:
        """Check the files and fix each dataset's spacing; images are resampled later, when first drawn.

        Raises:
            DatasetError: faulty cases.
        """
        if self.cases:
            return
        everything: dict[str, list[Case]] = defaultdict(list)
        for part, source in self.sources.items():
            inspected = inspect_cases(list(source), self.cache_dir / "integrity.json", self.num_workers)
            grouped: dict[str, list[Case]] = defaultdict(list)
            for case in sound_cases(inspected, self.skip_bad_cases) if inspected else []:
                dataset = case.setdefault("dataset", "dataset")
                case.setdefault("case", str(case["image"]))
                grouped[dataset].append(case)
                everything[dataset].append(case)
            self.cases[part] = dict(grouped)
        for name, cases in everything.items():
            fitting = fit_spacing(cases, self.spatial_size)
            self.spacing_mm[name] = self.spacing or fitting
            if self.spacing and self.spacing < fitting * 0.999:
                logger.warning(
                    "%s: at --spacing %g the largest case is cropped (it fits at %.3g)", name, self.spacing, fitting
                )
            preprocessing = Preprocessing(self.spatial_size, self.spacing_mm[name])
            for index, case in enumerate(cases):
                case["index"] = index
            items = [
                {"image": c["image"], "label": c["label"], "key": f"{c['digest']}-{preprocessing.fingerprint}"}
                for c in cases
            ]
            self._stores[name] = PersistentDataset(items, LoadPair(preprocessing), self.cache_dir, _cache_name)
            logger.info(
                "%s: %d cases, %.3g mm voxels on a grid of %s",
                name, len(cases), self.spacing_mm[name], "x".join(map(str, self.spatial_size)),
            )  # fmt: skip

    def load(self, case: Case) -> tuple[Tensor, Tensor]:
        """Image and label of a prepared case, each ``(1, *spatial_size)``, from the cache where possible."""
        store, index = self._stores[case["dataset"]], case["index"]
        try:
            pair = store[index]
        except (RuntimeError, EOFError, OSError):  # a cached file was cut short (full disk, killed run): make it again
            (self.cache_dir / f"{_cache_name(store.data[index]).decode()}.pt").unlink(missing_ok=True)
            pair = store[index]
        return pair["image"], pair["label"]


def _cache_name(item: dict[str, str]) -> bytes:
    return hashlib.sha256(item["key"].encode()).hexdigest().encode()
