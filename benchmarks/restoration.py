"""PSNR gained over the corrupted input on a dataset that was never trained on: denoising, inpainting, bias correction.

    python -m benchmarks.restoration --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        [--part development --context_size 4 --cases 12]

On the cases of ``benchmarks.unseen_dataset`` and the network's grid. Target and contexts are corrupted by the
training's own transforms, with one severity for each episode, and the contexts' clean images are their outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics import PSNRMetric
from tqdm import tqdm

from benchmarks.unseen_dataset import UnseenCases, interval
from scripts.checkpoint import load_network
from scripts.data.tasks import find_task
from scripts.inference.context_source import gather_contexts
from scripts.runtime.commandline import main

_PURPOSE = 3  # of the random numbers, besides those of benchmarks.unseen_dataset


def restoration(
    dataset_dir: str,
    checkpoint: str,
    part: str = "development",
    tasks: Sequence[str] = ("gaussian_denoising", "inpainting", "bias_correction"),
    context_size: int = 4,
    cases: int | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Print mean PSNR before and after, and the gain with its 95 % interval over the cases.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights.
        part: development or reporting.
        tasks: corruption tasks, see docs/training.md.
        context_size: contexts K.
        cases: at most so many targets.
        seed: of contexts, severities and corruptions.
        device: where to compute.
    """
    network = load_network(checkpoint).to(device).eval()
    grid, psnr = network.grid.tolist(), PSNRMetric(max_val=1.0)
    unseen = UnseenCases(dataset_dir, part, cases, seed)
    spacing = unseen.spacing(grid)
    found = {name: [] for name in tasks}
    for number, (target, pool) in enumerate(tqdm(unseen.episodes("aligned"), total=len(unseen.targets))):
        pairs = [target, *pool[:context_size]]
        names = [f"pair {index}" for index in range(len(pairs))]
        clean, _ = gather_contexts(names, pairs, grid, spacing).pairs()
        for name, values in found.items():
            task, rng = find_task(name), np.random.default_rng([seed, _PURPOSE, number])
            setting = task.setting(rng)
            corrupted = torch.stack([task(image, None, setting, rng)[0] for image in clean])
            with torch.inference_mode():
                pair = corrupted[None, 1:].to(device), clean[None, 1:].to(device)
                prediction = network(corrupted[:1].to(device), *pair).clamp(0, 1).cpu()
            values.append([psnr(image, clean[:1]).item() for image in (corrupted[:1], prediction)])
    for name, values in found.items():
        before, after = np.array(values).T
        gain, low, high = interval(after - before)
        print(
            f"{name:20s} K={context_size} {before.mean():.2f} dB -> {after.mean():.2f} dB  "
            f"gain {gain:+.2f} [{low:+.2f}, {high:+.2f}]  {len(values)} cases"
        )


if __name__ == "__main__":
    main(restoration)
