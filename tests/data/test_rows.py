"""Collection files, and what is really drawn from them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from scripts.data import (
    Collection,
    DatasetError,
    EpisodeDataset,
    GroupAugmentation,
    PreparedCases,
    SyntheticCohorts,
)
from scripts.data.rows import Row, read_rows
from scripts.data.tasks import TASKS

GRID = (16, 16, 16)


@pytest.fixture(scope="module")
def folder(make_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, "Dataset001_A", cases=[f"a{i}" for i in range(8)], channels=(0, 1))
    make_dataset(folder, "Dataset002_B", cases=[f"b{i}" for i in range(7)], labels={"background": 0, "brain": [1, 2]})
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write(tmp_path):
    def written(*rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps({"rows": rows}))
        return str(path)

    return written


@pytest.fixture
def episodes(folder, cache, tmp_path):
    def made(rows_file=None, part="train", dataset_dir=folder, context_size=3, **options):
        own = {k: options.pop(k) for k in ("datasets", "tasks", "channel", "sample_rate") if k in options}
        collection = Collection(
            str(dataset_dir) if dataset_dir else None,
            str(cache),
            collection_file=rows_file,
            num_workers=1,
            **own,
        )
        parts = {name: collection.part(name) for name in ("train", "val")}
        prepared = PreparedCases(parts, GRID, str(cache), num_workers=1)
        options = {"rows": collection.rows, "cohorts": SyntheticCohorts(GRID)} | options
        dataset = EpisodeDataset(parts[part], prepared, part, context_size, **options)
        dataset.prepare()
        return dataset

    return made


def frequencies(dataset, key, count=3000):
    found = Counter(key(dataset.draw(number)) for number in range(count))
    return {name: times / count for name, times in found.items()}


# --- reading


def test_the_documented_example_is_read():
    rows = read_rows("configs/collection_example.json")
    assert rows[0] == Row(
        "Dataset001_Brain", "segmentation", (0, 1), remove_classes=("lesion",), draw_weight=2.0, loss_weight=1.0
    )
    assert rows[1].classes == ("lesion",) and rows[2].output == 1 and rows[3].input == (0,)
    assert rows[-1] == Row("synthetic")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"task": "segmentation"}, "'dataset' is missing"),
        ({"dataset": "D", "drow_weight": 2}, "unknown key 'drow_weight': did you mean 'draw_weight'"),
        ({"dataset": "D", "task": "segmentatoin"}, "segmentation"),
        ({"dataset": "D", "draw_weight": -1}, "'draw_weight' and 'loss_weight'"),
        ({"dataset": "D", "loss_weight": "many"}, "many"),
        ({"dataset": "D", "input": "t1"}, "'input' must be channel numbers"),
        ({"dataset": "D", "input": [-1]}, "at least 0"),
        ({"dataset": "D", "task": "modality_transfer"}, "'output' must be the channel"),
        ({"dataset": "D", "task": "modality_transfer", "input": 1, "output": 1}, "another channel"),
        ({"dataset": "D", "task": "inpainting", "output": 1}, "makes its own output"),
        ({"dataset": "D", "output": "label"}, "'output' must be"),
        ({"dataset": "D", "input": [True]}, "'input' must be channel numbers"),
        ({"dataset": "D", "classes": [["a"]]}, "must be names or whole numbers"),
        ({"dataset": "D", "task": "inpainting", "classes": ["a"]}, "reads no labels"),
        ({"dataset": "D", "classes": {"a": 1}}, "'classes' must be a list"),
        (["D"], "unknown key 'D'"),
        (3, "not iterable"),
    ],
)
def test_a_faulty_row_is_named(write, row, message):
    path = write({"dataset": "Good"}, row)
    with pytest.raises(DatasetError, match=f"rows.json, row 2: .*{message}"):
        read_rows(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": []}', '{"rows": 3}'])
def test_a_file_without_rows(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DatasetError, match=r"rows\.json.*collection_example"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(FileNotFoundError, match="--collection_file"):
        read_rows(tmp_path / "none.json")


# --- drawing


def test_draw_weights_are_the_frequencies(episodes, write):
    path = write(
        {"dataset": "Dataset001_A", "draw_weight": 3},
        {"dataset": "Dataset002_B", "task": "inpainting", "draw_weight": 1},
        {"dataset": "Dataset001", "task": "gaussian_denoising", "input": 1, "draw_weight": 0.5},
        {"dataset": "Dataset002_B", "task": "super_resolution", "draw_weight": 0},
    )
    found = frequencies(episodes(path), lambda group: (group.members[0]["dataset"], group.task))
    assert found == {
        ("Dataset001_A", "segmentation"): pytest.approx(3 / 4.5, abs=0.03),
        ("Dataset002_B", "inpainting"): pytest.approx(1 / 4.5, abs=0.03),
        ("Dataset001_A", "gaussian_denoising"): pytest.approx(0.5 / 4.5, abs=0.03),
    }


def test_channels_of_a_row_are_drawn_equally_and_a_group_has_one(episodes, write):
    dataset = episodes(write({"dataset": "Dataset001_A", "input": [0, 1]}))
    assert all(len({case["channel"] for case in dataset.draw(n).members}) == 1 for n in range(30))
    found = frequencies(dataset, lambda group: group.members[0]["channel"], 800)
    assert found == {0: pytest.approx(0.5, abs=0.06), 1: pytest.approx(0.5, abs=0.06)}


def test_without_a_file_every_dataset_and_channel_is_used_for_segmentation(episodes):
    dataset = episodes()
    seen = {(g.members[0]["dataset"], g.members[0]["channel"], g.task) for g in map(dataset.draw, range(60))}
    assert seen == {
        ("Dataset001_A", 0, "segmentation"), ("Dataset001_A", 1, "segmentation"), ("Dataset002_B", 0, "segmentation")
    }  # fmt: skip


def test_tasks_and_datasets_pick_a_subset(episodes, write):
    path = write(
        {"dataset": "Dataset001_A"},
        {"dataset": "Dataset001_A", "task": "inpainting"},
        {"dataset": "Dataset002_B", "task": "inpainting"},
    )
    tasks = {g.task for g in map(episodes(path, tasks="inpainting").draw, range(40))}
    assert tasks == {"inpainting"}
    for name in ("Dataset002", "Dataset002_B"):
        names = {g.members[0]["dataset"] for g in map(episodes(path, datasets=[name]).draw, range(40))}
        assert names == {"Dataset002_B"}
    with pytest.raises(DatasetError, match="Dataset009 not in"):
        episodes(path, datasets=["Dataset002", "Dataset009"])
    with pytest.raises(DatasetError, match="no row is left"):
        episodes(path, tasks=["super_resolution"])
    with pytest.raises(ValueError, match="inpainting"):
        episodes(path, tasks=["inpaintin"])
    every = episodes(tasks=["inpainting", "modality_transfer"], datasets=["Dataset001_A"])
    assert {g.task for g in map(every.draw, range(40))} == {"inpainting", "modality_transfer"}


def test_listed_and_removed_classes(episodes, write):
    listed = episodes(write({"dataset": "Dataset001_A", "classes": ["second"]}))
    assert {(g.classes, tuple(g.setting["values"])) for g in map(listed.draw, range(20))} == {("second", (2,))}
    both = episodes(write({"dataset": "Dataset001_A", "classes": [1, "second"]}))
    assert {tuple(both.draw(n).setting["values"]) for n in range(20)} == {(1, 2)}, "a list is one foreground"
    removed = episodes(write({"dataset": "Dataset001_A", "classes": "random", "remove_classes": ["second"]}))
    assert {tuple(removed.draw(n).setting["values"]) for n in range(20)} == {(1,)}
    with pytest.raises(DatasetError, match="no class 'third' .*first, second"):
        episodes(write({"dataset": "Dataset001_A", "classes": ["third"]}))
    with pytest.raises(DatasetError, match="no case has a class that the row leaves"):
        episodes(write({"dataset": "Dataset001_A", "remove_classes": [1, 2]}))


def test_skull_stripping_needs_to_know_the_brain(episodes, write):
    dataset = episodes(write({"dataset": "Dataset002_B", "task": "skull_stripping"}))
    group, drawn = dataset[0], dataset.draw(0)
    for member, case in enumerate(drawn.members):
        image, label = dataset.prepared.load(case)
        assert torch.equal(group["label"][member], image * (label > 0))
    with pytest.raises(DatasetError, match="needs a class named brain"):
        episodes(write({"dataset": "Dataset001_A", "task": "skull_stripping"}))
    episodes(write({"dataset": "Dataset001_A", "task": "skull_stripping", "classes": ["first", "second"]}))


def test_modality_transfer_pairs_the_channels_of_a_case(episodes, write):
    dataset = episodes(write({"dataset": "Dataset001_A", "task": "modality_transfer", "input": 0, "output": 1}))
    group, drawn = dataset[3], dataset.draw(3)
    for member, case in enumerate(drawn.members):
        image, output = dataset.prepared.load(case)
        assert torch.equal(group["image"][member], image) and torch.equal(group["label"][member], output)
        assert np.corrcoef(image.flatten(), output.flatten())[0, 1] < -0.95, "the second channel is upside down"
    assert group["generation"] and group["task"] == "modality_transfer"


def test_unlabelled_scans_serve_the_tasks_that_need_no_label(episodes, write, make_dataset, tmp_path):
    root = make_dataset(tmp_path / "more", "Dataset003_C", cases=6)
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    dataset = episodes(write({"dataset": "Dataset003_C", "task": "inpainting"}), dataset_dir=root)
    assert dataset[0]["generation"] and not torch.equal(dataset[0]["image"], dataset[0]["label"])
    with pytest.raises(DatasetError, match="label file is missing"):
        episodes(dataset_dir=root)


def test_a_channel_that_is_not_there(episodes, write):
    with pytest.raises(DatasetError, match=r"Dataset002_B has no channel \[1\].*channels there: \[0\]"):
        episodes(write({"dataset": "Dataset002_B", "input": [1]}))


def test_synthetic_cohorts_mix_with_real_data(episodes, write):
    path = write({"dataset": "Dataset001_A"}, {"dataset": "synthetic", "draw_weight": 2})
    found = frequencies(episodes(path), lambda g: g.members[0]["dataset"], 150)
    assert found == {"Dataset001_A": pytest.approx(1 / 3, abs=0.12), "synthetic": pytest.approx(2 / 3, abs=0.12)}
    alone = episodes(write({"dataset": "synthetic"}), dataset_dir=None)
    assert alone[0]["dataset"] == "synthetic"
    with pytest.raises(DatasetError, match="give --dataset_dir"):
        episodes(write({"dataset": "Dataset001_A"}), dataset_dir=None)
    with pytest.raises(DatasetError, match="no synthetic cohorts"):
        episodes(write({"dataset": "synthetic"}), dataset_dir=None, cohorts=None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"classes": ["structure1"]}, "have no names"),
        ({"remove_classes": [1]}, "have no names"),
        ({"task": "skull_stripping"}, "skull_stripping needs a dataset"),
        ({"input": 1}, "the channel 0 as 'input'"),
        ({"task": "modality_transfer", "output": 2}, "1 as 'output'"),
    ],
)
def test_what_synthetic_cohorts_do_not_have(write, row, message):
    with pytest.raises(DatasetError, match=message):
        read_rows(write({"dataset": "synthetic"} | row))


def test_a_case_is_in_one_part_whatever_its_channel(folder, cache):
    parts = Collection(str(folder), str(cache), val_fraction=0.3, num_workers=1).parts()
    where = {part: {(c["dataset"], c["case"]) for c in cases} for part, cases in parts.items()}
    assert not where["train"] & where["val"]
    assert len({c["channel"] for c in parts["val"] if c["dataset"] == "Dataset001_A"}) == 2


def test_rows_share_the_cache_of_the_same_images(episodes, write, cache):
    dataset = episodes(
        write({"dataset": "Dataset001_A", "input": 0}, {"dataset": "Dataset001_A", "input": 0, "task": "inpainting"})
    )
    assert list(dataset.prepared.cases["train"]) == ["Dataset001_A/0000/label"]


# --- groups


def test_every_task_can_be_trained_in_one_run(episodes, write):
    rows = [{"dataset": "Dataset002_B", "task": task} for task in TASKS if task != "modality_transfer"]
    path = write(*rows, {"dataset": "Dataset001_A", "task": "modality_transfer", "output": 1})
    dataset = episodes(path, augmentation=GroupAugmentation())
    seen = set()
    for number in range(120):
        group = dataset[number]
        seen.add(group["task"])
        assert group["image"].shape == group["label"].shape == (4, 1, *GRID)
        assert torch.isfinite(group["image"]).all() and torch.isfinite(group["label"]).all()
        assert group["generation"] == (group["task"] != "segmentation")
    assert seen == set(TASKS)


def test_a_group_is_its_number_with_augmentation_too(episodes, write):
    path = write({"dataset": "Dataset002_B", "task": "inpainting"}, {"dataset": "Dataset002_B"})
    first, again = (episodes(path, augmentation=GroupAugmentation(flip_prob=0.5)) for _ in range(2))
    for number in (0, 7, 3):
        a, b = first[number], again[number]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"]) and a["gin"] == b["gin"]


def test_augmentation_is_for_training_only_and_can_be_left_out(episodes):
    always = GroupAugmentation(image_invert_prob=1.0)
    training, plain = episodes(augmentation=always), episodes()
    assert not torch.equal(training[0]["image"], plain[0]["image"])
    assert torch.equal(training.make(0, augment=False)["image"], plain[0]["image"])
    validation, without = episodes(part="val", augmentation=always), episodes(part="val")
    assert torch.equal(validation[0]["image"], without[0]["image"])


def test_in_validation_the_rows_take_turns(episodes, write):
    path = write({"dataset": "Dataset001_A", "draw_weight": 9}, {"dataset": "Dataset002_B", "task": "inpainting"})
    tasks = [episodes(path, part="val").draw(number).task for number in range(6)]
    assert tasks == ["segmentation", "inpainting"] * 3


def test_loss_weights_travel_with_the_group(episodes, write):
    path = write({"dataset": "Dataset001_A", "loss_weight": 0.25}, {"dataset": "Dataset002_B", "loss_weight": 4})
    dataset = episodes(path)
    for number in range(12):
        group = dataset[number]
        assert group["loss_weight"] == (0.25 if group["dataset"] == "Dataset001_A" else 4)


def test_unpairing_begins_late_and_spares_images(episodes, write):
    path = write({"dataset": "Dataset001_A"}, {"dataset": "Dataset001_A", "task": "inpainting"})
    dataset = episodes(path, unpair_fraction=0.25, epochs=8, groups_per_epoch=10)
    late = [dataset[number] for number in range(60, 80)]
    assert {group["unpaired"] for group in map(dataset.__getitem__, range(50, 60))} == {False}
    assert {(group["generation"], group["unpaired"]) for group in late} == {(True, False), (False, True)}
    assert not episodes(path, epochs=1)[10**6]["unpaired"], "off by default, however long it runs"
    with pytest.raises(ValueError, match="unpair_fraction"):
        episodes(path, unpair_fraction=1.5)
    with pytest.raises(ValueError, match="needs two contexts at least"):
        episodes(path, unpair_fraction=0.5, context_size=[1, 3])


def test_evidence_is_of_a_share_of_the_masks_and_never_of_images(episodes, write):
    path = write({"dataset": "Dataset001_A"}, {"dataset": "Dataset001_A", "task": "inpainting"})
    groups = [episodes(path, evidence_share=0.5)[number] for number in range(40)]
    assert {(g["generation"], g["evidence"]) for g in groups} == {(True, False), (False, True), (False, False)}
    assert not any(episodes(path)[number]["evidence"] for number in range(10)), "off by default"
    assert not any(episodes(path, part="val", evidence_share=1.0)[number]["evidence"] for number in range(4))
    with pytest.raises(ValueError, match="evidence_share"):
        episodes(path, evidence_share=1.5)


def test_a_dataset_for_a_loop_of_one_s_own(folder, tmp_path):
    dataset = EpisodeDataset.from_folder(
        str(folder), mode="val", augment=False, spatial_size=16, cache_dir=str(tmp_path), context_size=2
    )
    sample = dataset[0]
    assert sample["image"].shape == sample["label"].shape == (3, 1, 16, 16, 16)
    assert EpisodeDataset.from_folder(str(folder), augment=True, spatial_size=16, cache_dir=str(tmp_path)).augmentation
