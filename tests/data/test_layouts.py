"""What a path holds, told by looking."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.data.layouts import look_for_examples, look_for_scans
from scripts.data.nnunet import DatasetError
from tests.bids_trees import NAMES, labels_are_texts, plain, sessions


@pytest.fixture
def touch(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def pairs(found):
    stem = [
        path.rpartition("/")[2].split(".")[0]
        for path in (*found.options["context_images"], *found.options["context_labels"])
    ]
    return list(zip(stem[: len(stem) // 2], stem[len(stem) // 2 :], strict=True))


def test_scans(touch, make_dataset, tmp_path):
    folder = touch("scans/a.nii.gz", "scans/b.nii", "scans/notes.txt") / "scans"
    assert look_for_scans([str(folder)])[:2] == ({"dataset_dir": str(folder)}, "a folder of 2 images")
    one = str(folder / "a.nii.gz")
    assert look_for_scans([one])[:2] == ({"dataset_dir": one}, "one file")
    both = [one, str(folder / "b.nii")]
    assert look_for_scans(both)[:2] == ({"target_images": both}, "2 files")
    dataset = make_dataset(tmp_path)
    assert look_for_scans([str(dataset)]).what == "imagesTr of an nnU-Net dataset"
    assert look_for_scans([str(dataset / "imagesTr")]).what == "imagesTr of an nnU-Net dataset"
    found = look_for_scans([str(plain(tmp_path))])
    assert found.what == "a BIDS dataset with 4 scans *_T1w" and len(found.options["target_images"]) == 4


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["none"], "no file or folder"),
        (["notes.txt"], "is no image"),
        (["empty"], "no images in"),
        (["a", "empty"], "one folder"),
    ],
)
def test_what_holds_no_scans_is_refused(touch, paths, message):
    root = touch("notes.txt", "a/a.nii.gz", "empty/notes.txt")
    with pytest.raises((ValueError, OSError), match=message):
        look_for_scans([str(root / path) for path in paths])


@pytest.mark.parametrize(
    "names",
    [
        ("01.nii.gz", "01_seg.nii.gz", "02.nii.gz", "02_seg.nii.gz"),
        ("01_img.nii.gz", "01_label.nii.gz", "02_img.nii.gz", "02_label.nii.gz"),
        ("01_T1w.nii.gz", "01_T1w_mask.nii.gz", "02_T1w.nii.gz", "02_T1w_mask.nii.gz"),
        ("01_0000.nii.gz", "01_0001.nii.gz", "01_gt.nii", "02_0000.nii.gz", "02_gt.nii"),
    ],
)
def test_pairs_by_name(touch, names):
    root = touch(*(f"pairs/{name}" for name in names)) / "pairs"
    found = look_for_examples([str(root)])
    assert [(image[:2], label[:2]) for image, label in pairs(found)] == [("01", "01"), ("02", "02")]
    assert all(label.endswith(("seg", "label", "mask", "gt")) for _, label in pairs(found))
    assert found.what == "files paired by name, 2 pairs"
    listed = [str(root / name) for name in reversed(names)]
    assert look_for_examples(listed).options == found.options


def test_two_folders_nnunet_and_a_list(touch, make_dataset, tmp_path):
    root = touch("set/images/a.nii.gz", "set/labels/a.nii.gz", "pairs.json") / "set"
    wanted = {"context_images": [str(root / "images")], "context_labels": [str(root / "labels")]}
    assert look_for_examples([str(root)]).options == wanted
    assert look_for_examples([str(root / "images"), str(root / "labels")]).options == wanted
    found = look_for_examples([str(make_dataset(tmp_path))])
    assert found.names == {1: "first", 2: "second"} and "context_dir" in found.options
    assert look_for_examples([str(tmp_path / "pairs.json")]).options == {"context_file": str(tmp_path / "pairs.json")}


def test_a_derivative_finds_its_scans_and_names(tmp_path):
    root = plain(tmp_path)
    found = look_for_examples([str(root / "derivatives" / "manual")])
    assert pairs(found) == [(f"sub-0{i}_T1w", f"sub-0{i}_dseg") for i in (1, 2, 3)] and found.names == NAMES
    assert look_for_examples([str(root)]).options == found.options
    flair = look_for_examples([str(root)], suffix="FLAIR")
    assert pairs(flair) == [("sub-02_FLAIR", "sub-02_dseg")] and "(2 without a scan left out)" in flair.what
    (root / "derivatives" / "manual").rename(tmp_path / "elsewhere")
    assert len(pairs(look_for_examples([str(tmp_path / "elsewhere")], raw=root))) == 3
    with pytest.raises(DatasetError, match=r"elsewhere: no \*_T1w of its label maps"):
        look_for_examples([str(tmp_path / "elsewhere")])


def test_a_derivative_with_scans_of_its_own_and_several_acquisitions(tmp_path):
    sessions(tmp_path)
    found = look_for_examples([str(tmp_path / "examples")])
    assert pairs(found)[0] == ("sub-a_desc-preproc_T1w", "sub-a_desc-aseg_dseg") and found.names == NAMES
    found = look_for_examples([str(labels_are_texts(tmp_path))])
    assert ("sub-010_acq-highres_T1w", "sub-010_acq-highres_dseg") in pairs(found) and len(pairs(found)) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("p/a.nii.gz", "p/b.nii.gz"), "no partner for a.nii.gz, b.nii.gz"),
        (("p/a.nii.gz", "p/a_img.nii.gz", "p/a_seg.nii.gz"), "more than one partner among"),
        (("p/x/a.nii.gz", "p/y/a.nii.gz"), "no example pairs"),
        (("p/notes.txt",), "no example pairs"),
        (("p/sub-1/anat/sub-1_T1w.nii.gz",), r"holds no label maps \*_dseg.nii.gz"),
    ],
)
def test_what_cannot_be_paired_is_refused(touch, names, message):
    with pytest.raises(DatasetError, match=message) as caught:
        look_for_examples([str(touch(*names) / "p")])
    assert "give an nnU-Net dataset" in str(caught.value) and "\n" not in str(caught.value)


def test_label_maps_of_a_derivative_that_has_several_are_chosen(tmp_path, write_nifti):
    masks = plain(tmp_path) / "derivatives" / "manual"
    for subject in ("01", "02"):
        write_nifti(
            masks / f"sub-{subject}" / "anat" / f"sub-{subject}_desc-thick_dseg.nii.gz", np.ones((4, 4, 4), np.uint8)
        )
    assert len(pairs(look_for_examples([str(masks)]))) == 3
    found = look_for_examples([str(masks)], mask_pattern="*_desc-thick_dseg.nii.gz")
    assert pairs(found) == [(f"sub-0{i}_T1w", f"sub-0{i}_desc-thick_dseg") for i in (1, 2)]
    for subject in ("01", "02", "03"):
        (masks / f"sub-{subject}" / "anat" / f"sub-{subject}_dseg.nii.gz").rename(
            masks / f"sub-{subject}" / "anat" / f"sub-{subject}_desc-thin_dseg.nii.gz"
        )
    with pytest.raises(DatasetError, match="--mask_pattern .* there are desc-thick .2 files., desc-thin .3 files."):
        look_for_examples([str(masks)])
