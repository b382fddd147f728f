"""What cohorts promise to whoever learns from them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from scripts.data.synthesis import cohort as synthesis
from scripts.data.synthesis import subject_pose as pose
from scripts.data.synthesis.cohort import LESION, MIN_LABEL_FRACTION, synthesize_cohort

COHORTS = range(6)


@pytest.fixture(scope="module")
def cohorts():
    return [synthesize_cohort((11, i), 4, 24) for i in COHORTS]


@pytest.fixture(scope="module")
def unmoved():
    """The same anatomies, all subjects in nearly one pose."""
    return [synthesize_cohort((11, i), 4, 24, spread=0.1) for i in COHORTS]


def structures(cohort):
    """Label numbers of what every subject has."""
    return [k for k, name in enumerate(cohort.names, start=1) if name != LESION]


def dice(a, b):
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def averaging(cohorts):
    """Dice of each label of each subject with the mean of the others' labels."""
    scores = []
    for cohort in cohorts:
        for k in structures(cohort):
            masks = cohort.labels == k
            for s in range(len(masks)):
                others = torch.cat([masks[:s], masks[s + 1 :]]).float().mean(0) >= 0.5
                scores.append(dice(masks[s], others))
    return np.mean(scores)


def label_means(cohort):
    """Mean intensity (subjects, structures)."""
    return torch.tensor(
        [
            [image[label == k].mean() for k in structures(cohort)]
            for image, label in zip(cohort.images, cohort.labels, strict=True)
        ]
    )


def test_shapes_and_types(cohorts):
    for images, labels, names in cohorts:
        assert images.shape == labels.shape == (4, 1, 24, 24, 24)
        assert images.dtype == torch.float32 and labels.dtype == torch.uint8
        assert len(names) == 4 and len(set(names)) == 4


@pytest.mark.parametrize("size", [16, (16, 24, 32), [32, 16, 16], np.int64(16)])
def test_grid_sizes(size):
    images, labels, _ = synthesize_cohort(0, 1, size, 2)
    assert images.shape == labels.shape == (1, 1, *((16, 16, 16) if isinstance(size, (int, np.integer)) else size))


@pytest.mark.parametrize("seed", [0, 5, (5, 1), [2, 0, 7]])
def test_repeats_exactly(seed):
    first, second = (synthesize_cohort(seed, 2, 16, 2) for _ in range(2))
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_seeds_differ():
    made = [synthesize_cohort(seed, 1, 16, 2) for seed in (0, 1, (0, 1), (1, 1))]
    for a, b in combinations(made, 2):
        assert not torch.equal(a.images, b.images) and not torch.equal(a.labels, b.labels)


def test_global_random_state_is_neither_used_nor_touched():
    torch.manual_seed(1)
    np.random.seed(1)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = synthesize_cohort(0, 1, 16, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)
    torch.manual_seed(2)
    assert torch.equal(first.images, synthesize_cohort(0, 1, 16, 2).images)


@pytest.mark.parametrize(("num_labels", "size"), [(1, 16), (2, 16), (8, 24), (15, 24)])
def test_no_subject_lacks_a_structure(num_labels, size):
    for seed in range(3):
        cohort = synthesize_cohort(seed, 2, size, num_labels)
        assert len(cohort.names) == num_labels and cohort.labels.max() <= num_labels
        for label in cohort.labels:
            shares = [(label == k).float().mean().item() for k in structures(cohort)]
            assert min(shares) >= MIN_LABEL_FRACTION / 2 and max(shares) < 0.6


def test_a_pose_that_would_lose_a_label_is_weakened(monkeypatch):
    monkeypatch.setattr(pose, "_SHIFT", 3.0)
    for seed in range(3):
        cohort = synthesize_cohort(seed, 3, 16, 2)
        assert all((label == k).any() for label in cohort.labels for k in structures(cohort))


def test_lesions_come_and_go():
    found = [c for c in (synthesize_cohort((5, i), 3, 12, 2) for i in range(30)) if LESION in c.names]
    assert 0 < len(found) < 15
    present = [bool((label == 2).any()) for cohort in found for label in cohort.labels]
    assert any(present) and not all(present)


def test_intensities_are_those_of_preprocessed_images(cohorts):
    for images, *_ in cohorts:
        assert images.isfinite().all() and images.min() == 0 and images.max() == 1
        assert images.std() > 0.05


def test_contrast_differs_between_cohorts_and_hardly_within(cohorts):
    within = np.mean([label_means(cohort).std(0).mean() for cohort in cohorts])
    between = torch.stack([label_means(cohort).mean(0)[:3] for cohort in cohorts]).std(0).mean()
    assert between > 0.15 and within < 0.5 * between


def test_structures_are_told_apart_by_what_is_seen(cohorts):
    contrasts = []
    for cohort in cohorts:
        for image, label in zip(cohort.images, cohort.labels, strict=True):
            for k in structures(cohort):
                mask = label == k
                near = torch.nn.functional.max_pool3d(mask.float(), 5, stride=1, padding=2) > 0
                contrasts.append((image[mask].mean() - image[near & ~mask].mean()).abs())
    assert torch.stack(contrasts).median() > 0.08


def test_labels_correspond_across_subjects(unmoved):
    same, other = [], []
    for cohort in unmoved:
        for a, b in combinations(range(4), 2):
            for k in structures(cohort):
                for m in structures(cohort):
                    (same if k == m else other).append(dice(cohort.labels[a] == k, cohort.labels[b] == m))
    assert np.mean(same) > 0.6 and np.mean(other) < 0.1


def test_averaging_the_other_subjects_fails(cohorts, unmoved):
    assert averaging(cohorts) < 0.4 < 0.6 < averaging(unmoved)


def test_modalities_show_the_same_anatomy_in_another_contrast():
    cohort = synthesize_cohort(3, 2, 16, 2, modalities=2)
    assert cohort.images.shape == (2, 2, 16, 16, 16) and cohort.labels.shape == (2, 1, 16, 16, 16)
    first, second = cohort.images.unbind(1)
    assert (first - second).abs().mean() > 0.05
    alone = synthesize_cohort(3, 2, 16, 2)
    assert torch.equal(alone.labels, cohort.labels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"subjects": 0}, "subjects must be a whole number of at least 1, got 0"),
        ({"subjects": 2.5}, "subjects"),
        ({"subjects": True}, "subjects"),
        ({"spatial_size": 4}, "spatial_size must be a whole number of at least 8, got 4"),
        ({"spatial_size": (32, 32, 4)}, "spatial_size"),
        ({"num_labels": 0}, "num_labels must be a whole number from 1 to 15, got 0"),
        ({"num_labels": 16}, "num_labels"),
        ({"modalities": 0}, "modalities"),
        ({"label_map_share": 1.5}, "label_map_share"),
        ({"spread": -0.1}, "spread must be from 0 to 1, got -0.1"),
        ({"seed": -1}, "non-negative"),
    ],
)
def test_refuses_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        synthesize_cohort(**({"seed": 0, "subjects": 1, "spatial_size": 16} | arguments))


def test_says_so_when_the_labels_do_not_fit(monkeypatch):
    monkeypatch.setattr(synthesis, "MIN_LABEL_FRACTION", 0.2)
    with pytest.raises(ValueError, match=r"4 labels do not fit into a grid of \(12, 12, 12\)"):
        synthesize_cohort(0, 1, 12, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_runs_on_a_gpu():
    cohort = synthesize_cohort(0, 2, 32, device="cuda")
    assert cohort.images.is_cuda and cohort.labels.is_cuda
    assert torch.equal(cohort.images, synthesize_cohort(0, 2, 32, device="cuda").images)
