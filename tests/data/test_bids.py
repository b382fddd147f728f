"""BIDS folders: subjects, sessions, runs, and masks in derivatives."""

from __future__ import annotations

import pytest

from scripts.data.bids import pair_bids
from scripts.data.nnunet import DatasetError


@pytest.fixture
def bids(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / "bids" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return tmp_path / "bids"

    return make


def pairs(root, images=("*_T1w.nii.gz",), mask="*_dseg.nii.gz"):
    return {
        case.case: ([i.path.name for i in case.images], case.mask.name if case.mask else None, case.problems)
        for case in pair_bids(root, images, mask).cases
    }


def test_subjects_and_sessions(bids):
    root = bids(
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii",
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.json",
        "sub-01/ses-b/func/sub-01_ses-b_bold.nii.gz",
        "sub-02/anat/sub-02_acq-mprage_T1w.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "derivatives/pipe/sub-01/ses-a/anat/sub-01_ses-a_space-orig_dseg.nii.gz",
        "derivatives/pipe/sub-01/ses-b/anat/sub-01_ses-b_dseg.nii.gz",
        "derivatives/manual/v1/sub-02/anat/sub-02_desc-x_dseg.nii.gz",
        "derivatives/pipe/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
    )
    assert pairs(root) == {
        "sub-01_ses-a": (["sub-01_ses-a_T1w.nii.gz"], "sub-01_ses-a_space-orig_dseg.nii.gz", ()),
        "sub-01_ses-b": (["sub-01_ses-b_T1w.nii"], "sub-01_ses-b_dseg.nii.gz", ()),
        "sub-02": (["sub-02_acq-mprage_T1w.nii.gz"], "sub-02_desc-x_dseg.nii.gz", ()),
    }


def test_two_channels_and_their_names(bids):
    root = bids("sub-1/anat/sub-1_T1w.nii", "sub-1/anat/sub-1_acq-hi_T2w.nii", "derivatives/sub-1/anat/sub-1_mask.nii")
    patterns = ["*_T2w.nii.gz", "*_T1w.nii.gz"]
    assert pairs(root, patterns, "*_mask.nii.gz") == {
        "sub-1": (["sub-1_acq-hi_T2w.nii", "sub-1_T1w.nii"], "sub-1_mask.nii", ())
    }
    assert pair_bids(root, patterns, "*_mask.nii.gz").channel_names == ("T2w", "T1w")


def test_a_single_run_needs_no_run_in_the_masks_name(bids):
    root = bids(
        "sub-1/anat/sub-1_run-1_T1w.nii.gz",
        "derivatives/sub-1/anat/sub-1_dseg.nii.gz",
        "sub-2/anat/sub-2_run-3_T1w.nii.gz",
        "derivatives/sub-2/anat/sub-2_run-3_dseg.nii.gz",
    )
    assert set(pairs(root)) == {"sub-1", "sub-2_run-3"}  # the entities that image and mask share
    assert not any(problems for *_, problems in pairs(root).values())


def test_several_runs_are_cases_of_their_own(bids):
    root = bids(
        "sub-1/anat/sub-1_run-1_T1w.nii.gz",
        "sub-1/anat/sub-1_run-2_T1w.nii.gz",
        "derivatives/sub-1/anat/sub-1_run-1_dseg.nii.gz",
        "derivatives/sub-1/anat/sub-1_dseg.nii.gz",
    )
    found = pairs(root)
    assert found["sub-1_run-1"][1] == "sub-1_run-1_dseg.nii.gz" and not found["sub-1_run-1"][2]
    assert "no mask" in found["sub-1_run-2"][2][0]
    assert "no image" in found["sub-1"][2][0] and "sub-1_dseg.nii.gz" in found["sub-1"][2][0]


def test_ambiguity_is_named_and_solved_by_a_pattern(bids):
    root = bids(
        "sub-1/anat/sub-1_acq-a_T1w.nii.gz",
        "sub-1/anat/sub-1_acq-b_T1w.nii.gz",
        "derivatives/one/sub-1/anat/sub-1_dseg.nii.gz",
        "derivatives/two/sub-1/anat/sub-1_space-MNI_dseg.nii.gz",
    )
    image, mask = pairs(root)["sub-1"][2]
    assert "sub-1_acq-a_T1w.nii.gz" in image and "sub-1_acq-b_T1w.nii.gz" in image
    assert "derivatives/one" in mask and "derivatives/two" in mask
    solved = pairs(root, ["*_acq-b_T1w.nii.gz"], "derivatives/one/*_dseg.nii.gz")
    assert solved == {"sub-1": (["sub-1_acq-b_T1w.nii.gz"], "sub-1_dseg.nii.gz", ())}


def test_images_of_a_pipeline(bids):
    root = bids("sub-1/anat/sub-1_T1w.nii.gz", "derivatives/fp/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz")
    found = pairs(root, ["derivatives/fp/*_desc-preproc_T1w.nii.gz"], None)
    assert found == {"sub-1": (["sub-1_desc-preproc_T1w.nii.gz"], None, ())}


def test_nothing_found_is_said(bids, tmp_path):
    root = bids("sub-1/anat/sub-1_T1w.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"--mask_pattern '\*_dseg.nii.gz'; None"):
        pairs(root)
    with pytest.raises(FileNotFoundError, match=r"--image_pattern '\*_FLAIR.nii.gz'"):
        pairs(root, ["*_FLAIR.nii.gz"], None)
    with pytest.raises(DatasetError, match="no sub-"):
        pairs(tmp_path)
