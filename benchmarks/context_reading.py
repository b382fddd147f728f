"""Does the network read its contexts: what happens to the prediction when they say something else.

    python -m benchmarks.context_reading --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        [--part development --context_size 4 --cases 12]

On the cases of ``benchmarks.unseen_dataset``. Every label of every target is asked for with contexts that show it, that
show another label instead, that have each other's labels, and that have empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import compute_dice
from torch import Tensor
from tqdm import tqdm

from benchmarks.unseen_dataset import UnseenCases, interval
from scripts.checkpoint import load_network
from scripts.data.label_decision import MASK_THRESHOLD
from scripts.inference.context_source import gather_contexts
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main

MEANINGS = {
    "shown": "Dice, contexts that show the label",
    "other": "Dice against the label, contexts that show another one",
    "shuffled": "Dice, contexts with each other's labels",
    "empty": "share of the target that is marked, contexts with empty labels",
}


def context_reading(
    dataset_dir: str,
    checkpoint: str,
    part: str = "development",
    context_size: int = 4,
    cases: int | None = None,
    alignments: Sequence[str] = ("aligned", "misaligned"),
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Print means over cases and labels on the network's grid, with 95 % intervals over the cases.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights.
        part: development or reporting.
        context_size: contexts K, at least 2.
        cases: at most so many targets.
        alignments: aligned, misaligned or both.
        seed: of contexts and misalignments.
        device: where to compute.

    Raises:
        ValueError: fewer than two contexts: one has no other one's label to take.
    """
    if context_size < 2:
        raise ValueError(f"--context_size must be at least 2, got {context_size}")
    network = load_network(checkpoint).to(device).eval()
    unseen = UnseenCases(dataset_dir, part, cases, seed)
    spacing = unseen.spacing(network.grid.tolist())
    for alignment in alignments:
        found = {name: [] for name in MEANINGS}
        for target, pool in tqdm(unseen.episodes(alignment), alignment, total=len(unseen.targets)):
            pairs = [target, *pool[:context_size]]
            names = [f"pair {number}" for number in range(len(pairs))]
            images, labels = gather_contexts(names, pairs, network.grid.tolist(), spacing, False).pairs()
            for name, value in readings(network, images, labels).items():
                found[name].append(value)
        for name, values in found.items():
            mean, low, high = interval(values)
            print(f"{alignment:10s} {MEANINGS[name]:62s} {mean:.3f} [{low:.3f}, {high:.3f}]  {len(values)} cases")


def readings(network: Neuroverse3D, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What the network makes of a target and its contexts, by the names of :data:`MEANINGS`; means over the labels.

    Args:
        network: on any device.
        images: (1 + K, 1, H, W, D) in [0, 1], the target first.
        labels: label numbers of the same shape, at least two different ones besides 0.
    """
    values = [int(value) for value in labels.unique() if value]
    masks = {value: (labels == value).float() for value in values}
    found = {name: [] for name in MEANINGS}
    for number, mask in enumerate(masks.values()):
        shown, wanted = mask[1:], mask[:1]
        other = masks[values[(number + 1) % len(values)]][1:]
        predictions = {
            name: _mask(network, images, context_labels)
            for name, context_labels in {
                "shown": shown,
                "other": other,
                "shuffled": shown.roll(1, dims=0),
                "empty": torch.zeros_like(shown),
            }.items()
        }
        for name, prediction in predictions.items():
            found[name].append(
                prediction.mean().item()
                if name == "empty"
                else compute_dice(prediction, wanted, ignore_empty=False).item()
            )
    return {name: float(np.mean(scores)) for name, scores in found.items()}


def _mask(network: Neuroverse3D, images: Tensor, labels: Tensor) -> Tensor:
    device = network.grid.device
    with torch.inference_mode():
        scores = network(images[:1].to(device), images[None, 1:].to(device), labels[None].to(device))
    return (scores.cpu() > MASK_THRESHOLD).float()


if __name__ == "__main__":
    main(context_reading)
