"""Whole-head scans: the same for a seed, poses within range, people kept apart, and the public path."""

import json
import shlex

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
    Settings,
)
from scripts.checkpoint import atomic_save
from scripts.networks import Neuroverse3D
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

    def run_here(config, options):
        words = shlex.split(options)
        run_workflow(config, **{k[2:]: v for k, v in zip(words[::2], words[1::2], strict=True)})

    monkeypatch.setattr(product, "run_bundle", run_here)
    scans = Heads(str(label_maps), str(tmp_path / "out"), contrasts=1, voxel_mm=VOXEL_MM)
    given = {"context_sizes": (2,), "options": "--overlays false", "checkpoint": str(tmp_path / "model.pt")}
    whole, contrast, *structures = rows(product.heads, scans=scans, **given)
    assert (
        whole.case == "K=2, --overlays false" and whole.data == "whole heads, 2 development targets, weights model.pt"
    )
    assert whole.figures["seconds"] > 0 and whole.figures["dice"] == contrast.figures["dice"]
    assert [row.side for row in structures] == list(STRUCTURES) and contrast.side == "contrast T1"
    assert whole.figures["dice"][0] == pytest.approx(np.mean([row.figures["dice"][0] for row in structures]))
