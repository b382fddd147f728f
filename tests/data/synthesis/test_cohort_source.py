"""Groups from cohorts that are made when they are needed."""

from __future__ import annotations

import pytest
import torch

from scripts.data import Collection, EpisodeDataset, PreparedCases, SyntheticCohorts


def episodes(tmp_path, part="train", tasks=None, seed=0, size=16, **options):
    collection = Collection(None, str(tmp_path), tasks=tasks)
    parts = {name: collection.part(name) for name in ("train", "val")}
    prepared = PreparedCases(parts, (size,) * 3, str(tmp_path))
    cohorts = SyntheticCohorts(size)
    dataset = EpisodeDataset(parts[part], prepared, part, rows=collection.rows, cohorts=cohorts, seed=seed, **options)
    dataset.prepare()
    return dataset


def test_groups_need_no_files(tmp_path):
    dataset = episodes(tmp_path, context_size=2)
    group = dataset[0]
    assert group["image"].shape == group["label"].shape == (3, 1, 16, 16, 16)
    assert set(group["label"].unique().tolist()) == {0, 1}
    assert group["dataset"] == "synthetic" and group["classes"]
    assert group["cases"] == "cohort0_0 cohort0_1 cohort0_2"
    assert list(tmp_path.iterdir()) == []


def test_a_number_is_a_group_in_any_process_and_order(tmp_path):
    first, second = episodes(tmp_path), episodes(tmp_path)
    forward = [first[number]["image"] for number in (0, 1, 2)]
    backward = [second[number]["image"] for number in (2, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward[::-1], strict=True))
    assert not torch.equal(forward[0], forward[1])


def test_epochs_seeds_and_parts_have_cohorts_of_their_own(tmp_path):
    training = episodes(tmp_path, groups_per_epoch=2)
    others = (training[2], episodes(tmp_path, seed=1)[0], episodes(tmp_path, "val")[0])
    assert all(not torch.equal(training[0]["image"], other["image"]) for other in others)
    assert torch.equal(episodes(tmp_path, "val")[5]["image"], episodes(tmp_path, "val")[5]["image"])


@pytest.mark.parametrize("task", ["modality_transfer", "gaussian_denoising", "inpainting"])
def test_generation_tasks(tmp_path, task):
    group = episodes(tmp_path, tasks=[task], context_size=1)[0]
    assert group["generation"] and group["task"] == task and group["classes"] == ""
    assert group["label"].unique().numel() > 10
    assert (group["image"] - group["label"]).abs().mean() > 0.005


def test_bad_settings_are_named_before_training(tmp_path):
    with pytest.raises(ValueError, match="label_map_share must be from 0 to 1, got 2"):
        SyntheticCohorts(16, label_map_share=2)
    with pytest.raises(ValueError, match=r"cohort_spread must be two numbers \[low, high\] from 0 to 1, got \[0.5\]"):
        SyntheticCohorts(16, spread=[0.5])
    with pytest.raises(FileNotFoundError, match="no label maps in"):
        SyntheticCohorts(16, label_maps=str(tmp_path / "none")).prepare()
    with pytest.raises(ValueError, match="spatial_size"):
        episodes(tmp_path, size=4)
