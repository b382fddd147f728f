"""Finding, splitting, preparing and caching cases."""

from __future__ import annotations

import json
import logging
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data import Collection, DatasetError, EpisodeDataset, PreparedCases, integrity, preprocessing
from scripts.data.collection import PARTS, read_split

GRID = (8, 8, 8)


@pytest.fixture(scope="module")
def two_datasets(make_dataset, tmp_path_factory):
    """Ten and five cases; no test changes them."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, "Dataset001_A", cases=10)
    make_dataset(folder, "Dataset002_B", cases=5)
    return folder


@pytest.fixture
def collect(tmp_path):
    def make(folder, **settings):
        folder = None if folder is None else str(folder)
        return Collection(folder, str(tmp_path / "cache"), num_workers=1, **settings)

    return make


def names(cases):
    return [(case["dataset"], case["case"]) for case in cases]


def split_of(collection):
    return {part: names(collection.part(part)) for part in PARTS}


def prepare(parts, cache, **settings):
    prepared = PreparedCases(parts, settings.pop("grid", GRID), str(cache), num_workers=1, **settings)
    prepared.prepare()
    return prepared


def prepare_collection(collection, cache, **settings):
    return prepare({part: collection.part(part) for part in ("train", "val")}, cache, **settings)


def load_all(prepared):
    return [prepared.load(c) for part in prepared.cases.values() for cases in part.values() for c in cases]


def refuse_reading(monkeypatch):
    def refuse(path, *_, **__):
        raise AssertionError(f"{path} was read")

    for module, names in ((integrity, ("load_volume", "load_exact")), (preprocessing, ("load_known", "load_pair"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


# --- split


def test_every_case_is_in_one_part(collect, two_datasets):
    split = split_of(collect(two_datasets, val_fraction=0.2, test_fraction=0.2))
    everything = [case for part in PARTS for case in split[part]]
    assert len(everything) == len(set(everything)) == 15
    counts = {
        part: [sum(d == name for d, _ in split[part]) for name in ("Dataset001_A", "Dataset002_B")] for part in PARTS
    }
    assert counts == {"train": [6, 3], "val": [2, 1], "test": [2, 1]}


def test_the_seed_alone_decides(collect, two_datasets):
    first, again, other = (split_of(collect(two_datasets, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first["val"] != other["val"]


def test_a_datasets_split_does_not_hang_on_the_others(collect, two_datasets):
    both = split_of(collect(two_datasets))
    alone = split_of(collect(two_datasets, datasets=["Dataset002"]))
    assert alone["val"] == [case for case in both["val"] if case[0] == "Dataset002_B"]
    assert {d for d, _ in alone["train"]} == {"Dataset002_B"}


def test_at_least_one_validation_case_and_none_for_testing_unasked(collect, two_datasets):
    split = split_of(collect(two_datasets, val_fraction=0.01))
    assert sorted(d for d, _ in split["val"]) == ["Dataset001_A", "Dataset002_B"]
    assert split["test"] == []


def test_sample_rate_thins_out_the_training_cases_only(collect, two_datasets):
    whole, half = (split_of(collect(two_datasets, sample_rate=rate)) for rate in (1.0, 0.5))
    assert half["val"] == whole["val"]
    assert set(half["train"]) < set(whole["train"])
    assert [sum(d == n for d, _ in half["train"]) for n in ("Dataset001_A", "Dataset002_B")] == [4, 2]
    assert len(collect(two_datasets, sample_rate=0.001).part("train")) == 2, "one of each dataset is left"


@pytest.mark.parametrize(
    "settings",
    [
        {"val_fraction": 0},
        {"val_fraction": 1},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"test_fraction": -0.1},
        {"sample_rate": 0},
        {"sample_rate": 1.5},
    ],
)
def test_senseless_fractions_are_refused(collect, two_datasets, settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        collect(two_datasets, **settings)


def test_too_few_cases_to_split(collect, make_dataset, tmp_path):
    root = make_dataset(tmp_path / "data", "Dataset003_Few", cases=2)
    assert [len(cases) for cases in split_of(collect(root)).values()] == [1, 1, 0]
    with pytest.raises(DatasetError, match=r"Dataset003_Few: 2 cases .* 1 for validation, 1 for testing .*--val_frac"):
        collect(root, val_fraction=0.4, test_fraction=0.4).parts()


def test_faulty_cases_stop_it_or_are_left_out(collect, make_dataset, tmp_path, caplog):
    root = make_dataset(tmp_path / "data", cases=5)
    for name in ("case_01", "case_03"):
        (root / "labelsTr" / f"{name}.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"(?s)case_01: label file is missing.*case_03"):
        collect(root).parts()
    with caplog.at_level(logging.WARNING):
        kept = split_of(collect(root, skip_bad_cases=True))
    assert sorted(c for part in kept.values() for _, c in part) == ["case_00", "case_02", "case_04"]
    assert "case_03" in caplog.text


def test_parts_are_sequences(collect, two_datasets):
    part = collect(two_datasets).part("train")
    assert len(part) == len(list(part)) == 13
    assert part[0] == next(iter(part)) and part[-1] in part and part[2:4] == list(part)[2:4]


# --- split file


def test_a_split_can_be_repeated(collect, two_datasets, tmp_path):
    collection = collect(two_datasets, val_fraction=0.3, test_fraction=0.2, seed=5)
    collection.write_split(tmp_path / "splits.json")
    again = collect(two_datasets, seed=6, split_file=str(tmp_path / "splits.json"))
    assert {p: sorted(c) for p, c in split_of(again).items()} == {p: sorted(c) for p, c in split_of(collection).items()}
    content = json.loads((tmp_path / "splits.json").read_text(encoding="utf-8"))
    assert set(content) == set(PARTS) and set(content["val"]) == {"Dataset001_A", "Dataset002_B"}


def test_a_given_split_is_not_sampled_again(collect, two_datasets, tmp_path):
    collection = collect(two_datasets, sample_rate=0.5)
    collection.write_split(tmp_path / "splits.json")
    again = split_of(collect(two_datasets, split_file=str(tmp_path / "splits.json"), sample_rate=0.5))
    assert sorted(again["train"]) == sorted(split_of(collection)["train"])


def test_cases_that_are_not_in_the_split_are_not_used(collect, two_datasets, tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": {"Dataset001_A": ["case_01", "gone"]}, "val": {"Dataset001_A": ["case_02"]}}))
    found = split_of(collect(two_datasets, split_file=str(path)))
    assert found == {"train": [("Dataset001_A", "case_01")], "val": [("Dataset001_A", "case_02")], "test": []}


def test_unknown_split_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no split file .*nowhere\.json .*splits\.json"):
        read_split(tmp_path / "nowhere.json", [])


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"train": ["a"]}', '{"train": {"D": 3}}'])
def test_damaged_split_file(tmp_path, content):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=r"splits\.json is not a split file"):
        read_split(path, [{"dataset": "D", "case": "a"}])


def test_split_file_of_other_data(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": {"Other": ["a"]}}))
    with pytest.raises(DatasetError, match=r"splits\.json names none of the cases"):
        read_split(path, [{"dataset": "D", "case": "a"}])


# --- laziness


def test_nothing_is_read_before_it_is_needed(collect, tmp_path):
    collection = collect(tmp_path / "nowhere", split_file=str(tmp_path / "no.json"))
    prepared = PreparedCases(
        {"train": collection.part("train"), "val": collection.part("val")}, GRID, str(tmp_path / "cache")
    )
    EpisodeDataset(collection.part("train"), prepared)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepared.prepare()


# --- synthetic cohorts


def test_without_a_dataset_there_are_no_cases_but_a_row(collect, tmp_path):
    collection = collect(None, tasks=["segmentation", "modality_transfer"])
    assert split_of(collection) == {part: [] for part in PARTS}
    assert [(row["dataset"], row["task"], row["output"]) for row in collection.describe()] == [
        ("synthetic", "segmentation", "labels"),
        ("synthetic", "modality_transfer", 1),
    ]
    collection.write_split(tmp_path / "splits.json")
    again = collect(None, split_file=str(tmp_path / "splits.json"))
    assert split_of(again) == {part: [] for part in PARTS}


# --- prepared cases


def test_prepared_pairs_are_on_the_grid(collect, two_datasets, tmp_path):
    prepared = prepare_collection(collect(two_datasets), tmp_path / "cache")
    assert {part: set(sets) for part, sets in prepared.cases.items()} == {
        part: {"Dataset001_A/0000/label", "Dataset002_B/0000/label"} for part in ("train", "val")
    }
    for image, label in load_all(prepared):
        assert image.shape == label.shape == (1, *GRID)
        assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
        assert set(label.unique().tolist()) <= {0, 1, 2} and label.any()


def test_one_spacing_per_dataset(collect, make_dataset, tmp_path):
    for name, zoom in (("Dataset001_A", 1.0), ("Dataset002_B", 3.0)):
        make_dataset(tmp_path / "data", name, cases=3, affine=np.diag([zoom, zoom, zoom, 1]))
    prepared = prepare_collection(collect(tmp_path / "data"), tmp_path / "cache", grid=(16, 16, 16))
    assert prepared.spacing_mm == pytest.approx({"Dataset001_A": 1.0, "Dataset002_B": 3.0})
    fixed = prepare_collection(collect(tmp_path / "data"), tmp_path / "cache", grid=(16, 16, 16), spacing=4.0)
    assert fixed.spacing_mm == {"Dataset001_A": 4.0, "Dataset002_B": 4.0}


def test_the_largest_case_decides_about_the_spacing_wherever_it_is(make_dataset, tmp_path):
    small = make_dataset(tmp_path, "Dataset001_A", cases=["a", "b"])
    large = make_dataset(tmp_path, "Dataset001_B", cases=["c"], size=(16, 16, 32))
    spacings = []
    for val in (large, small):
        items = {"train": [], "val": []}
        for root in (small, large):
            for path in sorted((root / "labelsTr").iterdir()):
                image = root / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz")
                items["val" if root is val else "train"].append({"image": str(image), "label": str(path)})
        spacings.append(prepare(items, tmp_path / "cache", grid=(16, 16, 16)).spacing_mm["dataset"])
    assert spacings[0] == spacings[1] == pytest.approx(2.0, rel=1e-6)


def test_a_spacing_that_crops_is_said(collect, two_datasets, tmp_path, caplog):
    collection = collect(two_datasets)
    with caplog.at_level(logging.WARNING):
        prepare_collection(collection, tmp_path / "cache", grid=(16, 16, 16), spacing=1.0)
        assert caplog.text == ""
        prepare_collection(collection, tmp_path / "cache", grid=(16, 16, 16), spacing=0.5)
    assert "Dataset001_A: at --spacing 0.5 the largest case is cropped" in caplog.text


def test_second_time_no_image_is_read(collect, two_datasets, tmp_path, monkeypatch):
    first = load_all(prepare_collection(collect(two_datasets), tmp_path / "cache"))
    refuse_reading(monkeypatch)
    again = load_all(prepare_collection(collect(two_datasets), tmp_path / "cache"))
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_moved_dataset_keeps_its_cache(make_dataset, tmp_path, collect, monkeypatch):
    root = make_dataset(tmp_path / "data", cases=3)
    load_all(prepare_collection(collect(root), tmp_path / "cache"))
    moved = shutil.move(root, tmp_path / "elsewhere")
    prepared = prepare_collection(collect(moved), tmp_path / "cache")
    refuse_reading(monkeypatch)
    load_all(prepared)


def cached(cache):
    return {p.name for p in cache.glob("*.pt")}


def test_a_changed_file_is_made_anew(make_dataset, tmp_path, collect):
    root = make_dataset(tmp_path / "data", cases=3)
    prepared = prepare_collection(collect(root), tmp_path / "cache")
    load_all(prepared)
    before = cached(tmp_path / "cache")
    assert len(before) == 3
    path = root / "labelsTr" / "case_01.nii.gz"
    image = nib.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    voxels[voxels == 2] = 1
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    prepared = prepare_collection(collect(root), tmp_path / "cache")
    load_all(prepared)
    assert len(cached(tmp_path / "cache") - before) == 1
    changed = next(
        c for p in prepared.cases.values() for c in p["Dataset001_Blobs/0000/label"] if c["case"] == "case_01"
    )
    assert prepared.load(changed)[1].max() == 1


@pytest.mark.parametrize("change", [{"spacing": 3.0}, {"grid": (8, 8, 16), "spacing": 2.0}])
def test_changed_settings_make_new_entries(make_dataset, tmp_path, collect, change):
    root = make_dataset(tmp_path / "data", cases=3)
    load_all(prepare_collection(collect(root), tmp_path / "cache", spacing=2.0))
    before = cached(tmp_path / "cache")
    load_all(prepare_collection(collect(root), tmp_path / "cache", **change))
    assert len(cached(tmp_path / "cache") - before) == 3


@pytest.mark.parametrize("size", [0, 100, -50])
def test_a_cache_file_cut_short_is_made_again(make_dataset, tmp_path, collect, size):
    root = make_dataset(tmp_path / "data", cases=3)
    prepared = prepare_collection(collect(root), tmp_path / "cache")
    first = load_all(prepared)
    for path in (tmp_path / "cache").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:size])
    for before, after in zip(first, load_all(prepared), strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_plain_items_do(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=5)
    items = [
        {"image": str(path), "label": str(root / "labelsTr" / path.name.replace("_0000", ""))}
        for path in sorted((root / "imagesTr").iterdir())
    ]
    prepared = prepare({"train": items[:4], "val": items[4:]}, tmp_path / "cache")
    assert len(load_all(prepared)) == 5
    assert all("dataset" not in item and "index" not in item for item in items), "the caller's items are left alone"
    episodes = EpisodeDataset(items[:4], prepared, context_size=3)
    group = episodes[0]
    assert sorted(group["cases"].split()) == sorted(item["image"] for item in items[:4])
    assert group["image"].shape == (4, 1, *GRID) and set(group["label"].unique().tolist()) == {0, 1}


def test_faulty_plain_items_are_named_by_their_file(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=2)
    image = root / "imagesTr" / "case_01_0000.nii.gz"
    image.write_bytes(b"damaged")
    items = [
        {"image": str(path), "label": str(root / "labelsTr" / path.name.replace("_0000", ""))}
        for path in sorted((root / "imagesTr").iterdir())
    ]
    with pytest.raises(DatasetError, match=f"{os.path.basename(image)}: image .* cannot be read"):
        prepare({"train": items, "val": []}, tmp_path / "cache")
