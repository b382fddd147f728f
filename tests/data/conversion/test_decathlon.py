"""Decathlon task folders: 4D files, labels and modalities of dataset.json."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scripts.data.conversion.decathlon import read_decathlon
from scripts.data.nnunet import DatasetError


@pytest.fixture
def task(tmp_path, write_nifti):
    """Task with two modalities, two training cases and a test case."""
    root = tmp_path / "Task77_Two"
    rng = np.random.default_rng(0)
    for name in ("imagesTr/a", "imagesTr/b", "imagesTs/c"):
        write_nifti(root / f"{name}.nii.gz", rng.integers(0, 99, (6, 7, 8, 2)).astype(np.int16))
    for name in ("a", "b"):
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", np.ones((6, 7, 8), np.uint8))
    for name in ("imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz", "imagesTs/._c.nii.gz"):
        (root / name).write_bytes(b"\x00\x05\x16\x07")
    content = {"modality": {"1": "T2", "0": "FLAIR"}, "labels": {"0": "background", "1": "edema"}}
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_cases_channels_and_labels(task):
    found = read_decathlon(task)
    assert [(c.case, c.test, c.images[0].channels, c.problems) for c in found.cases] == [
        ("a", False, 2, ()),
        ("b", False, 2, ()),
        ("c", True, 2, ()),
    ]
    assert found.channel_names == ("FLAIR", "T2") and found.label_names == {0: "background", 1: "edema"}
    assert found.cases[0].mask == task / "labelsTr" / "a.nii.gz" and found.cases[2].mask is None


def test_without_masks(task):
    assert all(case.mask is None and not case.problems for case in read_decathlon(task, masks=False).cases)


def test_faults_of_all_cases_are_named(task, write_nifti):
    (task / "labelsTr" / "a.nii.gz").unlink()
    write_nifti(task / "imagesTr" / "b.nii.gz", np.zeros((6, 7, 8, 3), np.int16))
    (task / "imagesTs" / "c.nii.gz").write_bytes(b"no image")
    a, b, c = read_decathlon(task).cases
    assert "no mask" in a.problems[0]
    assert "b.nii.gz of shape (6, 7, 8, 3) is not 2 channels (FLAIR, T2)" in b.problems[0]
    assert "c.nii.gz cannot be read" in c.problems[0]


def test_a_3d_file_is_not_two_channels(task, write_nifti):
    write_nifti(task / "imagesTr" / "a.nii.gz", np.zeros((6, 7, 8), np.int16))
    assert "is not 2 channels" in read_decathlon(task).cases[0].problems[0]


def test_one_name_in_training_and_test_is_a_fault(task):
    (task / "imagesTs" / "c.nii.gz").rename(task / "imagesTs" / "a.nii.gz")
    found = {(c.case, c.test): c.problems for c in read_decathlon(task).cases}
    for test in (False, True):
        assert "imagesTr/a.nii.gz" in found["a", test][0] and "imagesTs/a.nii.gz" in found["a", test][0]
    assert not found["b", False]


@pytest.mark.parametrize("content", ["{", "{}", '{"modality": {"0": "T1"}}', '{"modality": ["T1"], "labels": {}}'])
def test_unreadable_dataset_json(task, content):
    (task / "dataset.json").write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError, match="'modality' and 'labels'"):
        read_decathlon(task)


def test_an_nnunet_dataset_needs_no_conversion(task):
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "edema": 1}}
    (task / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DatasetError, match="an nnU-Net dataset already: give its folder as --dataset_dir"):
        read_decathlon(task)


def test_numbering_of_modalities(task):
    (task / "dataset.json").write_text('{"modality": {"1": "T1"}, "labels": {}}', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"got \[1\]"):
        read_decathlon(task)


def test_no_dataset_json_or_images(task, tmp_path):
    (task / "dataset.json").rename(tmp_path / "dataset.json")
    with pytest.raises(DatasetError, match="takes a task folder"):
        read_decathlon(task)
    with pytest.raises(FileNotFoundError, match="imagesTr holds no images"):
        (tmp_path / "dataset.json").write_text('{"modality": {"0": "T1"}, "labels": {}}', encoding="utf-8")
        read_decathlon(tmp_path)
