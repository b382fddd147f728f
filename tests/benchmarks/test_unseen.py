"""Gain over averaging: what is averaged, what is misaligned, and on which cases."""

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from benchmarks import fine_tuning, learning_curve, unseen_cohorts, unseen_dataset
from benchmarks.context_reading import readings
from benchmarks.scratch_unet import train_unet
from benchmarks.unseen_dataset import SPLIT_FILE, case_scores, interval, misalign
from scripts.checkpoint import atomic_save
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(2, 4))
    network.grid.copy_(torch.tensor([16, 16, 16]))
    return network.eval()


def ball(centre, radius=4, size=16):
    points = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), -1)
    inside = np.linalg.norm(points - centre, axis=-1) < radius
    image = inside + 0.1 + 0.01 * np.random.default_rng(0).random(inside.shape)
    return tuple(MetaTensor(torch.tensor(x, dtype=torch.float32)[None], affine=torch.eye(4)) for x in (image, inside))


def test_the_split_parts_the_cases(shared_dir):
    split = {part: sets["Dataset004_Hippocampus"] for part, sets in json.loads(SPLIT_FILE.read_text()).items()}
    assert {part: len(names) for part, names in split.items()} == {"train": 60, "val": 40, "test": 100}
    names = sorted(name for part in split.values() for name in part)
    there = sorted(p.name[:-7] for p in (shared_dir / "data/Dataset004_Hippocampus/labelsTr").glob("*.nii.gz"))
    assert names == there


def test_averaging_is_right_where_all_are_in_one_place_and_wrong_elsewhere(network):
    inferer = ICLInferer(network, "cpu", spacing=1.0, align="off")
    here, there = ball((8, 8, 8)), ball((4, 8, 12))
    _, together = case_scores(inferer, here, [here, ball((8, 8, 8), 5)])
    _, apart = case_scores(inferer, here, [there, there])
    assert together > 0.7 and apart < 0.3


def test_misaligning_moves_image_and_label_alike():
    image, label = ball((8, 8, 8), 3, 20)
    moved, moved_label = misalign(image, label, np.random.default_rng(1))
    assert moved.shape == image.shape and torch.equal(moved.affine, image.affine)
    assert set(moved_label.unique().tolist()) == {0, 1} and not torch.equal(moved_label.as_tensor(), label.as_tensor())
    assert moved[moved_label > 0].mean() > 0.9 > 0.4 > moved[moved_label == 0].mean()
    again, _ = misalign(image, label, np.random.default_rng(1))
    assert torch.equal(again.as_tensor(), moved.as_tensor())


def test_interval_holds_the_mean():
    mean, low, high = interval([0.1, 0.5, 0.3, 0.4])
    assert low < mean < high and mean == pytest.approx(0.325)
    assert interval([0.5]) == (0.5, 0.5, 0.5)


def test_cohorts_have_a_row_for_every_context_size(network):
    rows = unseen_cohorts.measure(network, 2, (1, 2))
    assert [row["context_size"] for row in rows] == [1, 2]
    for row in rows:
        assert row["gain"][0] == pytest.approx(row["network"][0] - row["averaging"][0])


def test_a_part_that_does_not_exist(network, tmp_path):
    with pytest.raises(ValueError, match="--part must be one of development, reporting, got 'all'"):
        unseen_dataset.measure(network, str(tmp_path), "all")


def test_the_curve_grows_by_a_row(network, tmp_path, monkeypatch, capsys):
    data = tmp_path / "Dataset004_Hippocampus"
    split = {"train": ["a", "b"], "val": ["c"], "test": []}
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True)
    for number, name in enumerate("abc"):
        image, label = (x[0].numpy() for x in ball((8, 8, 8 + number)))
        nib.save(nib.Nifti1Image(image, np.eye(4)), data / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), np.eye(4)), data / "labelsTr" / f"{name}.nii.gz")
    (tmp_path / "split.json").write_text(json.dumps({part: {data.name: names} for part, names in split.items()}))
    monkeypatch.setattr(unseen_dataset, "SPLIT_FILE", tmp_path / "split.json")
    atomic_save(network.state_dict(), tmp_path / "model.pt")
    for _ in range(2):
        learning_curve.learning_curve(str(tmp_path / "model.pt"), str(data), context_size=2, cohorts=1)
    rows = list(csv.DictReader(Path(tmp_path / "learning_curve.csv").open()))
    assert len(rows) == 2 and rows[0] == rows[1] and -1 <= float(rows[0]["misaligned_gain"]) <= 1
    assert capsys.readouterr().out.startswith("epoch\tcohorts")


class Averaging(torch.nn.Module):
    """Stands in for a network that knows one thing: the mean of the contexts' labels."""

    grid = torch.tensor([16, 16, 16])

    def forward(self, images, context_images, context_labels):
        return context_labels.mean(1)


def test_readings_tell_what_the_contexts_did():
    mask = torch.zeros(16, 16, 16)
    mask[2:6], mask[9:12] = 1, 2
    labels = mask.expand(4, 1, 16, 16, 16)
    found = readings(Averaging(), torch.rand(4, 1, 16, 16, 16), labels)
    assert found == {"shown": 1, "other": 0, "shuffled": 1, "empty": 0}
    moved = torch.stack([mask.roll(number, 0)[None] for number in (0, 0, 0, 8)])
    assert readings(Averaging(), torch.rand(4, 1, 16, 16, 16), moved)["shown"] == 1
    moved = torch.stack([mask.roll(number, 0)[None] for number in (0, 8, 8, 8)])
    assert readings(Averaging(), torch.rand(4, 1, 16, 16, 16), moved)["shown"] < 0.5


def test_a_unet_is_trained_on_the_contexts():
    images, labels = (torch.stack([x.as_tensor() for x in both]) for both in zip(*(ball((8, 8, 8)),) * 2, strict=True))
    torch.manual_seed(0)
    fresh = train_unet(images, labels, 1, 0, 1e-3, "cpu")
    torch.manual_seed(0)
    trained = train_unet(images, labels, 1, 0.5, 1e-3, "cpu")
    with torch.inference_mode():
        assert not trained.training and trained(images).shape == (2, 2, 16, 16, 16)
        assert not torch.equal(trained(images), fresh(images))


def test_fine_tuning_keeps_what_is_there(tmp_path):
    (tmp_path / "stage2").mkdir()
    with pytest.raises(FileExistsError, match="is not empty: give another --output_dir"):
        fine_tuning.fine_tuning("data", "weights.pt", str(tmp_path))
