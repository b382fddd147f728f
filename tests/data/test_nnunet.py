"""nnU-Net folders -> cases, and paths -> targets."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from scripts.data import DatasetError, find_datasets, find_targets
from scripts.data.integrity import inspect_cases, sound_cases

LABELS = {"background": 0, "first": 1, "second": 2}


def only_dataset(folder):
    (dataset,) = find_datasets(folder)
    return dataset


def described(root, labels):
    (root / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")
    return only_dataset(root)


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def names_of(cases):
    return [case["case"] for case in cases]


@pytest.fixture(scope="module")
def dataset(make_dataset, tmp_path_factory):
    """A dataset that no test changes."""
    return make_dataset(tmp_path_factory.mktemp("data"), cases=["b", "a"], channels=(0, 1))


@pytest.fixture
def copied(dataset, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(dataset, tmp_path / dataset.name)


# --- dataset.json


@pytest.mark.parametrize("version", [1, 2])
def test_both_layouts_describe_the_same_classes(make_dataset, tmp_path, version):
    found = only_dataset(make_dataset(tmp_path, cases=1, version=version))
    assert found.classes == {"first": (1,), "second": (2,)}
    assert found.known_values == {0, 1, 2}


def test_regions_are_several_values(copied):
    found = described(copied, {"background": 0, "whole": [1, 2], "core": [2]})
    assert found.classes == {"whole": (1, 2), "core": (2,)}
    assert found.known_values == {0, 1, 2}


def test_ignore_label_is_allowed_but_no_class(copied):
    found = described(copied, LABELS | {"ignore": 3})
    assert found.classes == {"first": (1,), "second": (2,)}
    assert found.known_values == {0, 1, 2, 3}


def test_background_of_another_name_is_no_class(copied):
    assert set(described(copied, {"Air": 0, "first": 1}).classes) == {"first"}
    assert set(described(copied, {"0": "air", "1": "first"}).classes) == {"first"}


def test_background_inside_a_region_is_not_part_of_the_class(copied):
    assert described(copied, {"background": 0, "all": [0, 1, 2]}).classes == {"all": (1, 2)}


def test_two_values_of_one_name_are_one_class(copied):
    found = described(copied, {"0": "background", "1": "kidney", "2": "kidney"})
    assert found.classes == {"kidney": (1, 2)}
    assert found.known_values == {0, 1, 2}


def test_without_dataset_json_any_value_is_allowed(make_dataset, tmp_path):
    found = only_dataset(make_dataset(tmp_path, cases=1, version=None))
    assert found.classes == {} and found.known_values is None
    assert found.cases()[0]["known_values"] is None


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"labels": 3}', '{"labels": [1, 2]}', '{"labels": {"a": "b"}}', "\xff"]
)
def test_unreadable_dataset_json_is_named(copied, content):
    (copied / "dataset.json").write_text(content, encoding="latin-1")
    with pytest.raises(DatasetError, match=r"Dataset001_Blobs/dataset\.json.*'labels'") as caught:
        find_datasets(copied)
    assert "\n" not in str(caught.value)


def test_a_description_or_dataset_that_is_a_link_to_nothing(copied):
    (copied / "dataset.json").unlink()
    (copied / "dataset.json").symlink_to("nowhere")
    with pytest.raises(DatasetError, match=r"Dataset001_Blobs: dataset\.json is a link to nothing"):
        find_datasets(copied)
    (copied.parent / "Dataset002_Gone").symlink_to("nowhere")
    with pytest.raises(DatasetError, match="Dataset002_Gone are links to nothing"):
        find_datasets(copied.parent)


# --- cases


def test_cases_are_sorted_and_carry_what_is_known(dataset):
    first, second = only_dataset(dataset).cases()
    assert first == {
        "image": str(dataset / "imagesTr" / "a_0000.nii.gz"),
        "label": str(dataset / "labelsTr" / "a.nii.gz"),
        "case": "a",
        "channel": 0,
        "dataset": "Dataset001_Blobs",
        "folder_problems": [],
        "classes": {"first": [1], "second": [2]},
        "known_values": [0, 1, 2],
    }
    assert second["case"] == "b"


def test_second_channel(dataset):
    cases = only_dataset(dataset).cases(channel=1)
    assert [os.path.basename(c["image"]) for c in cases] == ["a_0001.nii.gz", "b_0001.nii.gz"]
    assert [os.path.basename(c["label"]) for c in cases] == ["a.nii.gz", "b.nii.gz"]


def test_missing_channel_names_those_there(dataset):
    with pytest.raises(DatasetError, match=r"imagesTr has no files of channel 0007 .*\[0, 1\]"):
        only_dataset(dataset).cases(channel=7)


def test_second_channel_may_be_missing_in_some_cases(copied):
    (copied / "imagesTr" / "b_0001.nii.gz").unlink()
    assert names_of(only_dataset(copied).cases(channel=1)) == ["a"]


def test_missing_label_is_none(copied):
    (copied / "labelsTr" / "b.nii.gz").unlink()
    assert [case["label"] is None for case in only_dataset(copied).cases()] == [False, True]


@pytest.mark.parametrize("doubled", ["imagesTr/a_0000.nii", "labelsTr/a.nrrd"])
def test_two_files_for_one_case_are_a_problem(copied, doubled):
    (copied / doubled).write_bytes(b"")
    problems = {case["case"]: case["folder_problems"] for case in only_dataset(copied).cases()}
    assert problems == {"a": ["more than one file for the case"], "b": []}


def test_labels_without_image_are_cases_that_miss_it(copied):
    touch(copied / "labelsTr", "x.nii.gz", "y.nii.gz")
    cases = only_dataset(copied).cases()
    assert {case["case"] for case in cases if case["image"] is None} == {"x", "y"}
    both = r"2 of 4 cases(.|\n)*x: image file is missing(.|\n)*y: image file is missing"
    with pytest.raises(DatasetError, match=both):
        sound_cases(inspect_cases(cases))
    assert len(sound_cases(inspect_cases(cases), skip_bad_cases=True)) == 2


def test_other_files_are_passed_over(copied):
    touch(copied / "imagesTr", "._a_0000.nii.gz", ".DS_Store", "notes.txt", "no_channel.nii.gz")
    touch(copied / "labelsTr", "._a.nii.gz", "a.txt")
    assert names_of(only_dataset(copied).cases()) == ["a", "b"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_names_with_spaces_dots_and_letters_of_any_language(make_dataset, tmp_path, ending):
    names = ["Zoë 1.5T", "a_0000", "病例 7"]
    root = make_dataset(tmp_path / "Größe 3", "Dataset002_Schädel x", cases=names, ending=ending)
    cases = only_dataset(root).cases()
    assert names_of(cases) == sorted(names)
    assert all(os.path.isfile(case["image"]) and os.path.isfile(case["label"]) for case in cases)


# --- find_datasets


@pytest.fixture(scope="module")
def several(make_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for name in ("Dataset002_B", "Dataset001_A", "Task03_C"):
        make_dataset(folder, name, cases=1)
    touch(folder / "nnUNet_results", "x.txt")
    touch(folder, "readme.md")
    return folder


def test_one_dataset_or_a_folder_of_them(several):
    assert [d.name for d in find_datasets(several)] == ["Dataset001_A", "Dataset002_B", "Task03_C"]
    assert [d.name for d in find_datasets(several / "Dataset002_B")] == ["Dataset002_B"]
    assert [d.name for d in find_datasets(str(several) + "/")] == ["Dataset001_A", "Dataset002_B", "Task03_C"]


def test_the_working_directory_has_a_name(several, monkeypatch):
    monkeypatch.chdir(several / "Dataset001_A")
    assert only_dataset(".").name == "Dataset001_A"


def test_a_link_to_a_dataset_keeps_its_own_name(several, tmp_path):
    (tmp_path / "Dataset007_Link").symlink_to(several / "Dataset001_A")
    assert [d.name for d in find_datasets(tmp_path, ["Dataset007"])] == ["Dataset007_Link"]
    assert only_dataset(tmp_path / "Dataset007_Link").cases()[0]["dataset"] == "Dataset007_Link"


@pytest.mark.parametrize(
    "names, expected",
    [
        (["Dataset002_B"], ["Dataset002_B"]),
        (["Dataset001"], ["Dataset001_A"]),
        (["Task03", "Dataset001", "Dataset001_A"], ["Dataset001_A", "Task03_C"]),
        ([], ["Dataset001_A", "Dataset002_B", "Task03_C"]),
    ],
)
def test_names_select(several, names, expected):
    assert [d.name for d in find_datasets(several, names)] == expected


def test_unknown_name_lists_what_is_there(several):
    with pytest.raises(DatasetError, match=r"Dataset009, X not in .*Dataset001_A, Dataset002_B, Task03_C"):
        find_datasets(several, ["Dataset001", "Dataset009", "X"])


def test_a_number_that_two_datasets_have_is_refused(several, make_dataset, tmp_path):
    for name in ("Dataset001_A", "Dataset001_Z"):
        make_dataset(tmp_path, name, cases=1)
    with pytest.raises(DatasetError, match="Dataset001 .*Dataset001_A, Dataset001_Z"):
        find_datasets(tmp_path, ["Dataset001"])
    assert [d.name for d in find_datasets(tmp_path, ["Dataset001_Z"])] == ["Dataset001_Z"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere: --dataset_dir takes"):
        find_datasets(tmp_path / "nowhere")


def test_folder_without_a_dataset(tmp_path):
    with pytest.raises(DatasetError, match=r"no nnU-Net dataset in .*imagesTr/ and labelsTr/"):
        find_datasets(tmp_path)


def test_dataset_without_images(tmp_path):
    touch(tmp_path / "Dataset001_A" / "imagesTr", "notes.txt")
    with pytest.raises(DatasetError, match=r"Dataset001_A/imagesTr holds no images"):
        find_datasets(tmp_path)


# --- find_targets


def test_plain_folder_keeps_the_suffix(tmp_path):
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b.nrrd", "c.mgz", "D.NII.GZ", "notes.txt")
    assert names_of(find_targets(tmp_path)) == ["D", "a_0000", "a_0001", "b", "c"]


@pytest.mark.parametrize("name", ["imagesTs", "imagesTr"])
@pytest.mark.parametrize("channel, endings", [(0, ["a_0000", "b_0000"]), (1, ["a_0001"])])
def test_nnunet_folder_picks_the_channel_and_strips_the_suffix(tmp_path, name, channel, endings):
    folder = touch(tmp_path / name, "b_0000.nii.gz", "a_0000.nii.gz", "a_0001.nii.gz")
    found = find_targets(folder, channel)
    assert [os.path.basename(t["image"]) for t in found] == [f"{e}.nii.gz" for e in endings]
    assert names_of(found) == [e[0] for e in endings]


def test_the_working_directory_as_nnunet_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path / "imagesTs", "a_0000.nii.gz"))
    (target,) = find_targets(".")
    assert target["case"] == "a" and os.path.isfile(target["image"])


def test_dataset_folder_takes_the_test_images_else_the_training_images(tmp_path):
    touch(tmp_path / "imagesTr", "train_0000.nii.gz")
    (tmp_path / "imagesTs").mkdir()
    assert names_of(find_targets(tmp_path)) == ["train"]
    touch(tmp_path / "imagesTs", "test_0000.nii.gz")
    assert names_of(find_targets(tmp_path)) == ["test"]


def test_single_file(tmp_path):
    touch(tmp_path, "scan_0000.nii.gz")
    assert find_targets(tmp_path / "scan_0000.nii.gz") == [
        {"image": str(tmp_path / "scan_0000.nii.gz"), "case": "scan_0000"}
    ]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        find_targets(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no image files in"):
        find_targets(tmp_path)
    touch(tmp_path / "imagesTs", "a_0000.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"no image files in .*imagesTs .*0004"):
        find_targets(tmp_path, channel=4)
    touch(tmp_path, "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no image files in .*notes\.txt"):
        find_targets(tmp_path / "notes.txt")


def test_two_files_for_one_answer_are_refused(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.nii", "b.nii")
    with pytest.raises(DatasetError, match="same case: a$"):
        find_targets(tmp_path)
    with pytest.raises(DatasetError, match="same case: b$"):
        find_targets(touch(tmp_path / "imagesTs", "b_0000.nii.gz", "b.nii.gz"))


def test_hidden_files_are_passed_over(tmp_path):
    touch(tmp_path, "._a.nii.gz", ".a.nii.gz.tmp.nii.gz", ".nii.gz", "a.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    assert names_of(find_targets(tmp_path)) == ["a"]


def test_targets_with_spaces_dots_and_letters_of_any_language(tmp_path):
    touch(tmp_path, "Müller 2.nii.gz", "v1.2.nii", "扫描.nii.gz")
    assert names_of(find_targets(tmp_path)) == ["Müller 2", "v1.2", "扫描"]
