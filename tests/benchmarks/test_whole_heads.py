"""Whole-head scans: the same for a seed, poses within range, people kept apart, and the public path."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from benchmarks import whole_heads
from benchmarks.head_scenes import CONTEXTS, DEGREES, HELD_OUT, SHIFT_MM, TARGETS, HeadScenes, Settings
from benchmarks.unseen_brains import STRUCTURES
from benchmarks.whole_heads import part_settings, structure_dice, table
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
        part_settings("test")
    with pytest.raises(ValueError, match="--contrasts 1 leaves no target"):
        part_settings("development", contrasts=1, other_contrast=True)


def test_parts_share_no_target_and_other_contrasts_differ():
    development, reporting = ({e.person for e in part_settings(part)} for part in ("development", "reporting"))
    assert not development & reporting and development | reporting == set(HELD_OUT)
    assert len(part_settings("development", contrasts=4)) == 8
    other = part_settings("reporting", 3, other_contrast=True)
    assert len(other) == 4 and all(e.context_contrast == 0 != e.contrast for e in other)


def test_it_runs_through_the_public_path(label_maps, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(2, 4))
    network.grid.copy_(torch.tensor([16, 16, 16]))
    atomic_save(network.state_dict(), tmp_path / "model.pt")

    def run_here(arguments):
        run_workflow("inference", **{k[2:]: v for k, v in zip(arguments[::2], arguments[1::2], strict=True)})

    monkeypatch.setattr(whole_heads, "run_inference", run_here)
    whole_heads.whole_heads(
        label_maps,
        tmp_path / "out",
        contrasts=1,
        context_sizes=(2,),
        options="--device cpu --overlays false",
        checkpoint=str(tmp_path / "model.pt"),
        voxel_mm=VOXEL_MM,
    )
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["context_size"], row["target"]) for row in rows] == [(2, f"{person}_T1") for person in HELD_OUT[:2]]
    assert all(list(row["dice"]) == list(STRUCTURES) and row["seconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "K=2  Dice 0." in printed and "ventral diencephalon" in printed
    episode = tmp_path / "out" / "scenes" / "brain_05_T1"
    perfect = structure_dice(episode, episode / TARGETS / "labelsTs", "brain_05")
    assert set(perfect.values()) == {1.0}


def test_the_table_has_means_over_targets():
    rows = [
        {
            "context_size": 8,
            "contrast": "T1",
            "seconds": 1.0,
            "command_seconds": 2.0,
            "dice": dict.fromkeys(STRUCTURES, d),
        }
        for d in (0.5, 0.7)
    ]
    first, *structures = table(rows).splitlines()
    assert first.startswith("K=8  Dice 0.600 [0.500, 0.700]  2 targets, 1.0 s each (2.0 s with the start)")
    assert len(structures) == len(STRUCTURES) + 1 and structures[-1].split() == [
        "all,",
        "T1",
        "0.600",
        "[0.500,",
        "0.700]",
    ]


def test_a_failed_command_says_why(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho working\necho error: no targets >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(whole_heads.sys, "executable", str(program))
    with pytest.raises(ValueError, match="status 1: error: no targets"):
        whole_heads.run_inference(["--output_dir", str(tmp_path)])
