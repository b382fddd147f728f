"""Dice on brains that were never trained on, in contrasts that were never seen, against averaging the contexts' labels.

    python -m benchmarks.unseen_brains --label_maps MAPS --held_out "['brain_05','brain_10','brain_15','brain_20']" \
        --checkpoint WEIGHTS.pt [--context_sizes "[1,4,8]" --contrasts 6]

Targets are the held-out people, contexts other people of the folder, all in one made-up contrast, another one each
time. The grid shows the box around ten structures (:data:`STRUCTURES`), left and right as one; values of FreeSurfer's
table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.unseen_cohorts import label_scores
from benchmarks.unseen_dataset import interval
from scripts.checkpoint import load_network
from scripts.data.synthesis.cohort import show_anatomy
from scripts.data.synthesis.label_map_anatomy import LabelMaps
from scripts.runtime.commandline import main

STRUCTURES = {
    "lateral ventricle": (4, 43),
    "thalamus": (10, 49),
    "caudate": (11, 50),
    "putamen": (12, 51),
    "pallidum": (13, 52),
    "third ventricle": (14,),
    "brain stem": (16,),
    "hippocampus": (17, 53),
    "amygdala": (18, 54),
    "ventral diencephalon": (28, 60),
}


def unseen_brains(
    checkpoint: str,
    label_maps: str,
    held_out: Sequence[str],
    context_sizes: Sequence[int] = (1, 4, 8),
    contrasts: int = 6,
    spread: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Print mean Dice over targets and structures for each K, then for each structure, with 95 % intervals.

    Args:
        checkpoint: weights; the cohorts are made on their grid.
        label_maps: folder of label maps.
        held_out: names of the targets' files, without ending; the others give the contexts.
        context_sizes: numbers of contexts K.
        contrasts: made-up contrasts of every target.
        spread: how far the people are put apart, see ``--cohort_spread``.
        seed: of contrasts, contexts and poses.
        device: where to compute.
    """
    network = load_network(checkpoint).to(device).eval()
    grid, maps = network.grid.tolist(), LabelMaps(label_maps)
    others = [name for name in maps.names if name not in held_out]
    scores = {size: [] for size in context_sizes}
    episodes = [(target, contrast) for target in held_out for contrast in range(contrasts)]
    for target, contrast in tqdm(episodes, "brains"):
        key = (seed, maps.names.index(target), contrast)
        drawn = np.random.default_rng(key).choice(others, max(context_sizes), replace=False).tolist()
        people = [target, *drawn]
        cohort = show_anatomy(key, maps.of(people, list(STRUCTURES.values()), grid), len(people), grid, spread)
        masks = torch.stack([cohort.labels == k + 1 for k in range(len(STRUCTURES))]).float()
        for size in context_sizes:
            scores[size].append(label_scores(network, cohort.images, masks, size))
    for size, found in scores.items():
        ours, averaging = np.moveaxis(np.stack(found), -1, 0)
        print(
            "K={:<2d} network {:.3f} [{:.3f}, {:.3f}]".format(size, *interval(ours.mean(1))),
            f" averaging {averaging.mean():.3f}",
            " gain {:+.3f} [{:+.3f}, {:+.3f}]".format(*interval((ours - averaging).mean(1))),
            f" {len(held_out)} people in {contrasts} contrasts each",
        )
        for name, dice in zip(STRUCTURES, ours.T, strict=True):
            print("     {:22s} {:.3f} [{:.3f}, {:.3f}]".format(name, *interval(dice)))


if __name__ == "__main__":
    main(unseen_brains)
