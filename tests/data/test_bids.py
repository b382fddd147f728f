"""BIDS datasets by their names: parts, order, choice of scans, filters, tables of label names."""

from __future__ import annotations

import json

import pytest

from scripts.data.bids import (
    file_name,
    find_scans,
    label_names,
    pair_with_scans,
    read_filters,
    read_name,
    same_names,
)
from scripts.data.nnunet import DatasetError
from tests.bids_trees import labels_are_texts, plain, sessions


def names(scans):
    return [scan.path.name.split(".")[0] for scan in scans]


def test_a_name_s_parts_and_their_order():
    file = read_name("sub-010_ses-pre_acq-hi_run-01_T1w.nii.gz")
    assert file.entities == {"sub": "010", "ses": "pre", "acq": "hi", "run": "01"} and file.suffix == "T1w"
    made = file_name(
        {"desc": "icl", "space": "orig", "label": "L"} | dict(reversed(file.entities.items())), "probseg", ""
    )
    assert made == "sub-010_ses-pre_acq-hi_run-01_space-orig_label-L_desc-icl_probseg"
    for odd in ("T1w.nii.gz", "sub-1_T1w.json", "sub-1__T1w.nii.gz", "sub-a/b_T1w", "sub-1_T1w copy.nii.gz"):
        assert read_name(odd) is None, odd


def test_subjects_are_texts_and_may_have_their_prefix(tmp_path):
    root = labels_are_texts(tmp_path)
    assert names(find_scans(root, ["1"])) == ["sub-1_acq-highres_T1w"]
    assert names(find_scans(root, ["sub-010"])) == ["sub-010_acq-fast_T1w", "sub-010_acq-highres_T1w"]
    with pytest.raises(DatasetError, match="has no subject 10, 001; it has 01, 010, 1"):
        find_scans(root, ["10", "01", "001"])


def test_sessions_suffixes_and_what_there_is(tmp_path):
    root = sessions(tmp_path)
    assert len(find_scans(root)) == 7
    assert names(find_scans(root, ["02"], ["ses-2"])) == ["sub-02_ses-2_run-1_T1w"]
    with pytest.raises(DatasetError, match="has no session 3; it has 1, 2"):
        find_scans(root, sessions=["3"])
    with pytest.raises(FileNotFoundError, match="no scan has suffix T2w, .*there are T1w"):
        find_scans(root, suffix="T2w")
    with pytest.raises(DatasetError, match="holds no sub-"):
        find_scans(tmp_path)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"acquisition": "fast"}, ["sub-010_acq-fast_T1w"]),
        ({"acq": ["fast", "slow"]}, ["sub-010_acq-fast_T1w"]),
        ({"acquisition": "*", "subject": "1"}, ["sub-1_acq-highres_T1w"]),
        ({"subject": "sub-1"}, ["sub-1_acq-highres_T1w"]),
    ],
)
def test_filters(tmp_path, query, found):
    root, path = labels_are_texts(tmp_path), tmp_path / "filter.json"
    path.write_text(json.dumps({"t1w": query, "bold": {"task": "rest"}}))
    assert names(find_scans(root, filters=read_filters(path))) == found


@pytest.mark.parametrize("content", [{"t1w": {"run": 1}}, {"t1w": {"colour": "red"}}, {"bold": {}}, {"t1w": []}])
def test_filters_that_make_no_sense_are_refused(tmp_path, content):
    (tmp_path / "filter.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="filter.json"):
        read_filters(tmp_path / "filter.json")


def test_masks_go_with_the_scan_of_their_acquisition_and_grid():
    def files(*stems):
        return [read_name(f"/x/{stem}.nii.gz") for stem in stems]

    scans = files(
        "sub-1_acq-a_T1w", "sub-1_acq-b_T1w", "sub-1_acq-a_space-MNI_T1w", "sub-2_run-1_T1w", "sub-2_run-2_T1w"
    )
    (mask,) = files("sub-1_acq-b_space-orig_desc-icl_dseg")
    assert names([pair_with_scans([mask], scans)[0][0][1]]) == ["sub-1_acq-b_T1w"]
    (resampled,) = files("sub-1_space-MNI_dseg")
    assert names([pair_with_scans([resampled], scans)[0][0][1]]) == ["sub-1_acq-a_space-MNI_T1w"]
    with pytest.raises(DatasetError, match="sub-2_dseg.nii.gz could be of .*run-1.* or .*run-2"):
        pair_with_scans(files("sub-2_dseg"), scans)
    pairs, alone = pair_with_scans([mask, *files("sub-3_dseg")], scans)
    assert len(pairs) == 1 and names(alone) == ["sub-3_dseg"]


def test_label_names_are_inherited_the_nearest_first(tmp_path):
    masks = plain(tmp_path) / "derivatives" / "manual"
    mask = masks / "sub-01" / "anat" / "sub-01_dseg.nii.gz"
    assert label_names(mask, masks) == {1: "Left-Caudate", 2: "Right-Caudate"}
    (mask.parent / "sub-01_dseg.tsv").write_bytes(b"\xef\xbb\xbfindex\tname\tcolor\r\n7\tL\t#fff\r\n")
    (mask.parent / "sub-01_desc-x_dseg.tsv").write_text("index\tname\n9\tof another\n")
    assert label_names(mask, masks) == {7: "L"}
    (mask.parent / "sub-01_dseg.tsv").write_text("number\tname\n1\tL\n")
    with pytest.raises(DatasetError, match=r"sub-01_dseg.tsv: expected the columns index"):
        label_names(mask, masks)


def test_one_number_of_two_names_is_refused():
    assert same_names([{1: "a"}, {}, {2: "b", 1: "a"}]) == {1: "a", 2: "b"}
    with pytest.raises(DatasetError, match="label 1 of the examples is 'a' in one table and 'b' in another"):
        same_names([{1: "a"}, {1: "b"}])
