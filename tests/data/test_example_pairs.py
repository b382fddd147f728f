"""Two folders and JSON lists as pairs: what goes with what, and what is refused."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from scripts.data import DatasetError
from scripts.data.example_pairs import context_cases, folder_cases, listed_cases, read_pair_list


@pytest.fixture
def place(write_nifti, tmp_path):
    """``place("images", "a.nii.gz", ...)``: sound files of this folder, each image its own."""
    made = []

    def make(folder, *names):
        for name in names:
            made.append(name)
            voxels = np.full((3, 3, 3), len(made), np.int16)
            voxels[0] = 0
            write_nifti(tmp_path / folder / name, voxels)
        return tmp_path / folder

    return make


def pairs_of(cases, kind="label"):
    return {case["case"]: (Path(case["image"]).name, Path(case[kind]).name) for case in cases}


# --- two folders


def test_files_of_one_name_go_together_whatever_their_endings(place):
    images, labels = (
        place("i", "b.nii.gz", "a.nii", "scan_2021.nii.gz"),
        place("l", "a.nii.gz", "b.nii", "scan_2021.nii"),
    )
    assert pairs_of(folder_cases(images, labels)) == {
        "a": ("a.nii", "a.nii.gz"),
        "b": ("b.nii.gz", "b.nii"),
        "scan_2021": ("scan_2021.nii.gz", "scan_2021.nii"),
    }


@pytest.mark.parametrize("channel", [0, 2])
def test_a_channel_suffix_of_images(place, channel):
    images = place("i", *(f"{case}_000{k}.nii.gz" for case in "ab" for k in (0, 1, 2)))
    found = folder_cases(images, place("l", "a.nii.gz", "b.nii.gz"), channel)
    assert pairs_of(found) == {case: (f"{case}_000{channel}.nii.gz", f"{case}.nii.gz") for case in "ab"}


def test_outputs_may_have_a_channel_suffix_too(place):
    images, outputs = place("i", "a_0000.nii.gz", "b_0000.nii.gz"), place("o", "a_0001.nii.gz", "b_0001.nii.gz")
    found = folder_cases(images, outputs, 0, 1)
    assert pairs_of(found, "output") == {c: (f"{c}_0000.nii.gz", f"{c}_0001.nii.gz") for c in "ab"}
    assert not any("label" in case for case in found)
    place("i", "a_0001.nii.gz", "b_0001.nii.gz")
    assert pairs_of(folder_cases(images, images, 0, 1), "output") == pairs_of(found, "output")


def test_files_without_partner_are_all_named(place, caplog):
    images = place("i", "a.nii.gz", "lonely.nii.gz", "single_0000.nii.gz", "other_0001.nii.gz", "year_1999.nii.gz")
    labels = place("l", "a.nii.gz", "widow.nii.gz", "other.nii.gz")
    message = (
        r"(?s)5 of 6 cases.*lonely: nothing of this name in \S+/l;.*other: nothing of this name in \S+/i"
        r".*single: nothing.*widow: nothing of this name in \S+/i.*year_1999: nothing of this name in \S+/l"
    )
    with pytest.raises(DatasetError, match=message):
        folder_cases(images, labels)
    with caplog.at_level(logging.WARNING):
        assert pairs_of(folder_cases(images, labels, skip_bad_cases=True)) == {"a": ("a.nii.gz", "a.nii.gz")}
    assert "going on without 5 of 6 cases" in caplog.text


def test_ambiguous_names_are_faults(place):
    images, labels = place("i", "a.nii.gz", "a.nii", "b.nii.gz", "b_0000.nii.gz"), place("l", "a.nii.gz", "b.nii.gz")
    with pytest.raises(DatasetError, match="(?s)2 of 3 cases.*a: more than one file.*b_0000: nothing of this name"):
        folder_cases(images, labels)


def test_no_pairs_at_all(place, tmp_path):
    (tmp_path / "empty").mkdir()
    for images, labels in [(place("i", "a.nii.gz"), place("l", "b.nii.gz")), (tmp_path / "empty",) * 2]:
        with pytest.raises(DatasetError, match="no file in .* has a partner in .*paired by name"):
            folder_cases(images, labels)


def test_letters_with_accents_are_paired_however_they_are_stored(place):
    composed = unicodedata.normalize("NFC", "Zoë é")
    images, labels = (
        place("i", f"{unicodedata.normalize('NFD', composed)}_0000.nii.gz"),
        place("l", f"{composed}.nii.gz"),
    )
    assert list(pairs_of(folder_cases(images, labels))) == [composed]


# --- JSON lists


def write(folder, content, name="pairs.json"):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


ENTRIES = [{"image": "i/a.nii.gz", "label": "l/a.nii.gz"}, {"image": "i/b ü.nii.gz", "label": "/far/b.nii.gz"}]


@pytest.mark.parametrize("content", [ENTRIES, {"training": ENTRIES, "test": ["c.nii.gz"], "name": "x"}])
def test_paths_are_relative_to_the_list(tmp_path, content):
    images, labels = read_pair_list(write(tmp_path / "lists of günther", content))
    folder = tmp_path / "lists of günther"
    assert images == [str(folder / "i/a.nii.gz"), str(folder / "i/b ü.nii.gz")]
    assert labels == [str(folder / "l/a.nii.gz"), "/far/b.nii.gz"]


def test_an_image_may_be_a_list_of_channels(tmp_path):
    path = write(tmp_path, [{"image": ["t1.nii", "t2.nii"], "label": "l.nii"}])
    assert read_pair_list(path, 1)[0] == [str(tmp_path / "t2.nii")]
    with pytest.raises(DatasetError, match="entry 1: no image of channel 2"):
        read_pair_list(path, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON .*expected"),
        ([], "holds no pairs: expected"),
        ({"validation": ENTRIES}, "holds no pairs"),
        ({"training": {}}, "holds no pairs"),
        ('"a"', "holds a text where"),
        ([*ENTRIES, {"label": "a.nii"}], "entry 3: no image"),
        ([*ENTRIES, "a.nii"], "entry 3: no image"),
        ([*ENTRIES, {"image": 3, "label": "a.nii"}], "entry 3: no image"),
        ([*ENTRIES, {"image": "a.nii", "label": ["a.nii"]}], "entry 3: .*no path as label"),
    ],
)
def test_senseless_lists(tmp_path, content, message):
    with pytest.raises(DatasetError, match=rf"pairs\.json.*{message}"):
        read_pair_list(write(tmp_path, content))


def test_missing_lists_and_files(tmp_path, place):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.json: --context_file takes a JSON list"):
        read_pair_list(tmp_path / "nowhere.json")
    with pytest.raises(DatasetError, match="is a file: --context_dir takes a folder, --context_file a JSON list"):
        context_cases(write(tmp_path, ENTRIES))
    place("i", "a.nii.gz", "b.nii.gz")
    listed = [{"image": "i/a.nii.gz", "label": "l/gone.nii.gz"}, {"image": "i/b.nii.gz"}]
    message = (
        r"(?s)2 of 2 cases.*a\.nii\.gz: label file is missing: \S+l/gone\.nii\.gz.*b\.nii\.gz: label file is missing"
    )
    with pytest.raises(DatasetError, match=message):
        listed_cases(*read_pair_list(write(tmp_path, listed)))
