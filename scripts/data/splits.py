"""Which cases are for training, validation and testing: drawn by subject, or read from a file."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.files import DatasetError, read_json
from scripts.data.nnunet import Case

logger = logging.getLogger(__name__)

PARTS = ("train", "val", "test")

_BIDS_SUBJECT = re.compile(r"(?<![A-Za-z0-9])sub-[A-Za-z0-9]+")
_FORM = (
    'expected a splits.json of a training, {"train": {"Dataset001_A": ["case", ...]}, "val": ...}, or nnU-Net\'s '
    'splits_final.json, [{"train": ["case", ...], "val": [...]}, ...]'
)
_SHOWN = 5


def subjects_of(names: Iterable[str], pattern: str | None = None) -> dict[str, str]:
    """Whose scan each case of a dataset is.

    Args:
        names: of the cases.
        pattern: regular expression that finds the subject in a name: its group ``subject``, else its first group, else
            all that it matches. None takes BIDS's ``sub-LABEL``. A name without is a subject of its own.

    Returns:
        Case -> subject.

    Raises:
        DatasetError: a given pattern is in no name.
    """
    names = sorted(set(names))
    finder = _BIDS_SUBJECT if pattern is None else re.compile(pattern)
    found = {name: match for name in names if (match := finder.search(name))}
    if pattern is not None and len(found) < len(names):
        without = [name for name in names if name not in found]
        if not found:
            raise DatasetError(f"--subject_pattern {pattern!r} is found in no case name, such as {without[0]}")
        shown = ", ".join(without[:_SHOWN])
        logger.warning("--subject_pattern %r is not in %d of %d case names, which are taken for subjects of their own: "
                       "%s", pattern, len(without), len(names), shown)  # fmt: skip
    return {name: _subject(found[name]) if name in found else name for name in names}


def _subject(match: re.Match[str]) -> str:
    if "subject" in match.re.groupindex:
        text = match["subject"]
    else:
        text = match[1] if match.re.groups else match[0]
    return text or match[0]


def draw_split(
    cases: Sequence[Case],
    val_fraction: float,
    test_fraction: float,
    sample_rate: float = 1.0,
    seed: int = 0,
    subject_pattern: str | None = None,
) -> dict[str, list[Case]]:
    """Cases by part, drawn for each dataset from the seed and its name; all cases of a subject are in one part.

    Args:
        cases: the cases.
        val_fraction: part of each dataset's subjects for validation, at least one.
        test_fraction: part of them for testing.
        sample_rate: part of the remaining ones that is used.
        seed: of the draw.
        subject_pattern: as in :func:`subjects_of`.

    Raises:
        DatasetError: too few subjects.
    """
    where: dict[tuple[str | None, str], str] = {}
    by_dataset = defaultdict(set)
    for case in cases:
        by_dataset[case["dataset"]].add(case["case"])
    for dataset, names in by_dataset.items():
        subjects = subjects_of(names, subject_pattern)
        members = sorted(set(subjects.values()))
        rng = np.random.default_rng([seed, *dataset.encode("utf-8", "surrogateescape")])
        order = [members[i] for i in rng.permutation(len(members))]
        num_val = max(1, round(val_fraction * len(order)))
        num_test = round(test_fraction * len(order))
        if len(order) <= num_val + num_test:
            what = "cases" if len(order) == len(names) else f"subjects with {len(names)} cases"
            raise DatasetError(
                f"{dataset}: {len(order)} {what} cannot be split into {num_val} for validation, {num_test} for testing "
                "and the rest for training: add cases or lower --val_fraction or --test_fraction"
                + ("" if len(order) == len(names) else "; --subject_pattern says what a subject is")
            )
        rest = order[num_val + num_test :]
        rest = rest[: max(1, round(sample_rate * len(rest)))]
        part_of = dict.fromkeys(order[:num_val], "val") | dict.fromkeys(order[num_val : num_val + num_test], "test")
        part_of |= dict.fromkeys(rest, "train")
        where |= {(dataset, name): part_of[whose] for name, whose in subjects.items() if whose in part_of}
        if len(order) < len(names):
            logger.info("%s: split by subject, %d with %d cases", dataset, len(order), len(names))
    return {part: [] for part in PARTS} | _by_part(cases, where)


def read_split(path: str | Path, cases: Sequence[Case], fold: int | None = None) -> dict[str, list[Case]]:
    """Cases by part, as a file says: ``splits.json`` of an earlier run, or nnU-Net's ``splits_final.json``.

    nnU-Net's file names cases without their dataset, so that it goes with one dataset only.

    Args:
        path: the file.
        cases: what there is to be split.
        fold: which of nnU-Net's folds, from 0; may be left out if there is but one.

    Returns:
        Part -> cases; nnU-Net's has no ``test``.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: unreadable, a case in two parts, no such fold, or no case of these datasets is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no split file {path} (training writes splits.json into its output folder): put it back, or give "
            "--split_file None for a new split"
        )
    content = read_json(path, (dict, list), _FORM, "is not a split file")
    folds = isinstance(content, list)
    if folds:
        content = _fold(path, content, fold)
    elif fold is not None:
        raise DatasetError(f"--fold goes with nnU-Net's splits_final.json; {path} has no folds: leave it out")
    where = _assignments(path, {part: {None: names} for part, names in content.items()} if folds else content)
    datasets = sorted({case["dataset"] for case in cases})
    if len(datasets) > 1 and any(dataset is None for dataset, _ in where):
        raise DatasetError(
            f"{path} names cases without their dataset, and there are several ({', '.join(datasets[:_SHOWN])}): choose "
            "one with --datasets"
        )
    parts = {part: [] for part in PARTS if part != "test" or "test" in content} | _by_part(cases, where)
    names = [(case["dataset"], case["case"]) for case in cases]
    unnamed = sorted({"/".join(pair) for pair in names if _part(where, pair) is None})
    if unnamed:
        shown = unnamed[:_SHOWN]
        logger.warning("%s does not name %d of the cases found; they are not used: %s", path, len(unnamed), shown)
    if not any(parts.values()):
        raise DatasetError(f"{path} names none of the cases found")
    return parts


def shared_subjects(parts: Mapping[str, Sequence[Case]], pattern: str | None = None) -> list[str]:
    """Subjects with cases in several parts, as ``DATASET/SUBJECT``.

    Args:
        parts: part -> cases.
        pattern: as in :func:`subjects_of`.
    """
    names = defaultdict(set)
    for cases in parts.values():
        for case in cases:
            names[case["dataset"]].add(case["case"])
    subjects = {dataset: subjects_of(of_dataset, pattern) for dataset, of_dataset in names.items()}
    found = defaultdict(set)
    for part, cases in parts.items():
        for case in cases:
            found[f"{case['dataset']}/{subjects[case['dataset']][case['case']]}"].add(part)
    return sorted(subject for subject, its_parts in found.items() if len(its_parts) > 1)


def _fold(path: Path, folds: list[Any], fold: int | None) -> dict[str, Any]:
    if fold is None and len(folds) > 1:
        raise DatasetError(f"{path} has {len(folds)} folds: choose one with --fold 0 to {len(folds) - 1}")
    number = fold or 0
    if not folds:
        raise DatasetError(f"{path} is not a split file, it has no folds: {_FORM}")
    if not 0 <= number < len(folds):
        raise DatasetError(f"{path} has no fold {number}: it has {len(folds)}, counted from 0")
    if not isinstance(folds[number], dict):
        raise DatasetError(f"{path} is not a split file, fold {number} has no parts: {_FORM}")
    return folds[number]


def _assignments(path: Path, content: Mapping[str, Any]) -> dict[tuple[str | None, str], str]:
    """(dataset, case) -> part; the dataset is None where only the case is named."""
    where: dict[tuple[str | None, str], str] = {}
    for part, sets in content.items():
        if not isinstance(sets, dict):
            raise DatasetError(f"{path} is not a split file, {part!r} holds no datasets: {_FORM}")
        for dataset, names in sets.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DatasetError(f"{path} is not a split file, {part!r} holds no list of case names: {_FORM}")
            for name in names:
                if where.setdefault((dataset, name), part) != part:
                    raise DatasetError(f"{path} has {name} in two parts, {where[dataset, name]} and {part}")
    return where


def _part(where: Mapping[tuple[str | None, str], str], named: tuple[str, str]) -> str | None:
    return where.get(named) or where.get((None, named[1]))


def _by_part(cases: Sequence[Case], where: Mapping[tuple[str | None, str], str]) -> dict[str, list[Case]]:
    """Cases by part, in an order that a split read back repeats, so that the same groups are drawn."""
    parts: dict[str, list[Case]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: (case["dataset"], case["case"], case.get("source", ""))):
        part = _part(where, (case["dataset"], case["case"]))
        if part in PARTS:
            parts[part].append(case)
    return dict(parts)
