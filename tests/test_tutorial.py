"""The tutorial as a user does it: all of its commands, in order, in a folder of their own."""

import csv
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

TEXT = Path("docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
NEW = [f"synthetic900_{number:02d}" for number in range(5, 10)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder after all commands were run, those of the bundle in this process; tests/test_demo.py starts some."""
    folder = tmp_path_factory.mktemp("a user's copy")
    for name in ("configs", "models", "scripts"):
        (folder / name).symlink_to(Path(name).resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in BLOCKS:
            if language == "python":
                exec(compile(block, "tutorial", "exec"), {})
            elif block.startswith("python -m "):
                _, _, module, *arguments = shlex.split(block.replace("\\\n", ""))
                patch.setattr(sys, "argv", [module, *arguments])
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True)
    return folder


def mask_of(path):
    return np.asarray(nib.load(path).dataobj) > 0


def dice(first, second):
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_the_blocks_are_those_that_are_meant_to_be_run():
    assert [language for language, _ in BLOCKS] == ["bash"] * 5 + ["python"]
    assert TEXT.count("```bash") + TEXT.count("```python") == len(BLOCKS)


def test_every_file_that_is_named_is_there(place):
    named = set(re.findall(r"`(tutorial/[\w/.]+)`", TEXT))
    assert len(named) >= 6 and not [name for name in named if not (place / name).exists()]


def test_every_new_scan_has_a_mask_a_picture_and_a_volume(place):
    predictions = place / "tutorial" / "predictions"
    rows = list(csv.DictReader((predictions / "volumes.csv").open()))
    assert [row["case"] for row in rows] == NEW == sorted(p.name[:-7] for p in predictions.glob("*.nii.gz"))
    for row in rows:
        scan = nib.load(place / "tutorial" / "new" / "imagesTs" / f"{row['case']}_0000.nii.gz")
        answer = nib.load(predictions / f"{row['case']}.nii.gz")
        assert answer.shape == scan.shape and np.array_equal(answer.affine, scan.affine)
        volume_mm3 = 8 * int(mask_of(predictions / f"{row['case']}.nii.gz").sum())
        assert volume_mm3 == pytest.approx(float(row["volume_mm3"])) and volume_mm3 > 0
        assert (predictions / f"{row['case']}.png").stat().st_size > 1000


def test_the_masks_are_better_than_the_examples_labels_alone(place):
    """The floor is the Dice of the labels' majority, for which nobody has to look at an image."""
    folder = place / "tutorial"
    rows = list(csv.DictReader((folder / "scores" / "metrics.csv").open()))
    assert [row["case"] for row in rows] == NEW
    majority = np.mean([mask_of(path) for path in (folder / "examples" / "labelsTr").iterdir()], axis=0) > 0.5
    blind = np.mean([dice(majority, mask_of(folder / "held_out" / f"{name}.nii.gz")) for name in NEW])
    assert np.mean([float(row["dice"]) for row in rows]) > blind + 0.05


def test_the_expected_dice_is_about_the_real_one(place):
    folder = place / "tutorial"
    report = json.loads((folder / "predictions" / "report.json").read_text())
    assert len(report["self_test"]["contexts"]) == 5 and not report["failed"]
    expected = [report["cases"][name]["expected_dice"]["1"] for name in NEW]
    real = [float(row["dice"]) for row in csv.DictReader((folder / "scores" / "metrics.csv").open())]
    assert abs(np.mean(expected) - np.mean(real)) < 0.15


def test_python_answers_the_same_in_every_way(place):
    folder = place / "tutorial"
    mask = mask_of(folder / "python" / "mask.nii.gz")
    assert (
        dice(mask, mask_of(folder / "predictions" / f"{NEW[0]}.nii.gz")) > 0.8
    )  # that one is of an ensemble, on another grid
