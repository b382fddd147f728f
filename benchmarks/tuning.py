"""Dice before and after tuning on the contexts, against time, beside a plain U-Net on the same contexts and time.

    python -m benchmarks.tuning --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        [--part development --context_sizes "[8,4,2,1]" --minutes "[0.5,1,2]" --cases 12 --output_file OUT.json]

One choice of contexts for all targets, as a user has it; ``--context_sets 3`` takes three choices one after another.
Every tuning starts anew, through :meth:`scripts.inferer.ICLInferer.tune`, and its minutes include alignment and
decision. The U-Net is that of ``benchmarks.scratch_unet``. Dice is on the scans' own voxels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.utils import set_determinism
from tqdm import tqdm

from benchmarks.scratch_unet import on_grid, predict, train_unet
from benchmarks.unseen_dataset import Pair, UnseenCases, interval, mean_dice
from scripts.checkpoint import load_network
from scripts.inference.target import Target
from scripts.inference.views import EVEN_SHARE
from scripts.inferer import ICLInferer
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main
from scripts.runtime.options import flag


def tuning(
    dataset_dir: str,
    checkpoint: str,
    part: str = "development",
    context_sizes: Sequence[int] = (8, 4, 2, 1),
    minutes: Sequence[float] = (0.5, 1, 2),
    cases: int | None = None,
    context_sets: int = 1,
    unet: bool = True,
    learning_rate: float = 1e-3,
    align: str = "deformable",
    amp: bool = False,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    output_file: str | None = None,
) -> None:
    """Print mean Dice, with 95 % intervals over targets and context sets, and seconds.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights to start from.
        part: development or reporting.
        context_sizes: numbers of contexts K.
        minutes: of each tuning, and of each U-Net's training.
        cases: at most so many targets.
        context_sets: choices of contexts.
        unet: train the U-Net as well.
        learning_rate: of the U-Net.
        align: how contexts are brought to a target.
        amp: predict in bfloat16.
        options: of ``configs/tune.json``.
        seed: of contexts, tunings and the U-Net.
        device: where to compute.
        output_file: JSON file for the rows.
    """
    unet, amp, rows = flag(unet), flag(amp), []
    for size in context_sizes:
        found: dict[str, list[list[float]]] = {}
        seconds: dict[str, list[float]] = {}
        kept: dict[str, list[bool]] = {}
        for chosen in range(context_sets):
            set_determinism(seed)
            unseen = UnseenCases(dataset_dir, part, cases, seed)
            episodes = list(unseen.episodes("aligned"))
            contexts = episodes[chosen][1][:size]
            network = load_network(checkpoint)
            spacing = unseen.spacing(network.grid.tolist())
            inferer = ICLInferer(network, device, spacing=spacing, align=align, amp=amp)
            inferer.set_context([image for image, _ in contexts], [label for _, label in contexts])
            start = copy.deepcopy(inferer.network.state_dict())
            scans = [scan for scan, _ in episodes]
            targets = [inferer.target(image) for image, _ in scans]
            _add(found, seconds, "as it came", _scores(inferer, targets, scans), 0.0, 0.0)
            for mark in minutes:
                inferer.network.load_state_dict(start)
                inferer.tuned, inferer.share = None, EVEN_SHARE
                began, used = time.monotonic(), time.process_time()
                name = f"tuned {mark:g} min"
                report = inferer.tune(mark, seed=seed, **(options or {}))
                passed = time.monotonic() - began, time.process_time() - used
                kept.setdefault(name, []).append(report["kept"])
                _add(found, seconds, name, _scores(inferer, targets, scans), *passed)
                print(
                    f"K={size} {name}: {report['dice_before']:.3f} to {report['dice_after']:.3f} kept out", flush=True
                )
            for mark in minutes if unet else ():
                began, used = time.monotonic(), time.process_time()
                values, preprocessing = inferer.label_values, inferer.context.preprocessing
                trained = train_unet(*on_grid(inferer), len(values), 60 * mark, learning_rate, device)
                passed = time.monotonic() - began, time.process_time() - used
                masks = [predict(trained, image, preprocessing, values, device) for image, _ in scans]
                _add(found, seconds, f"U-Net {mark:g} min", _dice(masks, scans, values), *passed)
        before = np.concatenate(found["as it came"])
        for name, dice in found.items():
            rows.append(
                {
                    "context_size": size,
                    "name": name,
                    "dice": interval(np.concatenate(dice)),
                    "gain": interval(np.concatenate(dice) - before),
                    "kept": kept.get(name),
                    "wall_seconds": float(np.mean(seconds[name][::2])),
                    "processor_seconds": float(np.mean(seconds[name][1::2])),
                    "targets": len(before),
                }
            )
            row = (
                "K={context_size:<2d} {name:14s} Dice {dice[0]:.3f} [{dice[1]:.3f}, {dice[2]:.3f}]  "
                "gain {gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]  {targets} targets, "
                "{wall_seconds:.0f} s, {processor_seconds:.0f} s of processors"
            )
            print(row.format(**rows[-1]), flush=True)
    if output_file:
        settings = {"checkpoint": checkpoint, "part": part, "seed": seed, "device": device, "options": options}
        write_json(settings | {"rows": rows}, output_file)


def _add(
    found: dict[str, list[list[float]]], seconds: dict[str, list[float]], name: str, dice: list[float], *passed: float
) -> None:
    found.setdefault(name, []).append(dice)
    seconds.setdefault(name, []).extend(passed)


def _scores(inferer: ICLInferer, targets: Sequence[Target], scans: Sequence[Pair]) -> list[float]:
    """Of the predictor as it is now; the contexts are brought to a target once."""
    masks = [inferer.complete(target).prediction for target in tqdm(targets, "predict")]
    return _dice(masks, scans, inferer.label_values)


def _dice(masks: Sequence[MetaTensor], scans: Sequence[Pair], values: Sequence[int]) -> list[float]:
    return [mean_dice(mask, label, values) for mask, (_, label) in zip(masks, scans, strict=True)]


if __name__ == "__main__":
    main(tuning)
