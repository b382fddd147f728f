"""BIDS folders: subjects, sessions, runs, and masks in derivatives."""

from __future__ import annotations

import pytest

from scripts.data.conversion.bids import pair_bids
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
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "derivatives/pipe/sub-01/ses-a/anat/sub-01_ses-a_dseg.nii.gz",
        "derivatives/pipe/sub-01/ses-b/anat/sub-01_ses-b_dseg.nii.gz",
        "derivatives/manual/v1/sub-02/anat/sub-02_dseg.nii.gz",
        "derivatives/pipe/sub-02/anat/sub-02_desc-preproc_T1w.nii.gz",
    )
    assert pairs(root) == {
        "sub-01_ses-a": (["sub-01_ses-a_T1w.nii.gz"], "sub-01_ses-a_dseg.nii.gz", ()),
        "sub-01_ses-b": (["sub-01_ses-b_T1w.nii"], "sub-01_ses-b_dseg.nii.gz", ()),
        "sub-02": (["sub-02_T1w.nii.gz"], "sub-02_dseg.nii.gz", ()),
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
        "sub-1/anat/sub-1_T1w.nii.gz",
        "sub-1/anat/sub-1_T1w.nii",
        "derivatives/one/sub-1/anat/sub-1_dseg.nii.gz",
        "derivatives/two/sub-1/anat/sub-1_dseg.nii.gz",
    )
    image, mask = pairs(root)["sub-1"][2]
    assert "sub-1_T1w.nii.gz" in image and "sub-1_T1w.nii" in image
    assert "derivatives/one" in mask and "derivatives/two" in mask
    (root / "sub-1/anat/sub-1_T1w.nii").unlink()
    assert pairs(root, mask="derivatives/one/*_dseg.nii.gz") == {
        "sub-1": (["sub-1_T1w.nii.gz"], "sub-1_dseg.nii.gz", ())
    }


FMRIPREP = [
    "sub-{0}/anat/sub-{0}_T1w.nii.gz",
    *(
        f"derivatives/fmriprep/sub-{{0}}/anat/sub-{{0}}_{name}.nii.gz"
        for name in (
            "desc-preproc_T1w", "desc-brain_mask", "dseg", "desc-aseg_dseg", "desc-aparcaseg_dseg",
            "space-MNI152NLin2009cAsym_desc-preproc_T1w", "space-MNI152NLin2009cAsym_dseg",
            "space-MNI152NLin2009cAsym_res-2_desc-preproc_T1w", "space-MNI152NLin2009cAsym_res-2_dseg",
        )
    ),
]  # fmt: skip


def test_entities_that_a_pattern_does_not_name_are_absent(bids):
    root = bids(*(name.format(subject) for subject in ("01", "02") for name in FMRIPREP))
    raw = {f"sub-{s}": ([f"sub-{s}_T1w.nii.gz"], f"sub-{s}_dseg.nii.gz", ()) for s in ("01", "02")}
    assert pairs(root) == raw
    folder = "derivatives/fmriprep/"
    found = pairs(root, [f"{folder}*_desc-preproc_T1w.nii.gz"], f"{folder}*_desc-aseg_dseg.nii.gz")
    assert found["sub-01"] == (["sub-01_desc-preproc_T1w.nii.gz"], "sub-01_desc-aseg_dseg.nii.gz", ())
    for space in ("space-MNI152NLin2009cAsym", "space-*", "space-MNI*"):
        patterns = [f"{folder}*_{space}_desc-preproc_T1w.nii.gz"], f"{folder}*_{space}_dseg.nii.gz"
        image, mask, problems = pairs(root, *patterns)["sub-02"]
        assert image == ["sub-02_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz"] and not problems
        assert mask == "sub-02_space-MNI152NLin2009cAsym_dseg.nii.gz"


def test_a_pipelines_own_folder_as_root(bids):
    root = bids(*(name.format("01") for name in FMRIPREP)) / "derivatives" / "fmriprep"
    found = pairs(root, ["*_desc-preproc_T1w.nii.gz"])
    assert found == {"sub-01": (["sub-01_desc-preproc_T1w.nii.gz"], "sub-01_dseg.nii.gz", ())}


def test_an_entity_that_all_have_need_not_be_named(bids):
    root = bids(
        *(f"sub-{s}/anat/sub-{s}_acq-mprage_T1w.nii.gz" for s in "12"),
        *(f"derivatives/manual/sub-{s}/anat/sub-{s}_desc-final_dseg.nii.gz" for s in "12"),
    )
    assert set(pairs(root)) == {"sub-1", "sub-2"} and not any(problems for *_, problems in pairs(root).values())


@pytest.mark.parametrize("masks", [("desc-a", "desc-b"), ("space-MNI",), ("desc-a", "res-2_desc-a")])
def test_entities_that_have_to_be_named(bids, masks):
    names = (f"derivatives/p/sub-{s}/anat/sub-{s}_{mask}_dseg.nii.gz" for s in "12" for mask in masks)
    root = bids("sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-2_T1w.nii.gz", *names)
    with pytest.raises(DatasetError, match="--mask_pattern .*further entities") as caught:
        pairs(root)
    assert all(f"{mask} (2 files)" in str(caught.value) for mask in masks) and "\n" not in str(caught.value)
    assert pairs(root, mask=f"*_{masks[0]}_dseg.nii.gz")["sub-2"][1] == f"sub-2_{masks[0]}_dseg.nii.gz"


def test_a_subject_that_has_other_entities_is_not_lost(bids):
    root = bids(
        "sub-1/anat/sub-1_T1w.nii.gz",
        "derivatives/sub-1/anat/sub-1_dseg.nii.gz",
        "sub-2/anat/sub-2_acq-fast_T1w.nii.gz",
        "derivatives/sub-2/anat/sub-2_desc-x_dseg.nii.gz",
        "sub-3/anat/sub-3_T1w.nii.gz",
        "derivatives/sub-3/anat/sub-3_space-MNI_dseg.nii.gz",
    )
    found = pairs(root)
    assert not found["sub-1"][2]
    assert "sub-2_acq-fast_T1w.nii.gz: entities that the pattern '*_T1w.nii.gz' does not name" in found["sub-2"][2][0]
    assert "no mask" in found["sub-3"][2][0]


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
