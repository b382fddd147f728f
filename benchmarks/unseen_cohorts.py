"""Dice on new synthetic cohorts, against averaging the contexts' labels.

    python -m benchmarks.unseen_cohorts --checkpoint WEIGHTS.pt [--cohorts 24 --label_maps DIR --maps "[brain_05]"]

Cohorts are made on the checkpoint's grid, with seeds that no training uses. With ``--label_maps`` their anatomies are
those of real subjects; ``--maps`` names the files to use, such as those that training held out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_dice
from tqdm import trange

from benchmarks.unseen_dataset import interval
from scripts.checkpoint import load_network
from scripts.data.label_decision import MASK_THRESHOLD
from scripts.data.synthesis.cohort import LESION, synthesize_cohort
from scripts.data.synthesis.label_map_anatomy import LabelMaps, map_names
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main

SEED = 10**6
"""Of the first cohort; those of training begin with the run's seed."""


def unseen_cohorts(
    checkpoint: str,
    cohorts: int = 24,
    context_sizes: Sequence[int] = (1, 4, 8),
    label_maps: str | None = None,
    maps: Sequence[str] = (),
    device: str = "cpu",
) -> None:
    """Print mean Dice over cohorts and labels, and its gain over averaging, with 95 % intervals over the cohorts.

    Args:
        checkpoint: weights.
        cohorts: how many cohorts; in each, one subject is the target.
        context_sizes: numbers of contexts K.
        label_maps: folder of label maps to take the anatomies from; made up without.
        maps: names of the label maps to use, without ending; all without.
        device: where to compute.
    """
    known = None
    if label_maps:
        known = LabelMaps(label_maps, [name for name in map_names(label_maps) if maps and name not in maps])
    for row in measure(load_network(checkpoint).to(device), cohorts, context_sizes, known):
        print(
            "K={context_size:<2d} network {network[0]:.3f} [{network[1]:.3f}, {network[2]:.3f}]  "
            "averaging {averaging[0]:.3f}  gain {gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]".format(**row)
        )


def measure(
    network: Neuroverse3D, cohorts: int, context_sizes: Sequence[int], label_maps: LabelMaps | None = None
) -> list[dict]:
    """Rows ``context_size`` and (mean, low, high) of ``network``, ``averaging`` and ``gain``."""
    scores = {size: [] for size in context_sizes}
    device = next(network.parameters()).device
    for number in trange(cohorts, desc="cohorts"):
        cohort = synthesize_cohort(
            (SEED, number), 1 + max(context_sizes), network.grid.tolist(), 3, label_maps=label_maps, device=device
        )
        values = [k for k, name in enumerate(cohort.names, start=1) if name != LESION]
        masks = torch.stack([cohort.labels == k for k in values]).float()  # (labels, N, 1, H, W, D)
        for size in context_sizes:
            scores[size].append(label_scores(network, cohort.images, masks, size).mean(0))
    rows = []
    for size, found in scores.items():
        ours, averaging = np.array(found).T
        row = {"network": interval(ours), "averaging": interval(averaging), "gain": interval(ours - averaging)}
        rows.append({"context_size": size} | row)
    return rows


def label_scores(network: Neuroverse3D, images: torch.Tensor, masks: torch.Tensor, size: int) -> np.ndarray:
    """Dice of each label of a cohort's first subject, (labels, 2): of the network, and of averaging the contexts.

    Args:
        network: on any device.
        images: (N, 1, H, W, D) of the cohort.
        masks: (labels, N, 1, H, W, D), 1 where the label is.
        size: contexts K: the subjects after the first.
    """
    device, found = network.grid.device, []
    target, contexts = images[:1].to(device), images[None, 1 : size + 1].to(device)
    for mask in masks.to(device):
        shown, wanted = mask[1 : size + 1], mask[:1]
        with torch.inference_mode():
            prediction = network(target, contexts, shown[None])
        found.append([_dice(scores, wanted) for scores in (prediction, shown.mean(0, keepdim=True))])
    return np.array(found)


def _dice(scores: torch.Tensor, wanted: torch.Tensor) -> float:
    return compute_dice((scores > MASK_THRESHOLD).float(), wanted, ignore_empty=False).item()


if __name__ == "__main__":
    main(unseen_cohorts)
