"""Whole-head scans: the same for a seed, poses within range, people kept apart, and the public path."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from benchmarks import product
from benchmarks.head_scenes import (
    CONTEXTS,
    DEGREES,
    HELD_OUT,
    SHIFT_MM,
    STRUCTURES,
    TARGETS,
    Heads,
    HeadScenes,
    LesionScenes,
    Settings,
)
from benchmarks.hippocampus import SPLIT_FILE, Hippocampus
from scripts.checkpoint import atomic_save
from scripts.networks import Neuroverse3D
from scripts.reporting.report_files import REPORT
from tests.workflows import run_workflow

VOXEL_MM = 8.0


def voxels_of(folder):
    return {str(p.relative_to(folder)): np.asarray(nib.load(p).dataobj) for p in sorted(folder.rglob("*.nii.gz"))}


def test_the_same_seed_gives_the_same_scans(label_maps, tmp_path):
    made = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        settings = Settings("brain_05", 2, 2, contexts=2, voxel_mm=VOXEL_MM, seed=seed)
        made[name] = voxels_of(HeadScenes(label_maps, tmp_path / name).episode(settings))
    assert made["one"].keys() == made["again"].keys() and len(made["one"]) == 6
    assert all(np.array_equal(made["one"][file], made["again"][file]) for file in made["one"])
    target = f"{TARGETS}/imagesTs/brain_05_0000.nii.gz"
    assert not np.array_equal(made["one"][target], made["other"][target])


def test_scans_have_heads_with_all_structures_and_poses_within_range(label_maps, tmp_path):
    folder = HeadScenes(label_maps, tmp_path).episode(Settings("brain_10", 0, 0, contexts=3, voxel_mm=VOXEL_MM))
    poses = json.loads((folder / "scene.json").read_text())["poses"]
    assert set(poses) == {"brain_10", "brain_01", "brain_02", "brain_03"}, "nobody who is kept aside is a context"
    turns = np.array([pose["degrees"] for pose in poses.values()])
    shifts = np.array([pose["shift_mm"] for pose in poses.values()])
    assert 0 < np.abs(turns).max() <= DEGREES and 0 < np.abs(shifts).max() <= SHIFT_MM
    assert len(np.unique(turns)) == turns.size
    assert all(0 <= pose["neck"] <= 1 for pose in poses.values())
    for file, voxels in voxels_of(folder).items():
        if "labels" in file:
            assert set(np.unique(voxels)) == set(range(11)), file
        else:
            assert voxels.max() > 5 * np.median(voxels[:, :2]), "dark air beside a bright head"
    target = nib.load(folder / TARGETS / "imagesTs" / "brain_10_0000.nii.gz")
    assert np.allclose(nib.affines.apply_affine(target.affine, (np.array(target.shape) - 1) / 2), 0)
    assert np.allclose(target.header.get_zooms(), VOXEL_MM)


def test_a_pose_moves_the_head_as_it_says(label_maps, tmp_path, monkeypatch):
    """A structure's middle, turned and shifted about the middle of all, is where the label map has it."""
    scenes = HeadScenes(label_maps, tmp_path)
    middles = {}
    for degrees, shift in ((0.0, 0.0), (15.0, 8.0)):
        monkeypatch.setattr("benchmarks.head_scenes.DEGREES", degrees)
        monkeypatch.setattr("benchmarks.head_scenes.SHIFT_MM", shift)
        folder = scenes.episode(Settings("brain_15", 0, 0, contexts=1, voxel_mm=4.0, seed=int(degrees)))
        label = np.asarray(nib.load(folder / TARGETS / "labelsTs" / "brain_15.nii.gz").dataobj)
        middles[degrees] = 4.0 * np.array([np.argwhere(label == value).mean(0) for value in range(1, 11)])
        pose = json.loads((folder / "scene.json").read_text())["poses"]["brain_15"]
    straight, turned = (points - points.mean(0) for points in middles.values())
    found = Rotation.align_vectors(turned, straight)[0]
    wanted = Rotation.from_euler("xyz", pose["degrees"], degrees=True)
    assert np.rad2deg((found * wanted.inv()).magnitude()) < 1.5


def test_scans_are_used_again_unless_the_settings_differ(label_maps, tmp_path):
    scenes, settings = HeadScenes(label_maps, tmp_path), Settings("brain_20", 1, 0, contexts=1, voxel_mm=VOXEL_MM)
    folder = scenes.episode(settings)
    assert folder.name == "brain_20_T2_from_T1"
    file = next((folder / CONTEXTS / "imagesTr").iterdir())
    file.write_bytes(b"mark")
    assert scenes.episode(settings) == folder and file.read_bytes() == b"mark"
    scenes.episode(Settings("brain_20", 1, 0, contexts=2, voxel_mm=VOXEL_MM))
    assert len(list((folder / CONTEXTS / "imagesTr").iterdir())) == 2
    assert all(path.read_bytes() != b"mark" for path in (folder / CONTEXTS / "imagesTr").iterdir())


def test_what_cannot_be_made(label_maps, tmp_path, write_nifti):
    with pytest.raises(ValueError, match="4 contexts of 3 people"):
        HeadScenes(label_maps, tmp_path).episode(Settings("brain_05", 0, 0, contexts=4))
    write_nifti(tmp_path / "few" / "brain_05.nii.gz", np.ones((4, 4, 4), np.int16))
    with pytest.raises(ValueError, match="lacks brain_10, brain_15, brain_20"):
        HeadScenes(tmp_path / "few", tmp_path)
    with pytest.raises(ValueError, match="--part must be one of development, reporting, got 'test'"):
        Heads("maps", "out", "test")
    with pytest.raises(ValueError, match="--contrasts 1 leaves no target"):
        Heads("maps", "out", contrasts=1).settings(other_contrast=True)


def test_parts_share_no_target_and_other_contrasts_differ():
    development, reporting = ({e.person for e in Heads("", "", p).settings()} for p in ("development", "reporting"))
    assert not development & reporting and development | reporting == set(HELD_OUT)
    assert len(Heads("", "", contrasts=4).settings()) == 8
    other = Heads("", "", "reporting").settings(other_contrast=True)
    assert len(other) == 4 and all(e.context_contrast == 0 != e.contrast for e in other)


def test_heads_run_through_the_public_path(label_maps, tmp_path, monkeypatch, rows):
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(2, 4))
    network.grid.copy_(torch.tensor([16, 16, 16]))
    atomic_save(network.state_dict(), tmp_path / "model.pt")

    def run_here(arguments):
        run_workflow("inference", **{k[2:]: v for k, v in zip(arguments[::2], arguments[1::2], strict=True)})

    monkeypatch.setattr(product, "run_inference", run_here)
    scans = Heads(str(label_maps), str(tmp_path / "out"), contrasts=1, voxel_mm=VOXEL_MM)
    given = {"context_sizes": (2,), "options": "--overlays false", "checkpoint": str(tmp_path / "model.pt")}
    whole, contrast, *structures = rows(product.heads, scans=scans, **given)
    assert (
        whole.case == "K=2, --overlays false" and whole.data == "whole heads, 2 development targets, weights model.pt"
    )
    assert whole.figures["seconds"] > 0 and whole.figures["dice"] == contrast.figures["dice"]
    assert [row.side for row in structures] == list(STRUCTURES) and contrast.side == "contrast T1"
    assert whole.figures["dice"][0] == pytest.approx(np.mean([row.figures["dice"][0] for row in structures]))


def test_a_failed_command_says_why(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho working\necho error: no targets >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(product.sys, "executable", str(program))
    with pytest.raises(ValueError, match="status 1: error: no targets"):
        product.run_inference(["--output_dir", str(tmp_path)])


@pytest.fixture
def asked(monkeypatch):
    """Commands asked for; each is answered with the right labels, without alignment in every second voxel only."""
    commands = []

    def answer(arguments):
        given = {k[2:]: v for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
        commands.append(given)
        out, data = Path(given["output_dir"]), Path(given["dataset_dir"])
        labels = data / ("labelsTs" if (data / "labelsTs").is_dir() else "labelsTr")
        names = sorted(p.name for p in labels.glob("*"))
        if "split_file" in given:
            labels = data / "labelsTr"
            names = [f"{n}.nii.gz" for n in json.loads(Path(given["split_file"]).read_text())["test"][data.name]]
        out.mkdir(parents=True, exist_ok=True)
        for name in names:
            label = nib.load(labels / name)
            voxels = np.array(label.dataobj)
            if given.get("align", "off" if given["amp"] == "true" else "") == "off":
                voxels[::2] = 0
            nib.save(nib.Nifti1Image(voxels, label.affine), out / name)
        cases = {name.removesuffix(".nii.gz"): {"seconds": 1.0} for name in names}
        (out / REPORT).write_text(json.dumps({"cases": cases, "failed": {}}))

    monkeypatch.setattr(product, "run_inference", answer)
    return commands


def test_never_worse_predicts_all_sets_both_ways(label_maps, make_dataset, tmp_path, asked, rows):
    split = json.loads(SPLIT_FILE.read_text())
    names = split["val"]["Dataset004_Hippocampus"][:2]
    data = make_dataset(tmp_path, "Dataset004_Hippocampus", cases=names)
    scans = Heads(str(label_maps), str(tmp_path / "out"), contrasts=2, voxel_mm=8.0)
    cases = Hippocampus(str(data), cases=2)
    found = rows(product.never_worse, scans=scans, cases=cases, context_size=2, options="--amp true")
    assert [row.case for row in found] == [name for name in product.SETS for _ in range(2)]
    for off, aligned in zip(found[::2], found[1::2], strict=True):
        assert aligned.figures["dice"] == (1, 1, 1) and 0 < off.figures["dice"][0] < 1
        assert aligned.figures["gain"][0] == pytest.approx(1 - off.figures["dice"][0])
    assert all(command["amp"] == "true" and command["context_size"] == "2" for command in asked)
    assert len({command["output_dir"] for command in asked}) == len(asked) == 2 * (1 + 2 + 4)
    used = json.loads(Path(asked[0]["split_file"]).read_text())
    assert used["train"] == split["train"] and used["test"] == {data.name: names}
    with pytest.raises(ValueError, match="--sets are some of aligned, contrast, lesions, got other"):
        rows(product.never_worse, scans=scans, cases=cases, sets=["other"])


def test_each_brain_has_a_lesion_somewhere_else(label_maps, tmp_path):
    folder = LesionScenes(label_maps, tmp_path).episode(Settings("brain_05", 0, 0, contexts=2, voxel_mm=4.0))
    assert json.loads((folder / CONTEXTS / "dataset.json").read_text())["labels"] == {"background": 0, "lesion": 1}
    middles, looks = [], []
    for label in [*(folder / TARGETS).glob("labelsTs/*"), *(folder / CONTEXTS).glob("labelsTr/*")]:
        voxels = np.asarray(nib.load(label).dataobj)
        assert set(np.unique(voxels)) == {0, 1}
        middles.append(np.argwhere(voxels).mean(0) / voxels.shape)
        image = label.parents[1] / label.parent.name.replace("labels", "images") / label.name.replace(".", "_0000.", 1)
        looks.append(np.median(np.asarray(nib.load(image).dataobj)[voxels == 1]))
    distances = np.linalg.norm(np.subtract.outer(middles, middles)[:, [0, 1, 2], :, [0, 1, 2]], axis=0)
    assert len(middles) == 3 and distances[np.triu_indices(3, 1)].min() > 0.02
    assert max(looks) < 300 or min(looks) > 700, "bright in all, or dark in all"


def test_precision_compares_the_demo_both_ways(make_dataset, tmp_path, asked, rows):
    with pytest.raises(FileNotFoundError, match="no finished demo in .*: run make demo first"):
        rows(product.precision, demo_dir=str(tmp_path))
    data = make_dataset(tmp_path / "data", cases=2)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "summary.json").touch()
    float32, bfloat16 = rows(product.precision, demo_dir=str(tmp_path))
    assert float32.figures["dice"] == 1 > bfloat16.figures["dice"]
    assert bfloat16.figures["change_of_dice"] == pytest.approx(1 - bfloat16.figures["dice"])
    assert [command["dataset_dir"] for command in asked] == [str(data)] * 2
