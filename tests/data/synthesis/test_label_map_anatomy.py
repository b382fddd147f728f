"""Cohorts whose anatomies are those of label maps."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis import cohort as synthesis
from scripts.data.synthesis import label_map_anatomy
from scripts.data.synthesis.cohort import LESION, synthesize_cohort
from scripts.data.synthesis.contrast import draw_contrast
from scripts.data.synthesis.label_map_anatomy import LabelMaps, map_names
from scripts.data.synthesis.seeded_draws import Draws
from scripts.synthesize import synthesize

CENTRES = {2: (24, 24, 24), 10: (17, 24, 24), 17: (31, 30, 22), 53: (25, 14, 30), 500: (24, 33, 33)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four subjects at 2 mm with five labels, the first one around the others; stored upside down."""
    folder = tmp_path_factory.mktemp("maps")
    points = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"), -1)
    for subject in range(4):
        rng = np.random.default_rng(subject)
        voxels = np.zeros((48, 48, 48), np.int16)
        for value, centre in CENTRES.items():
            radius = (20 if value == 2 else 6) * rng.uniform(0.9, 1.1)
            voxels[np.linalg.norm(points - centre - rng.normal(0, 0.7, 3), axis=-1) < radius] = value
        nib.save(nib.Nifti1Image(voxels[:, :, ::-1], np.diag([2.0, 2, -2, 1])), folder / f"subject{subject}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def maps(folder):
    return LabelMaps(folder)


def test_maps_are_read_once_upright_and_cropped(maps):
    assert maps.names == ("subject0", "subject1", "subject2", "subject3")
    assert maps.values.tolist() == [0, *sorted(CENTRES)]
    for person in maps.subjects:
        assert person.tissues.dtype == torch.uint8 and max(person.tissues.shape) < 48
        assert person.spacing_mm.tolist() == [2, 2, 2]
        first, last = person.centroids[2], person.centroids[5]  # 10 and 500
        assert last[2] > first[2], "what is higher in RAS has the higher index"
        assert person.counts[0] > 0 and person.counts.sum() == person.tissues.numel()


def test_held_out_maps_are_not_read(folder, monkeypatch):
    assert map_names(folder)[0] == "subject0"
    read = []
    load = label_map_anatomy.load_labels
    monkeypatch.setattr(label_map_anatomy, "load_labels", lambda path: read.append(path.name) or load(path))
    maps = LabelMaps(folder, ["subject1", "subject3"])
    assert maps.names == ("subject0", "subject2") and read == ["subject0.nii.gz", "subject2.nii.gz"]


def test_cohorts_repeat_and_every_subject_has_every_structure(maps):
    for seed in range(3):
        cohort, again = (synthesize_cohort(seed, 5, 12, 2, label_maps=maps) for _ in range(2))
        assert torch.equal(cohort.images, again.images) and torch.equal(cohort.labels, again.labels)
        for label in cohort.labels:
            assert all((label == k).any() for k, name in enumerate(cohort.names, start=1) if name != LESION)


def test_drawing_does_not_change_the_maps(maps):
    before = [person.tissues.clone() for person in maps.subjects]
    for seed in range(3):
        synthesize_cohort(seed, 4, 12, 3, label_maps=maps)
    assert all(torch.equal(a, b.tissues) for a, b in zip(before, maps.subjects, strict=True))


def test_share_of_the_cohorts(maps):
    made_up = synthesize_cohort(1, 1, 16, 2)
    assert torch.equal(synthesize_cohort(1, 1, 16, 2, label_maps=maps, label_map_share=0.0).labels, made_up.labels)
    assert not torch.equal(synthesize_cohort(1, 1, 16, 2, label_maps=maps).labels, made_up.labels)


def test_subjects_of_a_cohort_are_different_people(maps):
    anatomy = maps.draw(Draws(0), (16, 16, 16), 2, 4)
    assert len(anatomy.maps) == 4 and len(anatomy.labels) == 2
    shapes = {tuple(map_.flatten().bincount(minlength=8).tolist()) for map_ in anatomy.maps}
    assert len(shapes) == 4


def test_labels_that_no_place_shows(maps, monkeypatch):
    monkeypatch.setattr(label_map_anatomy, "_ATTEMPTS", 2)
    monkeypatch.setattr(synthesis, "_ATTEMPTS", 2)
    with pytest.raises(ValueError, match="15 labels do not fit"):
        synthesize_cohort(0, 4, 16, 15, label_maps=maps)


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no label maps in .*: --label_maps takes a folder"):
        LabelMaps(tmp_path)
    with pytest.raises(ValueError, match="held_out_maps: nobody not in"):
        LabelMaps(folder, ["nobody"])
    with pytest.raises(ValueError, match="held_out_maps leaves no label map"):
        LabelMaps(folder, map_names(folder))
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(ValueError, match=r"empty.nii.gz is no label map"):
        LabelMaps(tmp_path)


def test_command_line(folder, tmp_path, capsys):
    synthesize(
        tmp_path,
        cohorts=1,
        subjects=2,
        spatial_size=16,
        num_labels=2,
        label_maps=str(folder),
        held_out_maps="['subject0']",
    )
    assert "Dataset900_Synthetic000" in capsys.readouterr().out
    label = nib.load(tmp_path / "Dataset900_Synthetic000" / "labelsTr" / "synthetic900_00.nii.gz")
    assert set(np.unique(label.dataobj)) == {0, 1, 2}


def test_some_cohorts_look_like_t1_weighted_scans_and_some_the_other_way_round(maps):
    anatomy = maps.draw(Draws(0), (16, 16, 16), 2, 3)
    tissues, t1 = (torch.tensor(column) for column in zip(*anatomy.t1_means, strict=True))
    assert sorted(tissues.tolist()) == [1, 2, 3, 4]  # 500 is a tissue of no known mean
    contrasts = [draw_contrast(Draws(seed), anatomy, (16, 16, 16), anatomy.tissues) for seed in range(100)]
    alike = torch.stack([torch.corrcoef(torch.stack([one.means[tissues], t1]))[0, 1] for one in contrasts])
    assert (alike > 0.8).sum() > 25 and (alike < -0.8).sum() > 10
    assert (alike.abs() < 0.8).sum() > 25, "most contrasts are still made up"
