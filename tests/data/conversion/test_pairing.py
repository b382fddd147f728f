"""Which files make up a case, and what is said where that is not clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.data.conversion.pairing import (
    ImageFile,
    RawCase,
    case_name,
    channel_names_of,
    make_cases,
    mark_clashes,
    match,
    pair_files,
    pairing_table,
)


@pytest.fixture
def raw(tmp_path):
    """``raw(*names)``: a folder with empty files."""

    def make(*names):
        for name in names:
            path = tmp_path / "raw" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        return tmp_path / "raw"

    return make


def paired(root, images=("*_img.nii.gz",), mask="*_gt.nii.gz"):
    """Case -> names of its images and mask within the folder."""
    dataset = pair_files(root, images, mask)
    assert not any(case.problems for case in dataset.cases), dataset.cases
    files = {c.case: [*(i.path for i in c.images), *([c.mask] if c.mask else [])] for c in dataset.cases}
    return {case: tuple(str(path.relative_to(root)) for path in paths) for case, paths in files.items()}


def faults(root, images=("*_img.nii.gz",), mask="*_gt.nii.gz"):
    return {case.case: " | ".join(case.problems) for case in pair_files(root, images, mask).cases if case.problems}


# --- patterns


@pytest.mark.parametrize(
    ("pattern", "path", "key"),
    [
        ("*_img.nii.gz", "a_img.nii.gz", ("a",)),
        ("*_img.nii.gz", "site/x/a_img.nii.gz", ("site", "x", "a")),
        ("images/*.nii.gz", "images/a.nii.gz", ("a",)),
        ("images/*.nii.gz", "site/images/a.nii.gz", ("site", "a")),
        ("images/*.nii.gz", "masks/a.nii.gz", None),
        ("images/*.nii.gz", "images/site/a.nii.gz", None),
        ("*/t1.nii.gz", "a/t1.nii.gz", ("a",)),
        ("t1.nii.gz", "a/t1.nii.gz", ("a",)),
        ("t1.nii.gz", "t1.nii.gz", None),
        ("*_t1.nii.gz", "_t1.nii.gz", None),
        ("*_t1.nii.gz", "a_t1ce.nii.gz", None),
        ("*_t1.nii.gz", "a_t1xniixgz", None),
        ("s*_v*.nii", "s1_v2.nii", ("1", "2")),
    ],
)
def test_what_a_pattern_matches(pattern, path, key):
    assert match(pattern, Path(path).parts) == key


@pytest.mark.parametrize("pattern", ["/abs/*.nii.gz", "../*.nii.gz", "a/../*.nii", "**/*.nii.gz", "", "a//*.nii"])
def test_patterns_that_cannot_work_are_refused(raw, pattern):
    with pytest.raises(ValueError, match="within --input_dir"):
        pair_files(raw("a.nii"), [pattern], None)


def test_a_pattern_given_twice_is_refused(raw):
    with pytest.raises(ValueError, match="given twice"):
        pair_files(raw("a.nii"), ["*.nii"], "*.nii")


def test_names_of_channels_come_from_the_patterns():
    assert channel_names_of(["*_img.nii.gz"]) == ("MRI",)
    assert channel_names_of(["*_t1.nii.gz", "*_t2.nii.gz"]) == ("t1", "t2")
    assert channel_names_of(["T1/*.nii.gz", "T2/*.nii.gz"]) == ("T1", "T2")


# --- pairs


def test_images_and_masks_side_by_side(raw):
    root = raw("a_img.nii.gz", "a_gt.nii.gz", "b_img.nii.gz", "b_gt.nii.gz", "notes.txt")
    assert paired(root) == {"a": ("a_img.nii.gz", "a_gt.nii.gz"), "b": ("b_img.nii.gz", "b_gt.nii.gz")}


def test_sub_folders_are_part_of_the_case(raw):
    root = raw("x/1_img.nii.gz", "x/1_gt.nii.gz", "y/1_img.nii.gz", "y/1_gt.nii.gz")
    assert set(paired(root)) == {"x_1", "y_1"}


def test_images_and_masks_in_folders_of_their_own(raw):
    root = raw("images/1.nii.gz", "masks/1.nii.gz", "images/2.nii.gz", "masks/2.nii.gz")
    found = paired(root, ["images/*.nii.gz"], "masks/*.nii.gz")
    assert found["2"] == ("images/2.nii.gz", "masks/2.nii.gz") and set(found) == {"1", "2"}


def test_one_folder_per_case(raw):
    found = paired(raw("s1/t1.nii", "s1/seg.nii", "s2/t1.nii", "s2/seg.nii"), ["t1.nii"], "*/seg.nii")
    assert found == {"s1": ("s1/t1.nii", "s1/seg.nii"), "s2": ("s2/t1.nii", "s2/seg.nii")}


def test_a_folder_that_the_file_repeats_is_not_named_twice(raw):
    assert set(paired(raw("s1/s1_img.nii.gz", "s1/s1_gt.nii.gz", "s1/s10_img.nii.gz", "s1/s10_gt.nii.gz"))) == {
        "s1",
        "s1_s10",
    }


def test_several_channels_in_the_order_of_the_patterns(raw):
    root = raw("a_t1.nii.gz", "a_t2.nii.gz", "a_gt.nii.gz", "a_t1ce.nii.gz")
    dataset = pair_files(root, ["*_t2.nii.gz", "*_t1.nii.gz"], "*_gt.nii.gz")
    assert paired(root, ["*_t2.nii.gz", "*_t1.nii.gz"]) == {"a": ("a_t2.nii.gz", "a_t1.nii.gz", "a_gt.nii.gz")}
    assert dataset.channel_names == ("t2", "t1")


def test_the_longer_pattern_wins(raw):
    found = paired(raw("a.nii.gz", "a_seg.nii.gz"), ["*.nii.gz"], "*_seg.nii.gz")
    assert found == {"a": ("a.nii.gz", "a_seg.nii.gz")}


def test_without_masks(raw):
    assert paired(raw("a_img.nii.gz", "b_img.nii.gz"), mask=None) == {"a": ("a_img.nii.gz",), "b": ("b_img.nii.gz",)}


def test_hidden_files_and_folders_are_left_out(raw):
    root = raw("a_img.nii.gz", "a_gt.nii.gz", "._a_img.nii.gz", ".trash/b_img.nii.gz", "__MACOSX/._a_img.nii.gz")
    assert set(paired(root)) == {"a"}


# --- faults


def test_all_missing_files_are_named_at_once(raw):
    root = raw("a_img.nii.gz", "b_gt.nii.gz", "x/c_img.nii.gz", "d_img.nii.gz", "d_gt.nii.gz")
    found = faults(root)
    assert set(found) == {"a", "b", "x_c"}
    assert "no mask (*_gt.nii.gz) for a_img.nii.gz" in found["a"]
    assert "no image of channel 0000 (*_img.nii.gz) for b_gt.nii.gz" in found["b"]
    assert "x/c_img.nii.gz" in found["x_c"]


def test_a_missing_channel_is_named(raw):
    root = raw("a_t1.nii", "a_t2.nii", "b_t1.nii")
    assert faults(root, ["*_t1.nii", "*_t2.nii"], None) == {"b": "no image of channel 0001 (*_t2.nii) for b_t1.nii"}


def test_several_files_of_one_key_are_ambiguous(tmp_path):
    images = {
        ("a",): [ImageFile(tmp_path / "1.nii"), ImageFile(tmp_path / "2.nii")],
        ("b",): [ImageFile(tmp_path / "3.nii")],
    }
    masks = {("a",): [tmp_path / "4.nii"], ("b",): [tmp_path / "5.nii", tmp_path / "6.nii"]}
    a, b = make_cases(tmp_path, [images], masks, ["*.nii"], "*.nii", remedy="look again")
    assert a.problems == ("several images of channel 0000, look again: 1.nii, 2.nii",)
    assert b.problems == ("several masks, narrow the pattern: 5.nii, 6.nii",)


def test_two_patterns_of_equal_length_leave_a_file_undecided(raw):
    found = faults(raw("aXb.nii", "aXc.nii"), ["a*.nii"], "*b.nii")
    assert found == {"aXb.nii": "aXb.nii is matched by a*.nii and by *b.nii", "Xc": "no mask (*b.nii) for aXc.nii"}


def test_a_pattern_without_a_file_is_refused_with_what_there_is(raw):
    root = raw("a.nii", "b.nii", "c.nii", "d.nii")
    with pytest.raises(FileNotFoundError, match=r"--image_pattern '\*_img.nii.gz'; there are 4 image files: a.nii.*…"):
        pair_files(root, ["*_img.nii.gz"], None)
    with pytest.raises(FileNotFoundError, match=r"--mask_pattern '\*_gt.nii.gz' \(None: there are no masks\)"):
        pair_files(root, ["*.nii"], "*_gt.nii.gz")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="--input_dir"):
        pair_files(tmp_path / "none", ["*.nii"], None)


# --- names


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (("a",), "a"),
        (("site", "a"), "site_a"),
        (("..", "..", "etc", "passwd"), "etc_passwd"),
        (("../../etc/passwd",), "etc_passwd"),
        (("/etc/passwd",), "etc_passwd"),
        (("a\\b",), "a_b"),
        (("a b;rm -rf $HOME\n",), "a_b_rm_-rf_HOME"),
        (("-o",), "o"),
        ((".hidden",), "hidden"),
        (("...",), ""),
        (("é",), "é"),
        (("e\u0301",), "é"),
        (("sub-01", "ses-1"), "sub-01_ses-1"),
        (("v1.2",), "v1.2"),
    ],
)
def test_case_names_are_safe(key, name):
    assert case_name(key) == name


def test_files_that_would_get_one_name_are_told_of_each_other(raw):
    found = faults(raw("a b_img.nii", "a,b_img.nii", "c_img.nii"), ["*_img.nii"], None)
    assert set(found) == {"a_b"} and "a b_img.nii" in found["a_b"] and "a,b_img.nii" in found["a_b"]


def test_names_that_differ_in_case_only_clash():
    root = Path("/raw")
    cases = [RawCase(name, (ImageFile(root / f"{name}.nii"),)) for name in ("Sub1", "sub1", "sub2")]
    marked = mark_clashes(cases, root)
    assert [bool(case.problems) for case in marked] == [True, True, False]
    assert "Sub1.nii" in marked[0].problems[0] and "sub1.nii" in marked[0].problems[0]


def test_a_name_of_nothing_but_separators_is_a_fault(raw):
    assert "no case name can be made of _-__img.nii" in str(faults(raw("_-__img.nii"), ["*_img.nii"], None))


# --- table


def test_table_names_case_channels_and_mask(raw):
    root = raw("a_t1.nii", "a_t2.nii", "a_gt.nii", "long_t1.nii", "long_t2.nii", "long_gt.nii", "c_t1.nii")
    table = pairing_table(pair_files(root, ["*_t1.nii", "*_t2.nii"], "*_gt.nii")).splitlines()
    assert [line.split() for line in table] == [
        ["case", "0000", "t1", "0001", "t2", "mask"],
        ["a", "a_t1.nii", "a_t2.nii", "a_gt.nii"],
        ["long", "long_t1.nii", "long_t2.nii", "long_gt.nii"],
    ]
    assert table[1].index("a_t2.nii") == table[2].index("long_t2.nii") == table[0].index("0001")
