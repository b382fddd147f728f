"""Scans and cohorts that were never trained on: what is averaged, what is misaligned, and on which cases."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from benchmarks import hippocampus, pretrained, product, registration, tuning
from benchmarks.hippocampus import SPLIT_FILE, Hippocampus, interval, misalign
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


@pytest.fixture
def cases(network, tmp_path, monkeypatch):
    """Three scans in place of the hippocampus cases, one of them the target."""
    data = tmp_path / "Dataset004_Hippocampus"
    split = {"train": ["a", "b"], "val": ["c"], "test": []}
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True)
    for number, name in enumerate("abc"):
        image, label = (x[0].numpy() for x in ball((8, 8, 8 + number)))
        label[label > 0] += np.indices(label.shape)[0][label > 0] > 7  # two halves
        nib.save(nib.Nifti1Image(image, np.eye(4)), data / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), np.eye(4)), data / "labelsTr" / f"{name}.nii.gz")
    (tmp_path / "split.json").write_text(json.dumps({part: {data.name: names} for part, names in split.items()}))
    monkeypatch.setattr(hippocampus, "SPLIT_FILE", tmp_path / "split.json")
    atomic_save(network.state_dict(), tmp_path / "model.pt")
    return {"cases": Hippocampus(str(data)), "checkpoint": str(tmp_path / "model.pt")}


def test_averaging_is_right_where_all_are_in_one_place_and_wrong_elsewhere(network):
    inferer = ICLInferer(network, "cpu", spacing=1.0, align="off")
    (scan, wanted), (moved, moved_label) = ball((8, 8, 8)), ball((4, 8, 12))
    dice = []
    for images, labels in (([scan, scan], [wanted, wanted]), ([moved, moved], [moved_label, moved_label])):
        inferer.set_context(images, labels)
        dice.append(hippocampus.mean_dice(product.average(inferer, inferer.target(scan).image), wanted))
    assert dice[0] > 0.7 > 0.3 > dice[1]


def test_every_benchmark_of_the_cases_says_what_it_measured(cases, rows):
    found = rows(product.unseen, **cases, align="off")
    assert [row.case for row in found] == ["aligned, K=1, --align off", "misaligned, K=1, --align off"]
    assert found[0].data == "hippocampus scans, 1 development cases, weights model.pt"
    for row in found:
        dice, averaging, (gain, *_) = (row.figures[name] for name in ("dice", "averaging", "gain"))
        assert gain == pytest.approx(dice[0] - averaging)
    float32, bfloat16 = rows(product.precision, **cases, context_size=1)
    change = bfloat16.figures["dice"][0] - float32.figures["dice"][0]
    assert bfloat16.figures["change_of_dice"] == pytest.approx(abs(change))
    read = rows(pretrained.reading, **cases, context_size=2, alignments=("aligned",))
    assert [row.case for row in read] == list(pretrained.MEANINGS.values())
    (corrupted, restored) = rows(pretrained.restoration, **cases, tasks=("inpainting",), context_size=2)
    gain = restored.figures["psnr_gain"][0]
    assert gain == pytest.approx(restored.figures["psnr"] - corrupted.figures["psnr"])
    before, unet = rows(tuning.minutes, **cases, tune=False, align="off")
    assert (before.side, unet.side) == ("as it came", "U-Net, 0.05 min") and "gain" in unet.figures
    with pytest.raises(ValueError, match="--context_size must be at least 2"):
        rows(pretrained.reading, **cases, context_size=1)


def test_votes_are_scored_after_each_step(cases, rows):
    found = rows(registration.votes, cases=cases["cases"], alignments=("aligned",), steps=("affine", "sitk"))
    assert [row.side for row in found] == ["affine", "sitk"]
    assert all(row.figures["dice"][0] > 0.5 and row.figures["seconds"] > 0 for row in found)


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


def test_cohorts_have_a_row_for_every_context_size(cases, rows):
    (row,) = rows(pretrained.cohorts, checkpoint=cases["checkpoint"])
    assert row.case == "K=1" and row.data == "2 made-up cohorts, weights model.pt"
    assert row.figures["gain"][0] == pytest.approx(row.figures["dice"][0] - row.figures["averaging"])


def test_a_part_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="--part must be one of development, reporting, got 'all'"):
        Hippocampus(str(tmp_path), "all")


class Averaging(torch.nn.Module):
    """Stands in for a network that knows one thing: the mean of the contexts' labels."""

    grid = torch.tensor([16, 16, 16])

    def forward(self, images, context_images, context_labels):
        return context_labels.mean(1)


def test_readings_tell_what_the_contexts_did():
    mask = torch.zeros(16, 16, 16)
    mask[2:6], mask[9:12] = 1, 2
    labels = mask.expand(4, 1, 16, 16, 16)
    found = pretrained.readings(Averaging(), torch.rand(4, 1, 16, 16, 16), labels)
    assert found == {"shown": 1, "other": 0, "shuffled": 1, "empty": 0}
    moved = torch.stack([mask.roll(number, 0)[None] for number in (0, 0, 0, 8)])
    assert pretrained.readings(Averaging(), torch.rand(4, 1, 16, 16, 16), moved)["shown"] == 1
    moved = torch.stack([mask.roll(number, 0)[None] for number in (0, 8, 8, 8)])
    assert pretrained.readings(Averaging(), torch.rand(4, 1, 16, 16, 16), moved)["shown"] < 0.5


def test_a_unet_is_trained_on_the_contexts():
    images, labels = (torch.stack([x.as_tensor() for x in both]) for both in zip(*(ball((8, 8, 8)),) * 2, strict=True))
    torch.manual_seed(0)
    fresh = tuning.train_unet(images, labels, 1, 0, 1e-3, "cpu")
    torch.manual_seed(0)
    trained = tuning.train_unet(images, labels, 1, 0.5, 1e-3, "cpu")
    with torch.inference_mode():
        assert not trained.training and trained(images).shape == (2, 2, 16, 16, 16)
        assert not torch.equal(trained(images), fresh(images))


def test_fine_tuning_keeps_what_is_there(cases, rows, tmp_path):
    (tmp_path / "out" / "stage2").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not empty: give another --output_dir"):
        rows(tuning.fine_tuning, **cases, output_dir=str(tmp_path / "out"))
