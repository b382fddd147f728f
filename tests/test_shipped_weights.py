"""The weights that come with the bundle: small, safe to load, and better than looking at no image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from benchmarks.pretrained import label_scores
from scripts.checkpoint import load_network, read_checkpoint
from scripts.data.synthesis.cohort import synthesize_cohort

WEIGHTS = Path("models/model.pt")
SIZE = (24, 32, 24)
COHORTS = range(2_000_000, 2_000_003)
"""Seeds that neither training nor a benchmark uses."""


@pytest.fixture(scope="module")
def network():
    return load_network(WEIGHTS)


@pytest.fixture(scope="module")
def cohorts():
    """Close subjects of three made-up anatomies: five of each, with two structures."""
    return [synthesize_cohort(seed, 5, SIZE, 2, spread=0.2) for seed in COHORTS]


def masks_of(cohort, label):
    return (cohort.labels == label).float()


def predict(network, cohort, contexts):
    with torch.inference_mode():
        return network(cohort.images[:1], cohort.images[None, 1:], contexts[None])


def test_the_file_is_small_and_what_the_model_card_says(network):
    assert WEIGHTS.stat().st_size < 25e6
    assert network.channels == (16, 32, 64, 128) and network.grid.tolist() == [40, 56, 40]
    assert sum(p.numel() for p in network.parameters()) == 4_409_857
    state = read_checkpoint(WEIGHTS)
    assert {value.dtype for key, value in state.items() if key != "grid"} == {torch.float16}


def test_they_read_the_images_of_new_anatomies(network, cohorts):
    scores = [
        label_scores(network, cohort.images, torch.stack([masks_of(cohort, 1), masks_of(cohort, 2)]), 4)
        for cohort in cohorts
    ]
    ours, averaging = np.concatenate(scores).mean(0)
    assert ours > averaging + 0.1


def test_the_contexts_say_what_is_wanted(network, cohorts):
    for cohort in cohorts:
        wanted = [masks_of(cohort, k)[:1] for k in (1, 2)]
        answers = [(predict(network, cohort, masks_of(cohort, k)[1:]) > 0.5).float() for k in (1, 2)]
        dice = [[compute_dice(answer, mask).item() for mask in wanted] for answer in answers]
        assert dice[0][0] > dice[0][1] and dice[1][1] > dice[1][0]


def test_nothing_shown_gives_next_to_nothing(network, cohorts):
    for cohort in cohorts:
        marked = predict(network, cohort, torch.zeros_like(masks_of(cohort, 1)[1:])) > 0.5
        assert marked.float().mean() < 0.01
