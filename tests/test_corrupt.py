"""Corrupted and clean channels from clean images, and the tables that are made from them."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts import corrupt as program
from scripts.corrupt import corrupt
from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import NnunetDataset
from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.data.tasks import TASKS
from scripts.networks import Neuroverse3D
from scripts.runtime.atomic_files import put_folder_in_place
from scripts.runtime.output_folder import STATE

CORRUPTIONS = [name for name, task in TASKS.items() if task.reads == "image"]
OBLIQUE = np.array([[1.2, 0.1, 0, -20], [-0.1, 1.1, 0.2, 5], [0, -0.2, 1.5, 7], [0, 0, 0, 1]])


@pytest.fixture
def clean(tmp_path, write_nifti):
    """A folder of four images of 16^3 with an oblique affine, and intensities that are not 0 to 1."""
    images, *_ = synthesize_cohort(0, 4, 16)
    for i, image in enumerate(images):
        write_nifti(tmp_path / "clean" / f"case_{i}.nii.gz", (image[0] * 900 - 100).round().short().numpy(), OBLIQUE)
    return tmp_path / "clean"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data" / "Dataset500_Test"


def read(out, case, channel):
    return nib.load(out / "imagesTr" / f"{case}_{channel:04d}.nii.gz")


def voxels(folder):
    return {path.name: nib.load(path).get_fdata() for path in sorted((folder / "imagesTr").iterdir())}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if STATE not in p.parts)


def description(out):
    return json.loads((out / "dataset.json").read_text())


# --- what is written


@pytest.mark.parametrize("task", CORRUPTIONS)
def test_a_sound_dataset_on_the_clean_images_voxels(clean, out, task, capsys):
    corrupt(str(clean), str(out), task)
    assert tree(out) == sorted(
        ["dataset.json", "imagesTr", *(f"imagesTr/case_{i}_{c:04d}.nii.gz" for i in range(4) for c in (0, 1))]
    )
    for i in range(4):
        source = nib.load(clean / f"case_{i}.nii.gz")
        spoilt, kept = read(out, f"case_{i}", 0), read(out, f"case_{i}", 1)
        for image in (spoilt, kept):
            assert np.allclose(image.affine, source.affine, atol=1e-5) and image.get_data_dtype() == np.float32
            assert image.header.get_xyzt_units()[0] == "mm"
        assert np.array_equal(kept.get_fdata(), source.get_fdata())
        assert np.abs(spoilt.get_fdata() - kept.get_fdata()).mean() > 1
        unit = torch.from_numpy((source.get_fdata(dtype=np.float32) + 100) / 900)[None]
        noise = np.random.default_rng([0, *f"case_{i}".encode()])
        expected = TASKS[task].corrupt(unit, description(out)["corruption"]["setting"], noise)
        assert np.allclose(spoilt.get_fdata(), expected[0] * 900 - 100, atol=0.1), "in the clean scan's units"
    written = description(out)
    assert written["numTraining"] == 4 and written["labels"] == {"background": 0}
    assert list(written["channel_names"]) == ["0", "1"] and written["file_ending"] == ".nii.gz"
    assert written["corruption"]["task"] == task and written["corruption"]["seed"] == 0
    assert set(TASKS[task].limits) <= set(written["corruption"]["setting"])
    assert f"4 cases, {task} with" in capsys.readouterr().out

    dataset = NnunetDataset.read(out)
    cases = [{k: c[k] for k in ("image", "case", "dataset")} for c in dataset.cases(0)]
    outputs = [c["image"] for c in dataset.cases(1)]
    inspected = inspect_cases([c | {"output": o} for c, o in zip(cases, outputs, strict=True)])
    assert len(inspected) == 4 and not any(case["problems"] for case in inspected)


def test_rescaled_scans_are_on_one_scale(clean, out, write_nifti):
    image = nib.load(clean / "case_1.nii.gz")
    write_nifti(clean / "case_1.nii.gz", image.get_fdata() * 70 + 30000, image.affine)  # another scanner
    corrupt(str(clean), str(out), "inpainting", rescale="true")
    for case in range(4):
        spoilt, whole = (read(out, f"case_{case}", channel).get_fdata() for channel in (0, 1))
        assert (whole.min(), whole.max()) == (0, 1) and spoilt.min() >= 0 and spoilt.max() <= 1.001
        kept = spoilt > 0
        assert np.corrcoef(spoilt[kept], whole[kept])[0, 1] > 0.99
    source = nib.load(clean / "case_1.nii.gz").get_fdata()
    assert np.corrcoef(source.flatten(), read(out, "case_1", 1).get_fdata().flatten())[0, 1] > 0.99


def test_the_seed_decides_and_a_case_does_not_hang_on_the_others(clean, out, tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corrupt(str(clean), str(tmp_path / name), "gaussian_denoising", seed=seed)
        made[name] = voxels(tmp_path / name)
    assert same(made["a"], made["b"]) and not same(made["a"], made["c"])
    assert description(tmp_path / "a")["corruption"] == description(tmp_path / "b")["corruption"]
    assert description(tmp_path / "a")["corruption"]["setting"] != description(tmp_path / "c")["corruption"]["setting"]
    corrupt(str(clean / "case_2.nii.gz"), str(out), "gaussian_denoising")
    assert same(voxels(out), {name: image for name, image in made["a"].items() if name.startswith("case_2_")})


def test_cases_share_the_setting_but_not_the_realisation(tmp_path, write_nifti, out):
    image = synthesize_cohort(1, 1, 16)[0][0, 0].numpy()
    for name in ("a", "b"):
        write_nifti(tmp_path / "clean" / f"{name}.nii.gz", image + 10 * (name == "b"))  # the same but for the offset
    corrupt(str(tmp_path / "clean"), str(out), "inpainting")
    holes = [read(out, name, 0).get_fdata() - read(out, name, 1).get_fdata() < -1e-3 for name in "ab"]
    fraction = description(out)["corruption"]["setting"]["fraction"]
    assert [hole.sum() / (image > 0).sum() for hole in holes] == pytest.approx([fraction] * 2, abs=0.05)
    assert (holes[0] != holes[1]).mean() > 0.05


def test_nnunet_folders_by_channel(make_dataset, tmp_path, out):
    source = make_dataset(tmp_path, cases=2, channels=(0, 1))
    corrupt(str(source), str(out), "salt_pepper_denoising", channel="0001")
    assert np.array_equal(
        read(out, "case_00", 1).get_fdata(), nib.load(source / "imagesTr" / "case_00_0001.nii.gz").get_fdata()
    )
    assert len(tree(out)) == 2 + 2 * 2


@pytest.mark.parametrize("size", [(20, 16, 33), (16, 40, 3)])
def test_images_that_are_no_cubes(tmp_path, write_nifti, out, size):
    write_nifti(tmp_path / "clean" / "a.nii.gz", np.random.default_rng(0).random(size).astype(np.float32))
    for task in CORRUPTIONS:
        corrupt(str(tmp_path / "clean"), str(out), task, overwrite=True)
        assert read(out, "a", 0).shape == size and np.isfinite(read(out, "a", 0).get_fdata()).all()


# --- what is refused


@pytest.mark.parametrize("task", [name for name in TASKS if name not in CORRUPTIONS])
def test_tasks_without_corruption_are_refused(clean, out, task):
    with pytest.raises(ValueError, match=f"--task {task} needs no corruption"):
        corrupt(str(clean), str(out), task)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "inpaintin"}, ValueError, "did you mean inpainting"),
        ({"seed": -1}, ValueError, "--seed"),
        ({"seed": "x"}, ValueError, "--seed"),
        ({"channel": "x"}, ValueError, "--channel"),
        ({"overwrite": "perhaps"}, ValueError, "expected true or false"),
        ({"dataset_dir": "no where"}, FileNotFoundError, "no where"),
    ],
)
def test_bad_arguments_write_nothing(clean, out, options, error, message):
    with pytest.raises(error, match=message):
        corrupt(**{"dataset_dir": str(clean), "output_dir": str(out), "task": "inpainting"} | options)
    assert not out.parent.exists()


def test_every_faulty_image_is_named_before_any_work(clean, out, write_nifti):
    (clean / "broken.nii.gz").write_bytes(b"no image")
    write_nifti(clean / "nan.nii.gz", np.full((16, 16, 16), np.nan, np.float32))
    shutil.copy(clean / "case_0.nii.gz", clean / "same.nii.gz")
    with pytest.raises(ValueError) as error:
        corrupt(str(clean), str(out), "inpainting")
    assert all(name in str(error.value) for name in ("broken", "nan", "same: duplicate")) and not out.parent.exists()
    corrupt(str(clean), str(out), "inpainting", skip_bad_cases="true")
    assert description(out)["numTraining"] == 4


def test_a_constant_image_is_named_before_any_work(clean, out, write_nifti):
    write_nifti(clean / "flat.nii.gz", np.full((16, 16, 16), 7, np.float32))
    with pytest.raises(ValueError, match=r"flat: image is constant \(every voxel is 7\)"):
        corrupt(str(clean), str(out), "inpainting")
    assert not out.parent.exists()


def test_nothing_is_overwritten_unasked(clean, out):
    corrupt(str(clean), str(out), "inpainting")
    before = voxels(out)
    with pytest.raises(FileExistsError, match="exists: give another --output_dir or --overwrite true"):
        corrupt(str(clean), str(out), "super_resolution", overwrite="false")
    assert same(voxels(out), before) and description(out)["corruption"]["task"] == "inpainting"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        corrupt(str(clean), str(out), "super_resolution", overwrite="True")
    assert same(voxels(out), before) and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    corrupt(str(clean), str(out), "super_resolution", overwrite="True")
    assert description(out)["corruption"]["task"] == "super_resolution"
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("content", [None, "{}", "no json", "[1]"])
def test_folders_of_others_are_never_replaced(clean, out, content):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    if content is not None:
        (out / "dataset.json").write_text(content)
    before = tree(out)
    with pytest.raises(FileExistsError, match=r"also holds .*thesis\.txt"):
        corrupt(str(clean), str(out), "inpainting", overwrite=True)
    assert tree(out) == before and [p.name for p in out.parent.iterdir()] == [out.name]


def test_an_empty_folder_is_free(clean, out):
    out.mkdir(parents=True)
    corrupt(str(clean), str(out), "inpainting")
    assert description(out)["numTraining"] == 4


def test_the_clean_images_are_not_written_over(clean, out):
    corrupt(str(clean), str(out), "inpainting")
    for source in (out, out / "imagesTr", out / "imagesTr" / "case_0_0001.nii.gz"):
        with pytest.raises(ValueError, match="holds the clean images"):
            corrupt(str(source), str(out), "inpainting", channel=1, overwrite=True)


@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_run_leaves_what_was_there(clean, out, monkeypatch, old):
    if old:
        corrupt(str(clean), str(out), "inpainting")
    before = tree(out.parent) if old else []
    save, saved = nib.save, []

    def interrupted(image, path):
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(program.nib, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corrupt(str(clean), str(out), "super_resolution", overwrite=True)
    assert tree(out.parent) == before
    assert not old or description(out)["corruption"]["task"] == "inpainting"


def test_a_folder_that_cannot_be_renamed_comes_back(tmp_path):
    made, folder, aside = (tmp_path / name for name in ("made", "folder", "aside"))
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError):  # made is not there
        put_folder_in_place(made, folder, aside)
    assert tree(tmp_path) == ["folder", "folder/old.txt"]
    made.mkdir()
    put_folder_in_place(made, folder, aside)
    assert tree(tmp_path) == ["aside", "aside/old.txt", "folder"]


# --- on the command line, and the way to the tables


def test_command_line(clean, out):
    def run(*arguments):
        command = [sys.executable, "-m", "scripts.corrupt", "--dataset_dir", str(clean), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    refused = run("--output_dir", str(out), "--task", "segmentation")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert refused.stderr.strip().splitlines()[-1].startswith("error: --task segmentation needs no corruption")
    assert not out.parent.exists()
    done = run("--output_dir", str(out), "--task", "inpainting", "--seed", "3", "--overwrite", "false")
    assert done.returncode == 0 and description(out)["corruption"]["seed"] == 3


def workflow(config, **options):
    running = ConfigWorkflow(
        f"configs/{config}.json", workflow_type="infer" if config == "inference" else None, **options
    )
    running.initialize()
    running.run()


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_tables_before_and_after_a_network(clean, out, tmp_path, capsys):
    corrupt(str(clean), str(out), "gaussian_denoising")
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(2, 4), spatial_size=16).state_dict(), tmp_path / "model.pt")
    workflow(
        "inference",
        dataset_dir=str(out),
        context_dir=str(out),
        output_dir=str(tmp_path / "answers"),
        checkpoint=str(tmp_path / "model.pt"),
        task="generation",
        channel=0,
        context_label_channel=1,
        context_size=3,
        overlays=False,
        device="cpu",
    )
    scoring = {"task": "generation", "reference_dir": str(out / "imagesTr"), "reference_channel": 1}
    workflow("evaluate", prediction_dir=str(tmp_path / "answers"), output_dir=str(tmp_path / "after"), **scoring)
    workflow(
        "evaluate",
        prediction_dir=str(out / "imagesTr"),
        prediction_channel=0,
        output_dir=str(tmp_path / "before"),
        **scoring,
    )
    after, before = table(tmp_path / "after"), table(tmp_path / "before")
    assert list(after) == list(before) == [f"case_{i}" for i in range(4)]
    for case in before:
        spoilt, kept = (read(out, case, channel).get_fdata() for channel in (0, 1))
        answer = nib.load(tmp_path / "answers" / f"{case}.nii.gz").get_fdata()
        assert float(before[case]["mae"]) == pytest.approx(np.abs(spoilt - kept).mean(), rel=1e-3)
        assert float(after[case]["mae"]) == pytest.approx(np.abs(answer - kept).mean(), rel=1e-3)
        assert float(before[case]["psnr_db"]) > 0 and 0 < float(before[case]["ssim"]) < 1
    assert len(re.findall(r"psnr_db", capsys.readouterr().out)) == 2
