"""Aligned against unaligned: the three sets, what is asked of the command line, and the paired difference."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks import never_worse, whole_heads
from benchmarks.head_scenes import CONTEXTS, TARGETS, LesionScenes, Settings
from benchmarks.unseen_dataset import SPLIT_FILE
from scripts.reporting.report_files import REPORT


@pytest.fixture
def asked(monkeypatch):
    """Commands asked for; each is answered with the right labels, without alignment in every second voxel only."""
    commands = []

    def answer(arguments):
        given = {k[2:]: v for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
        commands.append(given)
        out, data = Path(given["output_dir"]), Path(given["dataset_dir"])
        labels = data / "labelsTs"
        names = sorted(p.name for p in labels.glob("*"))
        if "split_file" in given:
            labels = data / "labelsTr"
            names = [f"{n}.nii.gz" for n in json.loads(Path(given["split_file"]).read_text())["test"][data.name]]
        out.mkdir(parents=True)
        for name in names:
            label = nib.load(labels / name)
            voxels = np.array(label.dataobj)
            if given["align"] == "off":
                voxels[::2] = 0
            nib.save(nib.Nifti1Image(voxels, label.affine), out / name)
        cases = {name.removesuffix(".nii.gz"): {"seconds": 1.0} for name in names}
        (out / REPORT).write_text(json.dumps({"cases": cases, "failed": {}}))

    monkeypatch.setattr(whole_heads, "run_inference", answer)
    return commands


def test_all_sets_are_answered_both_ways(label_maps, make_dataset, tmp_path, asked, capsys):
    split = {part: sets["Dataset004_Hippocampus"] for part, sets in json.loads(SPLIT_FILE.read_text()).items()}
    data = make_dataset(tmp_path, "Dataset004_Hippocampus", cases=split["val"][:2])
    never_worse.never_worse(
        label_maps, data, tmp_path / "out", cases=2, contrasts=2, context_size=2, voxel_mm=8.0, options="--amp true"
    )
    crops, contrast, lesions = json.loads((tmp_path / "out" / "never_worse.json").read_text())["rows"]
    assert [row["set"] for row in (crops, contrast, lesions)] == list(never_worse.SETS)
    assert list(crops["dice"]["off"]) == split["val"][:2]
    assert list(contrast["dice"]["off"]) == ["brain_05_T2_from_T1", "brain_10_T2_from_T1"]
    assert list(lesions["dice"]["off"]) == [f"brain_{n}_{c}" for n in ("05", "10") for c in ("T1", "T2")]
    for row in (crops, contrast, lesions):
        assert all(dice == 1 for dice in row["dice"]["deformable"].values())
        assert all(0 < dice < 1 for dice in row["dice"]["off"].values())
    assert all(command["amp"] == "true" and command["context_size"] == "2" for command in asked)
    assert len({command["output_dir"] for command in asked}) == len(asked) == 2 * (1 + 2 + 4)
    assert capsys.readouterr().out.count("holds") == 3


def test_contexts_of_crops_come_from_the_pool(make_dataset, tmp_path, asked):
    split = json.loads(SPLIT_FILE.read_text())
    data = make_dataset(tmp_path, "Dataset004_Hippocampus", cases=split["val"]["Dataset004_Hippocampus"][:1])
    never_worse.never_worse(None, data, tmp_path / "out", sets=["aligned"], cases=1)
    used = json.loads(Path(asked[0]["split_file"]).read_text())
    assert used["train"] == split["train"] and asked[0]["target_split"] == "test"


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


def test_the_difference_is_paired_and_has_a_bound():
    off = np.array([0.2, 0.8, 0.5])
    assert never_worse.line("aligned", off, off - 0.004).endswith("difference -0.0040 [-0.0040, -0.0040]  holds")
    assert never_worse.line("aligned", off, off - 0.006).endswith("WORSE")


def test_a_set_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="--sets are some of aligned, contrast, lesions, got other"):
        never_worse.never_worse("maps", "data", tmp_path, sets=["other"])
    with pytest.raises(ValueError, match="--part must be one of"):
        never_worse.never_worse("maps", "data", tmp_path, sets=["aligned"], part="all")
