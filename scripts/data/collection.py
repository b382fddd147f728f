"""A collection: datasets on disk (or made up), the rows that draw from them, and their split by subject."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError, NnunetDataset, find_datasets
from scripts.data.rows import SYNTHETIC, Row, Source, SourcedRow, default_rows, read_rows, sources_of, synthetic_rows
from scripts.data.splits import PARTS, draw_split, read_split, shared_subjects
from scripts.data.tasks import find_task
from scripts.runtime.output_folder import write_text

logger = logging.getLogger(__name__)


class Collection:
    """The cases of one or several nnU-Net datasets, split by subject. Nothing is read before it is needed.

    Args:
        dataset_dir: a dataset folder or a folder of them; None draws from synthetic cohorts, which are no cases: they
            are made for each group.
        cache_dir: where the integrity record goes.
        datasets: keep only these datasets.
        collection_file: rows that say what is drawn, how often and with what weight; None uses every dataset found.
        tasks: keep only the rows of these tasks; without a collection file, the tasks to train (None: segmentation).
        channel: image channel, without a collection file; None uses every channel.
        val_fraction: part of each dataset's subjects for validation, at least one.
        test_fraction: part that is used for neither training nor validation.
        sample_rate: part of each dataset's training subjects that is used; a split file has its own say.
        split_file: split of an earlier run to repeat, or nnU-Net's ``splits_final.json``.
        skip_bad_cases: leave faulty cases out instead of raising.
        seed: of the split.
        num_workers: threads that read.
        fold: of nnU-Net's ``splits_final.json``.
        subject_pattern: regular expression that finds the subject in a case's name (``splits.subjects_of``).
        resumed_split: split of the run that is resumed, which alone counts then.
    """

    def __init__(
        self,
        dataset_dir: str | None,
        cache_dir: str,
        datasets: Sequence[str] | None = None,
        collection_file: str | None = None,
        tasks: Sequence[str] | str | None = None,
        channel: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        sample_rate: float = 1.0,
        split_file: str | None = None,
        skip_bad_cases: bool = False,
        seed: int = 0,
        num_workers: int = 4,
        fold: int | None = None,
        subject_pattern: str | None = None,
        resumed_split: str | None = None,
    ) -> None:
        if fold is not None and split_file is None and resumed_split is None:
            raise ValueError("--fold goes with --split_file, nnU-Net's splits_final.json")
        if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 or val_fraction + test_fraction >= 1:
            raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        self.dataset_dir = dataset_dir
        self.record = Path(cache_dir) / "integrity.json"
        self.datasets = datasets
        self.collection_file = collection_file
        self.tasks = [tasks] if isinstance(tasks, str) else tasks
        for task in self.tasks or ():
            find_task(task)
        self.channel = channel
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.sample_rate = sample_rate
        self.split_file = split_file
        self.skip_bad_cases = skip_bad_cases
        self.seed = seed
        self.num_workers = num_workers
        self.fold = fold
        self.subject_pattern = subject_pattern
        self.resumed_split = resumed_split
        self._parts: dict[str, list[Case]] | None = None
        self._rows: list[SourcedRow] = []

    def part(self, name: str) -> CaseList:
        """``train``, ``val`` or ``test``: a sequence of case dicts that is found when first looked at."""
        return CaseList(self, name)

    def parts(self) -> dict[str, list[Case]]:
        """All parts; finds, checks and splits on the first call.

        Raises:
            DatasetError: faulty or too few cases, or a row that fits no dataset.
            FileNotFoundError: the split of the run that is resumed is lost.
        """
        if self._parts is None:
            sources = self._find_sources()
            found = [
                case | {"source": source.key}
                for source in sources.values()
                for case in source.dataset.cases(source.channel, source.partner)
            ]
            if not found:  # synthetic cohorts only
                self._parts = {part: [] for part in PARTS}
                return self._parts
            good = sound_cases(inspect_cases(found, self.record, self.num_workers), self.skip_bad_cases)
            self._parts = self._split(good)
        return self._parts

    def rows(self) -> list[SourcedRow]:
        """What is drawn from the cases handed out; empty before any were."""
        return self._rows

    def describe(self) -> list[dict[str, Any]]:
        """The rows in use, one plain dict each."""
        return [asdict(sourced.row) | {"sources": list(sourced.sources)} for sourced in self._rows]

    def write_split(self, path: str | Path) -> None:
        """Write which case is in which part, as JSON: part -> dataset -> case names."""
        content: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
        for part, cases in self.parts().items():
            for dataset, name in sorted({(case["dataset"], case["case"]) for case in cases}):
                content[part].setdefault(dataset, []).append(name)
        write_text(json.dumps(content, indent=1), path)

    def _find_sources(self) -> dict[str, Source]:
        """The sources that the rows draw from, by key; notes the rows.

        A row that needs the images alone shares them with one that reads labels, so that they are cached once.
        """
        wanted = [
            (row, sources_of(row, datasets) if row.dataset != SYNTHETIC else []) for row, datasets in self._find_rows()
        ]
        every = {source.key: source for _, sources in wanted for source in sources}
        used: dict[str, Source] = {}
        for row, sources in wanted:
            labelled = [replace(source, partner="label") for source in sources]
            if find_task(row.task).reads == "image":
                sources = [b if b.key in every else a for a, b in zip(sources, labelled, strict=True)]
            used |= {source.key: source for source in sources}
            keys = tuple(source.key for source in sources)
            self._rows.append(SourcedRow(row, keys if row.dataset != SYNTHETIC else (SYNTHETIC,)))
        return used

    def _find_rows(self) -> list[tuple[Row, list[NnunetDataset]]]:
        if self.collection_file is None:
            if self.dataset_dir is None:
                return [(row, []) for row in synthetic_rows(self.tasks)]
            datasets = find_datasets(self.dataset_dir, self.datasets)
            by_name = {dataset.name: [dataset] for dataset in datasets}
            return [(row, by_name[row.dataset]) for row in default_rows(datasets, self.channel, self.tasks)]
        rows = [row for row in read_rows(self.collection_file) if not self.tasks or row.task in self.tasks]
        rows = [row for row in rows if row.draw_weight > 0]
        real = {row.dataset for row in rows} - {SYNTHETIC}
        if (real or self.datasets) and self.dataset_dir is None:
            named = ", ".join(sorted(real) or self.datasets)
            raise DatasetError(f"{self.collection_file}, --datasets: {named} cannot be found: give --dataset_dir")
        by_name = {name: find_datasets(self.dataset_dir, [name]) for name in sorted(real)}
        if self.datasets is not None:
            chosen = {dataset.name for dataset in find_datasets(self.dataset_dir, self.datasets)}
            rows = [row for row in rows if row.dataset in real and by_name[row.dataset][0].name in chosen]
        if not rows:
            raise DatasetError(f"{self.collection_file}: no row is left by --task, --datasets and draw_weight")
        return [(row, by_name.get(row.dataset, [])) for row in rows]

    def _split(self, cases: Sequence[Case]) -> dict[str, list[Case]]:
        if self.resumed_split is not None:
            if not Path(self.resumed_split).is_file():
                raise FileNotFoundError(
                    f"no {self.resumed_split}: the split of the run to resume is lost, and with it which cases are "
                    "kept for testing; put it back from a copy, or train anew with --overwrite true"
                )
            return {part: [] for part in PARTS} | read_split(self.resumed_split, cases)
        if self.split_file is None:
            return draw_split(
                cases, self.val_fraction, self.test_fraction, self.sample_rate, self.seed, self.subject_pattern
            )
        parts = {part: [] for part in PARTS} | read_split(self.split_file, cases, self.fold)
        if shared := shared_subjects(parts, self.subject_pattern):
            shown = ", ".join(shared[:5])
            logger.warning("%s has %d subjects in several parts: %s", self.split_file, len(shared), shown)
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
