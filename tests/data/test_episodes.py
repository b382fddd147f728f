"""Groups and validation episodes."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scripts.data import Collection, DatasetError, EpisodeDataset, GroupSampler, PreparedCases, collate_groups
from scripts.data.episodes import as_episode

GRID = (8, 8, 8)
MANY = range(120)


@pytest.fixture(scope="module")
def two_datasets(make_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, "Dataset001_A", cases=[f"a{i}" for i in range(9)])
    make_dataset(folder, "Dataset002_B", cases=[f"b{i}" for i in range(7)])
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def episodes_of(folder, cache, part="train", val_fraction=0.3, **settings):
    collection = Collection(str(folder), str(cache), val_fraction=val_fraction, num_workers=1)
    parts = {name: collection.part(name) for name in ("train", "val")}
    prepared = PreparedCases(parts, GRID, str(cache), num_workers=1)
    return EpisodeDataset(parts.get(part, []), prepared, part, **settings)


@pytest.fixture
def episodes(two_datasets, cache):
    return lambda *args, **kwargs: episodes_of(two_datasets, cache, *args, **kwargs)


def erase(root, value, keep):
    """Remove a label from all cases but the first ``keep``."""
    for path in sorted((root / "labelsTr").iterdir())[keep:]:
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj).copy()
        voxels[voxels == value] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), path)
    return root


def drawn(dataset, numbers=MANY):
    """Names and label values of many groups."""
    found = []
    for number in numbers:
        group = dataset.draw(number)
        found.append(([case["case"] for case in group.members], frozenset(group.setting.get("values", ()))))
    return found


def members_and_values(dataset, number):
    group = dataset.draw(number)
    return group.members, frozenset(group.setting["values"])


# --- groups


def test_members_are_different_training_cases_of_one_dataset(episodes):
    dataset = episodes(context_size=3)
    dataset.prepare()
    training = {cases[0]["dataset"]: {c["case"] for c in cases} for cases in dataset.prepared.cases["train"].values()}
    seen = set()
    for number in MANY:
        members = dataset.draw(number).members
        (name,) = {case["dataset"] for case in members}
        cases = [case["case"] for case in members]
        assert len(set(cases)) == len(cases) == 4
        assert set(cases) <= training[name]
        seen |= {(name, case) for case in cases}
    assert seen == {(name, case) for name, cases in training.items() for case in cases}, "all cases have their turn"


def test_both_datasets_are_drawn_evenly(episodes):
    dataset = episodes(context_size=2)
    share = np.mean([dataset.draw(n).members[0]["dataset"] == "Dataset001_A" for n in MANY])
    assert 0.35 < share < 0.65


def test_a_group_is_its_number(episodes):
    first, again, other = episodes(seed=4), episodes(seed=4), episodes(seed=5)
    assert drawn(first) == drawn(again)
    assert drawn(first)[7] == drawn(first, [7])[0], "whatever was drawn before"
    assert drawn(first) != drawn(other)
    assert len({str(group) for group in drawn(first)}) > 60


def test_no_global_random_state_is_used(episodes):
    dataset = episodes()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = drawn(dataset)
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])
    np.random.seed(99)
    assert drawn(dataset) == before


def test_background_is_never_a_class_and_all_classes_are(episodes):
    values = [values for _, values in drawn(episodes(context_size=2))]
    assert set(values) == {frozenset({1}), frozenset({2}), frozenset({1, 2})}


@pytest.mark.parametrize("max_classes, most", [(1, 1), (2, 2), (3, 3), (9, 4)])
def test_number_of_classes(make_dataset, tmp_path, max_classes, most):
    labels = {"background": 0, "first": 1, "second": 2, "either": [1, 2], "again": [2]}
    root = make_dataset(tmp_path, cases=6, labels=labels)
    dataset = episodes_of(root, tmp_path / "cache", context_size=2, max_classes=max_classes)
    counts = {len(dataset.draw(number).classes.split("+")) for number in MANY}
    assert counts == set(range(1, most + 1))


def test_regions_are_merged(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=6, labels={"background": 0, "whole": [1, 2], "core": 2})
    dataset = episodes_of(root, tmp_path / "cache", context_size=2, max_classes=1)
    for number in range(12):
        members, values = members_and_values(dataset, number)
        name = dataset.draw(number).classes
        assert values == ({1, 2} if name == "whole" else {2})
        labels = torch.stack([dataset.prepared.load(case)[1] for case in members])
        assert torch.equal(dataset[number]["label"], torch.isin(labels, torch.tensor(sorted(values))).float())


def test_a_dataset_of_one_class(make_dataset, tmp_path):
    root = erase(make_dataset(tmp_path, cases=6, version=None), 2, keep=0)
    dataset = episodes_of(root, tmp_path / "cache", context_size=3)
    assert {values for _, values in drawn(dataset)} == {frozenset({1})}


def test_without_dataset_json_the_values_are_the_classes(make_dataset, tmp_path):
    dataset = episodes_of(make_dataset(tmp_path, cases=6, version=None), tmp_path / "cache", context_size=3)
    assert {dataset.draw(number).classes for number in MANY} == {"1", "2", "1+2"}


def test_the_ignore_label_is_never_drawn(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=6, labels={"background": 0, "first": 1, "ignore": 2})
    dataset = episodes_of(root, tmp_path / "cache", context_size=3)
    assert {values for _, values in drawn(dataset)} == {frozenset({1})}


def test_a_class_of_dataset_json_that_no_case_has_is_never_drawn(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=6, labels={"background": 0, "first": 1, "second": 2, "third": 3})
    dataset = episodes_of(root, tmp_path / "cache", context_size=3)
    assert all("third" not in dataset.draw(number).classes for number in MANY)


def test_members_hold_the_class(make_dataset, tmp_path):
    root = erase(make_dataset(tmp_path, cases=12), 2, keep=7)
    dataset = episodes_of(root, tmp_path / "cache", context_size=2, val_fraction=0.1)
    found = set()
    for number in MANY:
        members, values = members_and_values(dataset, number)
        found.add(values)
        assert all(values & set(case["values"]) for case in members)
    assert frozenset({2}) in found


def test_a_class_of_too_few_cases_comes_only_with_others(make_dataset, tmp_path):
    root = erase(make_dataset(tmp_path, cases=8), 2, keep=2)
    dataset = episodes_of(root, tmp_path / "cache", context_size=3, val_fraction=0.1)
    for number in MANY:
        members, values = members_and_values(dataset, number)
        assert 1 in values and len(members) == 4
        assert all(values & set(case["values"]) for case in members)


def test_only_rare_classes_still_give_groups(make_dataset, tmp_path):
    root = erase(erase(make_dataset(tmp_path, cases=8), 2, keep=2), 1, keep=1)
    dataset = episodes_of(root, tmp_path / "cache", context_size=4, val_fraction=0.1)
    assert all(len(cases) == len(set(cases)) == 5 for cases, _ in drawn(dataset, range(10)))


# --- number of contexts


def test_context_size_is_the_same_all_through_an_epoch(episodes):
    dataset = episodes(context_size=[2, 4], groups_per_epoch=5)
    sizes = [len(dataset.draw(number).members) - 1 for number in range(100)]
    by_epoch = [set(sizes[first : first + 5]) for first in range(0, 100, 5)]
    assert all(len(one) == 1 for one in by_epoch)
    assert [one.pop() for one in by_epoch] == [dataset.context_size(epoch) for epoch in range(20)]
    assert set(sizes) == {2, 3, 4}


def test_context_size_hangs_on_seed_and_epoch_only(episodes):
    first, again, other = (
        [episodes(context_size=(1, 4), seed=seed, groups_per_epoch=groups).context_size(e) for e in range(30)]
        for seed, groups in ((1, 5), (1, 7), (2, 5))
    )
    assert first == again != other
    assert set(first) == {1, 2, 3, 4}


@pytest.mark.parametrize("size", [1, 4, [4, 4]])
def test_fixed_context_size(episodes, size):
    dataset = episodes(context_size=size)
    assert {len(cases) - 1 for cases, _ in drawn(dataset)} == {size if isinstance(size, int) else 4}


@pytest.mark.parametrize(
    "settings",
    [{"context_size": 0}, {"context_size": [3, 2]}, {"groups_per_epoch": 0}, {"max_classes": 0}, {"part": "test"}],
)
def test_senseless_settings_are_refused(episodes, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        episodes(**settings)


def test_too_few_cases_says_how_many_and_which_option(episodes):
    # 9 and 7 cases, 30 % for validation: 6 and 5 for training
    with pytest.raises(
        DatasetError,
        match=r"Dataset002_B/0000/label: 5 training cases, .* 5 contexts and a target need 6.*--context_size",
    ):
        episodes(context_size=[2, 5]).prepare()
    episodes(context_size=[2, 4]).prepare()
    with pytest.raises(
        DatasetError, match=r"Dataset002_B/0000/label: 5 training cases, but 6 contexts need 6: .*--val_context_size"
    ):
        episodes("val", context_size=6).prepare()
    episodes("val", context_size=5).prepare()


def test_no_labels_at_all(make_dataset, tmp_path):
    root = erase(erase(make_dataset(tmp_path, cases=6), 1, keep=0), 2, keep=0)
    with pytest.raises(DatasetError, match="Dataset001_Blobs/0000/label: no case has a label other than background"):
        episodes_of(root, tmp_path / "cache").prepare()


def test_no_validation_cases(make_dataset, tmp_path):
    root = make_dataset(tmp_path, cases=4)
    train = list(Collection(str(root), str(tmp_path / "cache"), num_workers=1).part("train"))
    prepared = PreparedCases({"train": train, "val": []}, GRID, str(tmp_path / "cache"), num_workers=1)
    with pytest.raises(DatasetError, match="no cases in the val part: .*--val_fraction"):
        EpisodeDataset([], prepared, "val").prepare()


# --- validation


def test_validation_targets_and_contexts_come_from_their_parts(episodes):
    dataset = episodes("val", context_size=4)
    dataset.prepare()
    parts = {p: {c["case"] for cases in sets.values() for c in cases} for p, sets in dataset.prepared.cases.items()}
    targets = set()
    for (target, *contexts), _ in drawn(dataset):
        assert len(set(contexts)) == 4 and set(contexts) <= parts["train"]
        targets.add(target)
    assert targets == parts["val"]


def test_validation_is_the_same_in_every_run_and_epoch(episodes):
    first = episodes("val", groups_per_epoch=10)
    again = episodes("val", groups_per_epoch=10)
    assert drawn(first, range(10)) == drawn(again, range(10))
    epochs = [[batch["cases"] for batch in DataLoader(first, batch_size=None)] for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert drawn(first, range(10)) != drawn(episodes("val", groups_per_epoch=10, seed=1), range(10))
    longer = episodes("val", groups_per_epoch=20, context_size=3)
    assert drawn(longer, range(10)) == drawn(first, range(10)), "more groups leave the first ones as they are"


def test_validation_targets_hold_the_class(make_dataset, tmp_path):
    root = erase(make_dataset(tmp_path, cases=12), 2, keep=7)
    dataset = episodes_of(root, tmp_path / "cache", "val", context_size=2, val_fraction=0.4)
    for number in MANY:
        members, values = members_and_values(dataset, number)
        assert all(values & set(case["values"]) for case in members)


# --- tensors


@pytest.mark.parametrize("part", ["train", "val"])
def test_tensors(episodes, part):
    dataset = episodes(part, context_size=3)
    for number in range(6):
        group = dataset[number]
        members, classes = dataset.draw(number).members, dataset.draw(number).classes
        assert group["image"].shape == group["label"].shape == (4, 1, *GRID)
        assert group["image"].dtype == torch.float32 and group["label"].dtype == torch.uint8
        assert 0 <= group["image"].min() and group["image"].max() <= 1
        assert set(group["label"].unique().tolist()) == {0, 1}
        assert group["dataset"] == members[0]["dataset"] and group["classes"] == classes
        assert group["cases"].split() == [case["case"] for case in members]


def test_labels_mark_the_drawn_values(episodes):
    dataset = episodes(context_size=2)
    for number in range(10):
        members, values = members_and_values(dataset, number)
        group = dataset[number]
        for member, case in enumerate(members):
            image, label = dataset.prepared.load(case)
            assert torch.equal(group["image"][member], image)
            assert torch.equal(group["label"][member] > 0, sum(label == value for value in values) > 0)


def test_as_episode_takes_one_out():
    group = {"image": torch.arange(8.0).view(2, 4, 1, 1, 1, 1), "label": -torch.arange(8.0).view(2, 4, 1, 1, 1, 1)}
    image, label, contexts, answers = as_episode(group, 2)
    assert image.flatten().tolist() == [2, 6] and label.flatten().tolist() == [-2, -6]
    assert contexts.flatten(1).tolist() == [[0, 1, 3], [4, 5, 7]]
    assert torch.equal(answers, -contexts) and contexts.shape == (2, 3, 1, 1, 1, 1) and image.shape == (2, 1, 1, 1, 1)


def test_as_episode_shows_the_evidence_of_the_contexts_alone():
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 3, 1, 12, 12, 12)
    label[..., 3:8, 3:8, 3:8] = 1
    image = (0.2 + 0.5 * label + 0.05 * torch.rand(label.shape, generator=generator)).clamp(0, 1)
    image[:, 0] = 1 - image[:, 0]  # the target has another contrast, and a label that must not be seen
    group = {"image": image, "label": label, "evidence": torch.tensor([True])}
    target, _, contexts, answers = as_episode(group, 0)
    assert contexts[answers > 0.5].min() > 0.9 and contexts[answers < 0.5].max() < 0.1
    assert target.min() >= 0 and target.max() <= 1
    other = as_episode(group | {"label": label * torch.tensor([0, 1, 1]).view(1, 3, 1, 1, 1, 1)}, 0)
    assert torch.equal(other[0], target) and torch.equal(group["image"], image)
    plain = as_episode(group | {"evidence": torch.tensor([False])}, 0)
    assert torch.equal(plain[0], image[:, 0]) and torch.equal(plain[2], image[:, 1:])


# --- loading


def test_epochs_have_their_own_groups(episodes):
    dataset = episodes(groups_per_epoch=6)
    assert len(dataset) == 6
    sampler = GroupSampler(dataset)
    assert list(sampler) == [0, 1, 2, 3, 4, 5] and len(sampler) == 6
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8, 9, 10, 11]
    assert drawn(dataset, range(6)) != drawn(dataset, range(6, 12))


@pytest.mark.parametrize("epoch", [1, 3])
def test_ranks_share_an_epoch(episodes, epoch):
    dataset = episodes(groups_per_epoch=8)
    shares = [GroupSampler(dataset, num_replicas=2, rank=rank) for rank in (0, 1)]
    for share in shares:
        share.set_epoch(epoch)
    numbers = [list(share) for share in shares]
    assert not set(numbers[0]) & set(numbers[1])
    assert sorted(numbers[0] + numbers[1]) == list(range(8 * (epoch - 1), 8 * epoch))


def test_ranks_have_equally_many_groups_where_they_do_not_divide(episodes):
    dataset = episodes(groups_per_epoch=7, context_size=[2, 4])
    numbers = [list(GroupSampler(dataset, num_replicas=3, rank=rank)) for rank in range(3)]
    assert {len(share) for share in numbers} == {3}
    assert set(sum(numbers, [])) == set(range(7))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_worker_process_gives_the_same_batches(episodes, batch_size):
    batches = []
    for workers in (0, 1):
        dataset = episodes(groups_per_epoch=4, context_size=[2, 4], seed=3)
        dataset.prepare()
        sampler = GroupSampler(dataset)
        sampler.set_epoch(2)
        batches.append(list(DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers)))
    for here, there in zip(*batches, strict=True):
        assert here["cases"] == there["cases"]
        assert torch.equal(here["image"], there["image"]) and torch.equal(here["label"], there["label"])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_groups_are_collated_as_pytorch_would(episodes, num_workers, batch_size):
    dataset = episodes(context_size=2, groups_per_epoch=2)
    dataset.prepare()
    settings = {"batch_size": batch_size, "num_workers": num_workers}
    ours = list(DataLoader(dataset, collate_fn=collate_groups, **settings))
    for batch, expected in zip(ours, DataLoader(dataset, **settings), strict=True):
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key
            else:
                assert batch[key] == value, key
        assert batch["image"].is_contiguous() and batch["image"].is_shared() == bool(num_workers)


def test_masks_and_images_share_a_batch(episodes):
    mask = episodes(context_size=2)[0]
    image = {**mask, "label": mask["image"]}
    batch = collate_groups([mask, image])
    assert batch["label"].dtype == torch.float32
    assert torch.equal(batch["label"], torch.stack([mask["label"].float(), mask["image"]]))
    assert all(x.dtype == torch.float32 for x in as_episode(collate_groups([mask]), 0))


def test_a_batch_of_one_group_is_not_copied(episodes):
    group = episodes(context_size=2)[0]
    assert collate_groups([group])["image"].data_ptr() == group["image"].data_ptr()


def test_groups_that_are_done_are_left_out_of_their_epoch_alone(episodes):
    dataset = episodes(context_size=2, groups_per_epoch=6)
    shares = [GroupSampler(dataset, num_replicas=2, rank=rank) for rank in (0, 1)]
    for sampler in shares:
        sampler.skip(epoch=3, groups=2)
    numbers = []
    for epoch in (2, 3, 4):
        for sampler in shares:
            sampler.set_epoch(epoch)
        numbers.append(sorted(number for sampler in shares for number in sampler))
    assert numbers == [[6, 7, 8, 9, 10, 11], [16, 17], [18, 19, 20, 21, 22, 23]]
    assert len(shares[0]) == 3, "an epoch keeps its length"
