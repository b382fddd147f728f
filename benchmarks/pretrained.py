"""The network alone, on its own grid: anatomies and contrasts that it has never seen, and whether it reads contexts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.metrics import PSNRMetric, compute_dice
from torch import Tensor
from tqdm import tqdm

from benchmarks.hippocampus import ALIGNMENTS, SHIPPED, Hippocampus, Pair, interval, weights
from benchmarks.measure import Row, Run, work
from benchmarks.product import gain_row
from scripts.checkpoint import load_network
from scripts.data.label_decision import MASK_THRESHOLD
from scripts.data.synthesis.cohort import LESION, synthesize_cohort
from scripts.data.synthesis.label_map_anatomy import LabelMaps, map_names
from scripts.data.tasks import find_task
from scripts.inference.context_source import gather_contexts
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import main

SEED = 10**6
"""Of the first cohort; those of training begin with the run's seed."""
_PURPOSE = 3  # of the random numbers of restoration, besides those of benchmarks.hippocampus
MEANINGS = {
    "shown": "contexts that show the label",
    "other": "contexts that show another label",
    "shuffled": "contexts with each other's labels",
    "empty": "contexts with empty labels",
}


@work
def cohorts(
    run: Run,
    checkpoint: str = SHIPPED,
    cohorts: int = 24,
    context_sizes: Sequence[int] = (1, 4, 8),
    label_maps: str | None = None,
    maps: Sequence[str] = (),
) -> Iterator[Row]:
    """Dice on new synthetic cohorts, and its gain over averaging the contexts' labels; intervals over the cohorts.

    Cohorts are made on the checkpoint's grid, with seeds that no training uses; in each, one subject is the target.

    Args:
        run: how it is run.
        checkpoint: weights.
        cohorts: how many cohorts.
        context_sizes: numbers of contexts K.
        label_maps: folder of label maps to take the anatomies from; made up without.
        maps: names of the label maps to use, without ending, such as those that training held out; all without.
    """
    if run.quick:
        cohorts, context_sizes = 2, (1,)
    network, known, data = load_network(checkpoint).to(run.device), None, f"{cohorts} made-up cohorts"
    if label_maps:
        known = LabelMaps(label_maps, [name for name in map_names(label_maps) if maps and name not in maps])
        data = f"{cohorts} cohorts of label maps"
    scores = {size: [] for size in context_sizes}
    for number in tqdm(range(cohorts), "cohorts"):
        cohort = synthesize_cohort(
            (SEED, number), 1 + max(context_sizes), network.grid.tolist(), 3, label_maps=known, device=run.device
        )
        values = [k for k, name in enumerate(cohort.names, start=1) if name != LESION]
        masks = torch.stack([cohort.labels == k for k in values]).float()  # (labels, N, 1, H, W, D)
        for size, found in scores.items():
            found.append(label_scores(network, cohort.images, masks, size).mean(0))
    for size, found in scores.items():
        yield gain_row(f"K={size}", np.array(found), data + weights(checkpoint))


@work
def restoration(
    run: Run,
    cases: Hippocampus,
    checkpoint: str = SHIPPED,
    tasks: Sequence[str] = ("gaussian_denoising", "inpainting", "bias_correction"),
    context_size: int = 4,
) -> Iterator[Row]:
    """PSNR gained over the corrupted input, on scans that were never trained on.

    Target and contexts are corrupted by the training's own transforms, with one severity for each episode, and the
    contexts' clean images are their outputs.

    Args:
        run: how it is run.
        cases: targets.
        checkpoint: weights.
        tasks: corruption tasks, see docs/training.md.
        context_size: contexts K.
    """
    network, psnr = load_network(checkpoint).to(run.device).eval(), PSNRMetric(max_val=1.0)
    found = {name: [] for name in tasks}
    for number, (clean, _) in enumerate(_on_grid(network, cases, "aligned", context_size)):
        for name, values in found.items():
            task, rng = find_task(name), np.random.default_rng([cases.seed, _PURPOSE, number])
            setting = task.setting(rng)
            corrupted = torch.stack([task(image, None, setting, rng)[0] for image in clean])
            prediction = _predict(network, corrupted, clean[1:]).clamp(0, 1)
            values.append([psnr(image, clean[:1]).item() for image in (corrupted[:1], prediction)])
    data = f"{cases.described}, K={context_size}{weights(checkpoint)}"
    for name, values in found.items():
        before, after = np.array(values).T
        case, figures = name.replace("_", " "), {"psnr": after.mean(), "psnr_gain": interval(after - before)}
        yield Row(case, {"psnr": before.mean()}, data, "corrupted")
        yield Row(case, figures, data, "restored")


@work
def reading(
    run: Run,
    cases: Hippocampus,
    checkpoint: str = SHIPPED,
    context_size: int = 4,
    alignments: Sequence[str] = ALIGNMENTS,
) -> Iterator[Row]:
    """Dice against the label that is wanted, by what the contexts show instead: does the network read them?

    Args:
        run: how it is run.
        cases: targets.
        checkpoint: weights.
        context_size: contexts K, at least 2.
        alignments: aligned, misaligned or both.

    Raises:
        ValueError: fewer than two contexts: one has no other one's label to take.
    """
    if context_size < 2:
        raise ValueError(f"--context_size must be at least 2, got {context_size}")
    network = load_network(checkpoint).to(run.device).eval()
    for alignment in alignments:
        found = [readings(network, *pairs) for pairs in _on_grid(network, cases, alignment, context_size)]
        data = f"{cases.described}, {alignment}, K={context_size}{weights(checkpoint)}"
        for name, meaning in MEANINGS.items():
            figure = "marked" if name == "empty" else "dice"
            yield Row(meaning, {figure: interval([one[name] for one in found])}, data)


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
        given = {
            "shown": shown,
            "other": masks[values[(number + 1) % len(values)]][1:],
            "shuffled": shown.roll(1, dims=0),
            "empty": torch.zeros_like(shown),
        }
        for name, context_labels in given.items():
            scores = _predict(network, images, context_labels)
            found[name].append(
                (scores > MASK_THRESHOLD).float().mean().item() if name == "empty" else _dice(scores, wanted)
            )
    return {name: float(np.mean(scores)) for name, scores in found.items()}


def label_scores(network: Neuroverse3D, images: Tensor, masks: Tensor, size: int) -> np.ndarray:
    """Dice of each label of a cohort's first subject, (labels, 2): of the network, and of averaging the contexts.

    Args:
        network: on any device.
        images: (N, 1, H, W, D) of the cohort.
        masks: (labels, N, 1, H, W, D), 1 where the label is.
        size: contexts K: the subjects after the first.
    """
    found = []
    for mask in masks.cpu():
        shown, wanted = mask[1 : size + 1], mask[:1]
        scores = _predict(network, images[: size + 1], shown), shown.mean(0, keepdim=True)
        found.append([_dice(one, wanted) for one in scores])
    return np.array(found)


def _on_grid(
    network: Neuroverse3D, cases: Hippocampus, alignment: str, context_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and label numbers (1 + K, 1, H, W, D) of every target with its contexts, the target first."""
    grid = network.grid.tolist()
    spacing = cases.spacing(grid)
    for target, pool in tqdm(cases.episodes(alignment), alignment, total=len(cases.targets)):
        pairs: list[Pair] = [target, *pool[:context_size]]
        names = [f"pair {number}" for number in range(len(pairs))]
        yield gather_contexts(names, pairs, grid, spacing, False).pairs()


def _predict(network: Neuroverse3D, images: Tensor, outputs: Tensor) -> Tensor:
    """Scores (1, 1, H, W, D) of the first image, the others being contexts with these outputs."""
    device = network.grid.device
    with torch.inference_mode():
        return network(images[:1].to(device), images[None, 1:].to(device), outputs[None].to(device)).cpu()


def _dice(scores: Tensor, wanted: Tensor) -> float:
    return compute_dice((scores > MASK_THRESHOLD).float(), wanted, ignore_empty=False).item()


WORKS = {"cohorts": cohorts, "restoration": restoration, "reading": reading}

if __name__ == "__main__":
    main(WORKS)
