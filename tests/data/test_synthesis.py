from __future__ import annotations

import json
from itertools import combinations

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data import synthesis
from scripts.data.synthesis import INTENSITY_SCALE, MIN_LABEL_FRACTION, synthesize_cohort, write_cohorts
from scripts.synthesize import synthesize

COHORTS = range(6)


@pytest.fixture(scope="module")
def cohorts():
    return [synthesize_cohort((11, i), 4, 32) for i in COHORTS]


def shares(labels, num_labels):
    """Share of the voxels (N, num_labels) of each subject and label."""
    return torch.stack([(labels == k).flatten(1).float().mean(1) for k in range(1, num_labels + 1)], 1)


def dice(a, b):
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def label_means(images, labels):
    return torch.stack([torch.stack([i[m == k].mean() for k in range(5)]) for i, m in zip(images, labels, strict=True)])


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def small(folder, **kwargs):
    arguments = {"cohorts": 2, "subjects": 2, "spatial_size": 16, "progress": False} | kwargs
    return write_cohorts(folder, **arguments)


def test_shapes_and_types(cohorts):
    for images, labels in cohorts:
        assert images.shape == labels.shape == (4, 1, 32, 32, 32)
        assert images.dtype == torch.float32 and labels.dtype == torch.uint8


@pytest.mark.parametrize("size", [16, (16, 24, 32), [32, 16, 16], np.int64(16)])
def test_grid_sizes(size):
    images, labels = synthesize_cohort(0, 1, size)
    assert images.shape == labels.shape == (1, 1, *((16, 16, 16) if isinstance(size, (int, np.integer)) else size))


@pytest.mark.parametrize("seed", [0, 5, (5, 1), [2, 0, 7]])
def test_repeats_exactly(seed):
    first, second = (synthesize_cohort(seed, 2, 16) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_seeds_differ():
    made = [synthesize_cohort(seed, 1, 16) for seed in (0, 1, (0, 1), (1, 1))]
    for (image_a, label_a), (image_b, label_b) in combinations(made, 2):
        assert not torch.equal(image_a, image_b) and not torch.equal(label_a, label_b)


def test_more_subjects_leave_the_first_ones_alone():
    few, many = synthesize_cohort(3, 1, 16), synthesize_cohort(3, 3, 16)
    assert torch.equal(few[0], many[0][:1]) and torch.equal(few[1], many[1][:1])


def test_global_random_state_is_neither_used_nor_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = synthesize_cohort(0, 1, 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)
    torch.manual_seed(2)
    assert torch.equal(first[0], synthesize_cohort(0, 1, 16)[0])


@pytest.mark.parametrize(("num_labels", "size"), [(1, 32), (2, 16), (4, 32), (8, 24), (16, 32)])
def test_every_subject_has_every_label(num_labels, size):
    for seed in range(3):
        _, labels = synthesize_cohort(seed, 3, size, num_labels)
        assert labels.unique().tolist() == list(range(num_labels + 1))
        share = shares(labels, num_labels)
        assert share.min() >= MIN_LABEL_FRACTION
        assert share.max() < 0.15 and share.sum(1).max() < 0.5


def test_a_pose_that_would_lose_a_label_is_weakened(monkeypatch):
    monkeypatch.setattr(synthesis, "_SHIFT", 3.0)
    for seed in range(3):
        assert shares(synthesize_cohort(seed, 3, 16)[1], 4).min() >= MIN_LABEL_FRACTION


def test_says_so_when_the_labels_do_not_fit(monkeypatch):
    monkeypatch.setattr(synthesis, "MIN_LABEL_FRACTION", 0.05)
    with pytest.raises(ValueError, match=r"4 labels do not fit into a grid of \(16, 16, 16\)"):
        synthesize_cohort(0, 1, 16)


def test_intensities_fill_the_unit_range(cohorts):
    for images, _ in cohorts:
        assert images.isfinite().all()
        assert torch.equal(images.amin((1, 2, 3, 4)), torch.zeros(4))
        assert torch.equal(images.amax((1, 2, 3, 4)), torch.ones(4))


def test_contrast_differs_between_cohorts_and_hardly_within(cohorts):
    means = torch.stack([label_means(images, labels) for images, labels in cohorts])  # cohort, subject, label
    within = means.std(1).mean()
    between = means.mean(1).std(0).mean()
    assert between > 0.12
    assert within < 0.4 * between


def test_structures_stand_out_from_what_surrounds_them(cohorts):
    contrasts = []
    for images, labels in cohorts:
        for image, label in zip(images, labels, strict=True):
            for k in range(1, 5):
                mask = label == k
                near = torch.nn.functional.max_pool3d(mask.float(), 5, stride=1, padding=2) > 0
                contrasts.append((image[mask].mean() - image[near & (label == 0)].median()).abs())
    contrasts = torch.stack(contrasts)
    assert contrasts.median() > 0.15
    assert (contrasts > 0.05).float().mean() > 0.85  # a neighbouring distractor may look alike


def test_subjects_differ_but_correspond(cohorts):
    pairs = [
        dice(labels[a] == k, labels[b] == k)
        for _, labels in cohorts
        for k in range(1, 5)
        for a, b in combinations(range(4), 2)
    ]
    assert 0.1 < np.mean(pairs) < 0.6
    assert max(pairs) < 0.95
    unrelated = [
        dice(a[1][s] == k, b[1][s] == k) for a, b in combinations(cohorts, 2) for k in range(1, 5) for s in range(4)
    ]
    assert np.mean(pairs) > 2 * np.mean(unrelated)


def test_averaging_the_other_subjects_does_poorly(cohorts):
    scores = []
    for _, labels in cohorts:
        for k in range(1, 5):
            masks = labels == k
            for s in range(4):
                others = torch.cat([masks[:s], masks[s + 1 :]]).float().mean(0) >= 0.5
                scores.append(dice(masks[s], others))
    assert np.mean(scores) < 0.5


def test_rotation_matrix_and_contrast_gap():
    generator = torch.Generator().manual_seed(0)
    matrix = synthesis._rotation(generator, 180)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3))
    torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor(1.0))
    for value in (0.05, 0.5, 0.93):
        drawn = torch.stack([synthesis._uniform_apart(generator, value, 0.2) for _ in range(200)])
        assert drawn.min() >= 0 and drawn.max() <= 1
        assert (drawn - value).abs().min() >= 0.2 - 1e-6
    assert (drawn < 0.73).any() and (drawn < 0.2).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"subjects": 0}, "subjects must be a whole number of at least 1, got 0"),
        ({"subjects": 2.5}, "subjects"),
        ({"subjects": True}, "subjects"),
        ({"spatial_size": 8}, "spatial_size must be a whole number of at least 16, got 8"),
        ({"spatial_size": (32, 32, 4)}, "spatial_size"),
        ({"num_labels": 0}, "num_labels must be a whole number from 1 to 16, got 0"),
        ({"num_labels": 17}, "num_labels"),
        ({"seed": -1}, "non-negative"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        synthesize_cohort(**({"seed": 0, "subjects": 1, "spatial_size": 16} | arguments))


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
        images, labels = synthesize_cohort((4, i), 2, (16, 20, 24), 3)
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
    assert content["labels"] == {"background": 0, "structure1": 1, "structure2": 2}
    assert content["numTraining"] == 2 and content["file_ending"] == ".nii.gz"
    assert content["name"] == "Synthetic000" and content["licence"] and content["reference"]


def test_case_names_are_unique_across_cohorts(tmp_path):
    names = [p.name for folder in small(tmp_path, cohorts=3) for p in (folder / "imagesTr").iterdir()]
    assert len(set(names)) == len(names) == 6


def test_refuses_to_overwrite_before_any_work(tmp_path, monkeypatch):
    small(tmp_path, cohorts=1, start_id=901)
    (tmp_path / "Dataset901_Synthetic000").rename(tmp_path / "Dataset901_Synthetic001")
    before = tree(tmp_path)
    monkeypatch.setattr(synthesis, "synthesize_cohort", None)
    with pytest.raises(FileExistsError, match="Dataset901_Synthetic001 exists: give another output_dir or overwrite"):
        small(tmp_path)
    assert tree(tmp_path) == before


def test_overwrite_replaces_only_the_same_datasets(tmp_path):
    first = small(tmp_path)
    (tmp_path / "Dataset001_Real").mkdir()
    (tmp_path / "Dataset001_Real" / "dataset.json").write_text("{}")
    kept = (first[1] / "dataset.json").read_text()
    (first[0] / "stale.txt").write_text("")
    small(tmp_path, cohorts=1, subjects=3, overwrite=True)
    assert not (first[0] / "stale.txt").exists()
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

    monkeypatch.setattr(synthesis.nib, "save", interrupted)
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
