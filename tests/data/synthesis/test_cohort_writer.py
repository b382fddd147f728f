"""Synthetic cohorts as nnU-Net datasets on disk."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from scripts.data.nnunet import find_datasets
from scripts.data.synthesis import cohort_writer as written_cohorts
from scripts.data.synthesis.cohort import LESION, synthesize_cohort
from scripts.data.synthesis.cohort_writer import INTENSITY_SCALE, write_cohorts
from scripts.runtime.output_folder import STATE
from scripts.synthesize import synthesize


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if STATE not in p.parts)


def small(folder, **kwargs):
    arguments = {"cohorts": 2, "subjects": 2, "spatial_size": 16, "progress": False} | kwargs
    return write_cohorts(folder, **arguments)


def test_written_datasets_read_back(tmp_path):
    folders = small(tmp_path / "new" / "data", spatial_size=(16, 20, 24), num_labels=3, seed=4, spacing_mm=1.5)
    assert [f.name for f in folders] == ["Dataset900_Synthetic000", "Dataset901_Synthetic001"]
    assert sorted(p.name for p in (tmp_path / "new" / "data").iterdir()) == [f.name for f in folders]
    for i, folder in enumerate(folders):
        cases = [f"synthetic90{i}_0{s}" for s in range(2)]
        assert tree(folder) == sorted(
            ["dataset.json", "imagesTr", "labelsTr"]
            + [f"imagesTr/{c}_0000.nii.gz" for c in cases]
            + [f"labelsTr/{c}.nii.gz" for c in cases]
        )
        images, labels, _ = synthesize_cohort((4, i), 2, (16, 20, 24), 3)
        for s, case in enumerate(cases):
            image = nib.load(folder / "imagesTr" / f"{case}_0000.nii.gz")
            label = nib.load(folder / "labelsTr" / f"{case}.nii.gz")
            for file in (image, label):
                assert file.shape == (16, 20, 24)
                assert nib.aff2axcodes(file.affine) == ("R", "A", "S")
                np.testing.assert_allclose(file.affine, np.diag([1.5, 1.5, 1.5, 1]))
                assert file.header["qform_code"] == file.header["sform_code"] == 1
            assert label.get_data_dtype() == np.uint8 and image.get_data_dtype() == np.int16
            np.testing.assert_array_equal(np.asarray(label.dataobj), labels[s, 0].numpy())
            read = image.get_fdata() / INTENSITY_SCALE
            np.testing.assert_allclose(read, images[s, 0].numpy(), atol=0.51 / INTENSITY_SCALE)


def test_dataset_json_is_nnunet_v2(tmp_path):
    folder = small(tmp_path, cohorts=1, num_labels=2)[0]
    content = json.loads((folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "Synthetic"}
    assert content["labels"] in (
        {"background": 0, "structure1": 1, "structure2": 2},
        {"background": 0, "structure1": 1, LESION: 2},
    )
    assert content["numTraining"] == 2 and content["file_ending"] == ".nii.gz"
    assert content["name"] == "Synthetic000" and content["licence"] and content["reference"]


def test_modalities_are_channels(tmp_path):
    folder = small(tmp_path, cohorts=1, modalities=2)[0]
    (dataset,) = find_datasets(str(tmp_path))
    assert dataset.channels() == (0, 1) or list(dataset.channels()) == [0, 1]
    first, second = (
        nib.load(folder / "imagesTr" / f"synthetic900_00_{channel:04d}.nii.gz").get_fdata() for channel in (0, 1)
    )
    assert not np.allclose(first, second, atol=50)


def test_case_names_are_unique_across_cohorts(tmp_path):
    names = [p.name for folder in small(tmp_path, cohorts=3) for p in (folder / "imagesTr").iterdir()]
    assert len(set(names)) == len(names) == 6


def test_refuses_to_overwrite_before_any_work(tmp_path, monkeypatch):
    small(tmp_path, cohorts=1, start_id=901)
    (tmp_path / "Dataset901_Synthetic000").rename(tmp_path / "Dataset901_Synthetic001")
    before = tree(tmp_path)
    monkeypatch.setattr(written_cohorts, "synthesize_cohort", None)
    with pytest.raises(FileExistsError, match="Dataset901_Synthetic001 exists: give another output_dir or overwrite"):
        small(tmp_path)
    assert tree(tmp_path) == before


def test_overwrite_replaces_only_the_same_datasets(tmp_path):
    first = small(tmp_path)
    (tmp_path / "Dataset001_Real").mkdir()
    (tmp_path / "Dataset001_Real" / "dataset.json").write_text("{}")
    kept = (first[1] / "dataset.json").read_text()
    (first[0] / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        small(tmp_path, cohorts=1, subjects=3, overwrite=True)
    (first[0] / "notes.txt").unlink()
    small(tmp_path, cohorts=1, subjects=3, overwrite=True)
    assert json.loads((first[0] / "dataset.json").read_text())["numTraining"] == 3
    assert (first[1] / "dataset.json").read_text() == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Dataset001_Real", *(f.name for f in first)]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_dataset_of_the_same_number_is_never_touched(tmp_path, overwrite):
    (tmp_path / "Dataset901_Hippocampus").mkdir()
    with pytest.raises(FileExistsError, match="Dataset901_Hippocampus has the number of Dataset901_Synthetic001"):
        small(tmp_path, overwrite=overwrite)
    assert tree(tmp_path) == ["Dataset901_Hippocampus"]


def test_interrupted_run_leaves_whole_datasets_only(tmp_path, monkeypatch):
    save, saved = nib.save, []

    def interrupted(image, path):
        saved.append(path)
        if len(saved) == 6:  # in the middle of the second dataset
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(written_cohorts.nib, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset900_Synthetic000"]
    assert len(tree(tmp_path / "Dataset900_Synthetic000")) == 7


def test_failed_replacement_keeps_the_old_dataset(tmp_path, monkeypatch):
    folder = small(tmp_path, cohorts=1)[0]
    before = tree(tmp_path)
    rename = type(folder).rename

    def refuse(self, target):
        if target == folder and self.name == folder.name:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", refuse)
    with pytest.raises(OSError, match="no space left"):
        small(tmp_path, cohorts=1, subjects=3, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"cohorts": 0},
        {"cohorts": "two"},
        {"seed": -1},
        {"spacing_mm": 0},
        {"spacing_mm": float("nan")},
        {"start_id": 0},
    ],
)
def test_bad_arguments_make_no_folder(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        small(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_command_line_function(tmp_path, capsys):
    synthesize(tmp_path, cohorts=1, subjects=1, spatial_size=16, num_labels=2)
    assert "Dataset900_Synthetic000" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        synthesize(tmp_path, cohorts=1, subjects=1, spatial_size=16, overwrite="False")
    synthesize(tmp_path, cohorts=1, subjects=1, spatial_size=16, overwrite="true")
    assert [p.name for p in tmp_path.iterdir()] == ["Dataset900_Synthetic000"]
