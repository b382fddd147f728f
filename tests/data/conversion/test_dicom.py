"""Folders of DICOM: which series is which case."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.data.conversion import dicom_series
from scripts.data.conversion.dicom import pair_dicom
from scripts.data.nnunet import DatasetError
from tests.data.dicom_series import write_dicom

pytest.importorskip("SimpleITK")


def volume(size=(8, 10, 6), seed=0):
    return np.random.default_rng(seed).integers(-50, 1000, size).astype(np.int16)


def test_folders_are_cases_and_masks_go_by_name(tmp_path, write_nifti):
    for name in ("s1/T1", "s2/T1"):
        write_dicom(tmp_path / "raw" / name, volume())
        write_nifti(tmp_path / "raw" / "masks" / f"{name.replace('/', '_')}.nii.gz", np.zeros((2, 2, 2), np.uint8))
    (tmp_path / "raw" / "s1" / "readme.txt").write_text("no image")
    found = pair_dicom(tmp_path / "raw", None, "masks/*.nii.gz").cases
    assert [(c.case, c.mask.name, c.problems) for c in found] == [
        ("s1_T1", "s1_T1.nii.gz", ()),
        ("s2_T1", "s2_T1.nii.gz", ()),
    ]
    assert len(found[0].images[0].files) == 6 and found[0].images[0].description == "T1"


def test_the_folder_itself(tmp_path):
    write_dicom(tmp_path / "patient", volume())
    assert [case.case for case in pair_dicom(tmp_path / "patient", None, None).cases] == ["patient"]


def test_channels_by_folder(tmp_path):
    for name in ("s1/T1", "s1/T2", "s2/T1"):
        write_dicom(tmp_path / "raw" / name, volume(), description=name[3:])
    found = pair_dicom(tmp_path / "raw", ["*/T2", "*/T1"], None)
    assert [i.description for i in found.cases[0].images] == ["T2", "T1"] and found.channel_names == ("T2", "T1")
    assert "no image of channel 0000 (*/T2) for s2/T1" in found.cases[1].problems[0]


def test_several_series_are_listed_and_chosen_by_description(tmp_path):
    for folder in ("s1", "s2"):
        write_dicom(tmp_path / "raw" / folder, volume(), description="Sag T1 MPRAGE")
        write_dicom(tmp_path / "raw" / folder, volume(), description="Ax FLAIR", prefix="F")
    for case in pair_dicom(tmp_path / "raw", None, None).cases:
        assert "'Sag T1 MPRAGE', 6 files" in case.problems[0] and "'Ax FLAIR', 6 files" in case.problems[0]
        assert "--series" in case.problems[0]
    chosen = pair_dicom(tmp_path / "raw", None, None, series="flair").cases
    assert [(c.case, c.images[0].description, c.problems) for c in chosen] == [
        ("s1", "Ax FLAIR", ()),
        ("s2", "Ax FLAIR", ()),
    ]
    assert all("Ax FLAIR" in c.problems[0] for c in pair_dicom(tmp_path / "raw", None, None, series="T2").cases)


def test_folders_of_another_series_are_left_out_aloud(tmp_path, caplog):
    write_dicom(tmp_path / "raw" / "1", volume(), description="T1")
    write_dicom(tmp_path / "raw" / "2", volume(), description="scout")
    assert [c.case for c in pair_dicom(tmp_path / "raw", None, None, series="T1").cases] == ["1"]
    assert "1 folders without a series named like 'T1'" in caplog.text
    with pytest.raises(FileNotFoundError, match="--series 'T9'; there are .*'T1'"):
        pair_dicom(tmp_path / "raw", None, None, series="T9")


def test_nothing_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no DICOM series"):
        pair_dicom(tmp_path, None, None)
    write_dicom(tmp_path / "s1", volume())
    with pytest.raises(FileNotFoundError, match=r"--mask_pattern '\*.nii.gz'"):
        pair_dicom(tmp_path, None, "*.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"--image_pattern '\*/T9'"):
        pair_dicom(tmp_path, ["*/T9"], None)


def test_without_simpleitk(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_series, "optional_import", lambda name: (None, False))
    with pytest.raises(DatasetError, match="pip install SimpleITK"):
        pair_dicom(tmp_path, None, None)
