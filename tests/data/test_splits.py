"""Splits: whose scan a case is, and nnU-Net's folds."""

from __future__ import annotations

import json
import logging

import pytest

from scripts.data.nnunet import DatasetError
from scripts.data.splits import PARTS, draw_split, read_split, shared_subjects, subjects_of


def cases_of(*names, dataset="Dataset001_A"):
    return [{"dataset": dataset, "case": name} for name in names]


def names_of(parts):
    return {part: [case["case"] for case in cases] for part, cases in parts.items()}


@pytest.mark.parametrize(
    ("name", "pattern", "subject"),
    [
        ("sub-01_ses-a", None, "sub-01"),
        ("sub-01_ses-b_run-2", None, "sub-01"),
        ("sub-010_ses-a", None, "sub-010"),
        ("siteA_sub-7_ses-1", None, "sub-7"),
        ("ses-1_sub-7", None, "sub-7"),
        ("patient_1", None, "patient_1"),
        ("mysub-1", None, "mysub-1"),
        ("OAS30001_MR_d0129", r"OAS\d+", "OAS30001"),
        ("P7-visit2", r"^(P\d+)-", "P7"),
        ("v2-P7", r"v(\d)-(?P<subject>P\d+)", "P7"),
        ("x", r"x|^(P\d+)-", "x"),
    ],
)
def test_subject_of_a_case(name, pattern, subject):
    assert subjects_of([name], pattern) == {name: subject}


def test_names_without_the_subject_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        assert subjects_of(["P1_a", "P1_b", "q"], r"P\d") == {"P1_a": "P1", "P1_b": "P1", "q": "q"}
    assert "not in 1 of 3 case names" in caplog.text and "q" in caplog.text
    with pytest.raises(DatasetError, match=r"--subject_pattern 'Z' is found in no case name, such as a"):
        subjects_of(["a", "b"], "Z")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["sub-{:02d}_ses-{}", "P{}.v{}"])
def test_a_subject_is_in_one_part(seed, name):
    cases = cases_of(*(name.format(subject, session) for subject in range(12) for session in range(1 + subject % 3)))
    pattern = None if name.startswith("sub") else r"P\d+"
    parts = draw_split(cases, 0.2, 0.25, 0.5, seed, pattern)
    assert shared_subjects(parts, pattern) == []
    subjects = {p: len(set(subjects_of(n, pattern).values())) if n else 0 for p, n in names_of(parts).items()}
    assert subjects == {"train": 4, "val": 2, "test": 3}  # 12, 7 of them left, of which half is 4 (rounded to even)
    assert parts == draw_split(cases[::-1], 0.2, 0.25, 0.5, seed, pattern)


def test_too_few_subjects():
    with pytest.raises(DatasetError, match="1 subjects with 4 cases cannot be split into 1 .*--subject_pattern"):
        draw_split(cases_of(*(f"sub-1_ses-{i}" for i in range(4))), 0.1, 0.0)


FOLDS = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "b"], "val": ["a"]}]


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("fold", [0, 1])
def test_folds_of_nnunet(tmp_path, fold):
    path = write(tmp_path / "splits_final.json", FOLDS)
    assert names_of(read_split(path, cases_of("a", "b", "c"), fold)) == {
        part: sorted(names) for part, names in FOLDS[fold].items()
    }


def test_a_fold_has_to_be_chosen(tmp_path):
    path = write(tmp_path / "splits_final.json", FOLDS)
    cases = cases_of("a", "b", "c")
    with pytest.raises(DatasetError, match="2 folds: choose one with --fold 0 to 1"):
        read_split(path, cases)
    for fold in (2, -1):
        with pytest.raises(DatasetError, match=f"no fold {fold}: it has 2"):
            read_split(path, cases, fold)
    assert names_of(read_split(write(path, FOLDS[:1]), cases)) == FOLDS[0]
    with pytest.raises(DatasetError, match="several .*Dataset001_A, Dataset002_B.*--datasets"):
        read_split(path, [*cases, *cases_of("a", dataset="Dataset002_B")], 0)
    own = write(tmp_path / "splits.json", {"train": {"Dataset001_A": ["a"]}})
    with pytest.raises(DatasetError, match="--fold goes with nnU-Net's splits_final.json"):
        read_split(own, cases, 0)


@pytest.mark.parametrize("content", [[3], [{"train": {"D": ["a"]}}], [{"train": [1]}], [{"train": "a"}], [None], [[]]])
def test_folds_that_are_none(tmp_path, content):
    with pytest.raises(DatasetError, match=r"splits_final\.json is not a split file"):
        read_split(write(tmp_path / "splits_final.json", content), cases_of("a"), 0)


def test_a_case_in_two_parts(tmp_path):
    for content in (
        [{"train": ["a", "b"], "val": ["b"]}],
        {"train": {"Dataset001_A": ["a", "b"]}, "test": {"Dataset001_A": ["b"]}},
    ):
        with pytest.raises(DatasetError, match="has b in two parts, train and (val|test)"):
            read_split(write(tmp_path / "s.json", content), cases_of("a", "b"))


def test_parts_of_other_names_are_passed_over(tmp_path):
    content = {"train": {"Dataset001_A": ["a"]}, "development": {"Dataset001_A": ["b"]}}
    parts = read_split(write(tmp_path / "s.json", content), cases_of("a", "b"))
    assert names_of(parts) == {"train": ["a"], "val": []} and set(parts) <= set(PARTS)
