"""Datasets as people have them, through the workflows: links to nothing, sessions, running numbers, other splits."""

from __future__ import annotations

import json
import os
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.nnunet import DatasetError, find_datasets
from scripts.networks import Neuroverse3D
from scripts.prepare_data import prepare_data
from scripts.runtime.options import normalise
from tests.workflows import SMALL, run_workflow

BOM = b"\xef\xbb\xbf"
NAMES = [f"c{i}" for i in range(4)]


@pytest.fixture(scope="module")
def root(make_dataset, tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), cases=NAMES)


@pytest.fixture(scope="module")
def sessions(make_dataset, tmp_path_factory):
    names = [f"sub-{subject:02d}_ses-{session}" for subject in range(1, 7) for session in "ab"]
    return make_dataset(tmp_path_factory.mktemp("sessions"), cases=names)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), path)
    return path


@pytest.fixture
def infer(weights, tmp_path):
    def run(targets, contexts, **options):
        settings = {"checkpoint": str(weights), "context_size": 2, "overlays": False, "device": "cpu"}
        settings |= {"dataset_dir": str(targets), "context_dir": str(contexts), "output_dir": str(tmp_path / "out")}
        run_workflow("inference", **(settings | options))
        return json.loads((tmp_path / "out" / "report.json").read_text())

    return run


def train(data, out, **options):
    run_workflow("train_stage1", dataset_dir=str(data), output_dir=str(out), **(SMALL | {"epochs": 1} | options))
    return json.loads((out / "stage1" / "splits.json").read_text())


def copied(root, folder):
    return shutil.copytree(root, folder / root.name)


def images(root, folder="imagesTr"):
    return sorted((root / folder).iterdir())


# --- links to nothing, names that are not UTF-8


def test_targets_that_cannot_be_had_are_named_and_the_others_done(root, infer, tmp_path):
    targets = tmp_path / "targets"
    targets.mkdir()
    shutil.copy(images(root)[0], targets / "a.nii.gz")
    (targets / "b.nii.gz").symlink_to("../.git/annex/objects/none/b.nii.gz")
    shutil.copy(images(root)[1], os.fsencode(targets) + b"/c\xff.nii.gz")
    for _ in range(2):  # the second time the first target is done already
        with pytest.raises(DatasetError, match=r"2 targets were left out: b: .*link to nothing.*c\\udcff: .*not UTF-8"):
            infer(targets, root)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert set(report["cases"]) == {"a"} and set(report["failed"]) == {"b", "c\\udcff"}
        assert (tmp_path / "out" / "a.nii.gz").is_file() and not (tmp_path / "out" / "b.nii.gz").exists()


def test_a_target_that_became_a_link_to_nothing(root, infer, tmp_path):
    targets = tmp_path / "targets"
    targets.mkdir()
    for name, path in zip("ab", images(root), strict=False):
        shutil.copy(path, targets / f"{name}.nii.gz")
    infer(targets, root)
    (targets / "b.nii.gz").unlink()
    (targets / "b.nii.gz").symlink_to("nowhere.nii.gz")
    with pytest.raises((DatasetError, FileExistsError), match=r"\bb\b"):
        infer(targets, root)


@pytest.mark.parametrize("which", ["image", "label", "both"])
def test_context_pairs_that_are_links_to_nothing(root, infer, tmp_path, which):
    contexts = copied(root, tmp_path)
    for kind, path in (("image", images(contexts)[1]), ("label", images(contexts, "labelsTr")[1])):
        if which in (kind, "both"):
            path.unlink()
            path.symlink_to("../../.git/annex/objects/none")
    with pytest.raises(DatasetError, match=r"1 of 4 cases are faulty(.|\n)*c1: c1(_0000)?.nii.gz is a link to nothing"):
        infer(images(root)[0], contexts)
    report = infer(images(root)[0], contexts, skip_bad_cases=True, context_size=4)
    assert report["contexts"] == ["c0", "c2", "c3"]


def test_training_names_links_to_nothing_and_names_that_are_not_utf8(root, tmp_path):
    data = copied(root, tmp_path)
    for path in (images(data)[0], images(data, "labelsTr")[0]):
        path.unlink()
        path.symlink_to("nowhere")
    for folder, name in (("imagesTr", b"z\xfe_0000.nii.gz"), ("labelsTr", b"z\xfe.nii.gz")):
        shutil.copy(images(data, folder)[-1], os.fsencode(data / folder) + b"/" + name)
    with pytest.raises(DatasetError, match=r"(?s)2 of 5 cases.*/c0: .*link to nothing.*/z\\udcfe: .*not UTF-8"):
        train(data, tmp_path / "out")
    split = train(data, tmp_path / "out", skip_bad_cases=True, context_size=1, val_context_size=1)
    assert sorted(name for sets in split.values() for name in sets.get(data.name, [])) == NAMES[1:]


def test_conversion_names_links_to_nothing(write_nifti, tmp_path, capsys):
    for i, name in enumerate(("s1", "s2")):
        write_nifti(tmp_path / "raw" / f"{name}_img.nii.gz", np.random.default_rng(i).random((8, 9, 10), np.float32))
        write_nifti(tmp_path / "raw" / f"{name}_gt.nii.gz", np.ones((8, 9, 10), np.uint8))
    for path in (tmp_path / "raw" / "s2_img.nii.gz", tmp_path / "raw" / "s2_gt.nii.gz"):
        path.unlink()
        path.symlink_to("nowhere")
    for dry_run in (True, False):
        with pytest.raises(DatasetError, match="(?s)1 of 2 cases.*s2: s2_img.nii.gz is a link to nothing"):
            prepare_data(str(tmp_path / "raw"), str(tmp_path / "data"), "My", dry_run=dry_run)


# --- fMRIPrep


@pytest.fixture
def fmriprep(write_nifti, tmp_path):
    for subject in ("01", "02", "03"):
        image = np.random.default_rng(int(subject)).integers(1, 900, (10, 12, 10)).astype(np.int16)
        label = (image > 600).astype(np.uint8)
        raw = tmp_path / "bids" / f"sub-{subject}" / "anat"
        made = tmp_path / "bids" / "derivatives" / "fmriprep" / f"sub-{subject}" / "anat"
        write_nifti(raw / f"sub-{subject}_T1w.nii.gz", image)
        write_nifti(made / f"sub-{subject}_desc-preproc_T1w.nii.gz", image)
        for entities in ("", "desc-aseg_", "desc-aparcaseg_"):
            write_nifti(made / f"sub-{subject}_{entities}dseg.nii.gz", label * (1 + len(entities)))
        coarse = np.diag([2.0, 2, 2, 1])
        mni = f"sub-{subject}_space-MNI152NLin2009cAsym"
        write_nifti(made / f"{mni}_desc-preproc_T1w.nii.gz", image[:8, :8, :8], coarse)
        write_nifti(made / f"{mni}_dseg.nii.gz", label[:8, :8, :8], coarse)
    return tmp_path / "bids"


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {
            "image_pattern": "derivatives/fmriprep/*_desc-preproc_T1w.nii.gz",
            "mask_pattern": "derivatives/fmriprep/*_dseg.nii.gz",
        },
    ],
)
def test_fmriprep_by_the_documented_command(fmriprep, tmp_path, patterns):
    prepare_data(str(fmriprep), str(tmp_path / "data"), "Prep", source="bids", **patterns)
    (dataset,) = find_datasets(tmp_path / "data")
    cases = dataset.cases()
    assert [case["case"] for case in cases] == ["sub-01", "sub-02", "sub-03"] and list(dataset.classes) == ["label1"]
    for case in cases:
        assert nib.load(case["image"]).shape == nib.load(case["label"]).shape == (10, 12, 10)


# --- subjects


def subjects(split, part):
    return {name[:6] for names in split[part].values() for name in names}


def test_sessions_of_a_subject_are_in_one_part(sessions, tmp_path):
    for seed in (0, 1):
        split = train(sessions, tmp_path / str(seed), test_fraction=0.25, seed=seed)
        parts = [subjects(split, part) for part in ("train", "val", "test")]
        assert [len(part) for part in parts] == [3, 1, 2] and len(set.union(*parts)) == 6
        assert sum(len(names) for sets in split.values() for names in sets.values()) == 12


def test_a_pattern_says_what_a_subject_is(make_dataset, tmp_path):
    data = make_dataset(tmp_path, cases=[f"P{subject}v{visit}" for subject in range(4) for visit in range(2)])
    split = train(data, tmp_path / "out", subject_pattern=r"^(P\d)v\d$", val_fraction=0.25)
    assert len(split["train"][data.name]) == 6 and len(split["val"][data.name]) == 2
    assert {name[:2] for name in split["train"][data.name]}.isdisjoint(name[:2] for name in split["val"][data.name])
    with pytest.raises(DatasetError, match="'Q' is found in no case name"):
        train(data, tmp_path / "other", subject_pattern="Q")
    with pytest.raises(ValueError, match="--subject_pattern '\\(' is not a valid pattern"):
        normalise("subject_pattern", "(")


@pytest.mark.parametrize("part", ["train", "test"])
def test_no_context_is_of_the_targets_subject_under_a_split(sessions, infer, tmp_path, part):
    name = sessions.name  # drawn by case, as other programs do: subjects 1 and 2 are in several parts
    train_cases = [f"sub-0{i}_ses-a" for i in (1, 2, 3, 4)] + ["sub-04_ses-b"]
    split = {"train": {name: train_cases}, "val": {}, "test": {name: ["sub-01_ses-b", "sub-02_ses-b", "sub-05_ses-a"]}}
    (tmp_path / "splits.json").write_text(json.dumps(split))
    report = infer(
        sessions, sessions, split_file=str(tmp_path / "splits.json"), context_size=8, target_split=part, self_test=True
    )
    assert set(report["cases"]) == set(split[part][name])
    for target, found in report["cases"].items():
        for used in found["contexts"].values():
            assert {context for context in train_cases if context[:6] != target[:6]} == set(used)
    said = report["cases"]["sub-01_ses-b" if part == "test" else "sub-04_ses-b"]["warnings"]
    assert any("own subject" in text for text in said)


def test_without_a_split_an_earlier_scan_of_the_subject_is_a_context(sessions, infer):
    target = sessions / "imagesTr" / "sub-01_ses-b_0000.nii.gz"
    (found,) = infer(target, sessions, context_size=12)["cases"].values()
    assert all("sub-01_ses-a" in used and "sub-01_ses-b" not in used for used in found["contexts"].values())


# --- nnU-Net's split


def test_folds_of_nnunet_in_training_and_inference(root, infer, tmp_path):
    folds = [{"train": ["c0", "c1", "c2"], "val": ["c3"]}, {"train": ["c1", "c2", "c3"], "val": ["c0"]}]
    path = tmp_path / "splits_final.json"
    path.write_bytes(BOM + json.dumps(folds).encode())
    data = copied(root, tmp_path)
    (data / "imagesTs").mkdir()
    shutil.copy(images(root)[0], data / "imagesTs" / "other_0000.nii.gz")
    split = train(data, tmp_path / "run", split_file=str(path), fold="1")
    assert split == {"train": {data.name: ["c1", "c2", "c3"]}, "val": {data.name: ["c0"]}, "test": {}}
    options = {"split_file": str(path), "context_size": 3}
    report = infer(data, data, fold=1, **options)
    assert set(report["cases"]) == {"c0"} and report["contexts"] == ["c1", "c2", "c3"]
    report = infer(data, data, fold=0, overwrite=True, **options)
    assert "c3" in report["cases"] and report["contexts"] == ["c0", "c1", "c2"]
    with pytest.raises(DatasetError, match="2 folds: choose one with --fold 0 to 1"):
        infer(data, data, overwrite=True, **options)
    with pytest.raises(DatasetError, match="no 'test' cases"):
        infer(data, data, overwrite=True, fold=0, target_split="test", **options)
    with pytest.raises(ValueError, match="--fold goes with --split_file"):
        train(data, tmp_path / "none", fold=0)


# --- running numbers


def test_running_numbers_are_scans_of_their_own(root, infer, tmp_path, capsys):
    targets = tmp_path / "imagesTs"
    targets.mkdir()
    for i, path in enumerate(images(root)[:3]):
        shutil.copy(path, targets / f"Img_000{i}.nii.gz")
    report = infer(targets, root)
    assert set(report["cases"]) == {"Img_0000", "Img_0001", "Img_0002"}
    assert "Img_0000 to 0002 are taken for scans of their own" in capsys.readouterr().out


def test_channels_that_are_left_out_are_counted(root, infer, tmp_path, capsys):
    targets = tmp_path / "imagesTs"
    targets.mkdir()
    for name, path in zip(("a_0000", "a_0001", "b_0000", "c_0001"), images(root), strict=True):
        shutil.copy(path, targets / f"{name}.nii.gz")
    assert set(infer(targets, root)["cases"]) == {"a", "b"}
    said = capsys.readouterr().out
    assert re.search("2 of 4 images are of channel 0000; 2 .* left out, and with them all of c", said)


def test_channels_of_one_case_are_known_by_its_dataset(root, infer, tmp_path):
    data = tmp_path / "Dataset002_Two"
    (data / "imagesTs").mkdir(parents=True)
    (data / "dataset.json").write_bytes(BOM + json.dumps({"channel_names": {"0": "T1", "1": "T2"}}).encode())
    for i, path in enumerate(images(root)[:2]):
        shutil.copy(path, data / "imagesTs" / f"one_000{i}.nii.gz")
    assert set(infer(data, root)["cases"]) == {"one"}
    (data / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}}))
    assert {"one_0000", "one_0001"} <= set(infer(data, root)["cases"])


# --- JSON


def test_a_byte_order_mark_everywhere(root, infer, tmp_path):
    data = copied(root, tmp_path)
    description = data / "dataset.json"
    description.write_bytes(BOM + description.read_bytes())
    rows = tmp_path / "rows.json"
    rows.write_bytes(BOM + json.dumps({"rows": [{"dataset": data.name}]}).encode())
    split = train(data, tmp_path / "run", collection_file=str(rows))
    splits = tmp_path / "splits.json"
    splits.write_bytes(BOM + json.dumps(split | {"test": {data.name: [split["train"][data.name].pop()]}}).encode())
    assert infer(data, data, split_file=str(splits))["cases"]
    pairs = [{"image": str(i), "label": str(n)} for i, n in zip(images(data), images(data, "labelsTr"), strict=True)]
    (tmp_path / "pairs.json").write_bytes(BOM + json.dumps(pairs).encode())
    options = {"context_dir": None, "context_file": str(tmp_path / "pairs.json"), "overwrite": True}
    assert infer(images(root)[0], "", **options)["contexts"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"labels": {"a": 1, "a": 2}}', b"[]", b"\xff\xfe"])
def test_a_faulty_description_is_named_in_one_line(root, infer, tmp_path, content):
    data = copied(root, tmp_path)
    (data / "dataset.json").write_bytes(content)
    with pytest.raises(DatasetError, match=r"dataset\.json") as caught:
        infer(images(root)[0], data)
    assert "\n" not in str(caught.value)


# --- a lost split


def test_a_run_whose_split_is_lost_is_not_resumed_on_another(root, make_dataset, tmp_path):
    data, out = copied(root, tmp_path), tmp_path / "run"
    options = {"test_fraction": 0.25, "context_size": 1, "val_context_size": 1}
    split = train(data, out, **options)
    kept = (out / "stage1" / "splits.json").read_bytes()
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        source = make_dataset(tmp_path / "more", cases=["added"], seed=9) / folder / f"added{ending}"
        shutil.copy(source, data / folder / f"added{ending}")
    (out / "stage1" / "splits.json").unlink()
    weights = (out / "stage1" / "last.pt").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"stage1/splits\.json: the split of the run to resume is lost"):
        train(data, out, resume=True, epochs=2, **options)
    with pytest.raises(FileNotFoundError, match=r"stage1/splits\.json .*--split_file None"):
        run_workflow("train_stage2", dataset_dir=str(data), output_dir=str(out), **(SMALL | {"channels": None}))
    assert (out / "stage1" / "last.pt").read_bytes() == weights and not (out / "stage1" / "splits.json").exists()
    (out / "stage1" / "splits.json").write_bytes(kept)
    assert train(data, out, resume=True, epochs=2, **options) == split  # the added case is not used
