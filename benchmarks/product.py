"""What a user gets, from scans to label maps: whole heads, an unseen dataset, many labels, bfloat16."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from benchmarks.head_scenes import CONTEXTS, STRUCTURES, TARGETS, Heads, HeadScenes, contrast_name
from benchmarks.hippocampus import ALIGNMENTS, SHIPPED, Hippocampus, interval, label_dice, mean_dice, weights
from benchmarks.measure import Row, Run, work
from scripts.checkpoint import load_network
from scripts.data.preprocessing import PlacedScores
from scripts.data.volumes import load_volume
from scripts.demo import run_bundle
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.reporting.report_files import REPORT
from scripts.runtime.commandline import main

_OUTSIDE = 500
"""Values from here on are outside of the brain, in the label maps of SynthSeg (Billot et al. 2023)."""


@work
def heads(
    run: Run,
    scans: Heads,
    context_sizes: Sequence[int] = (8,),
    other_contrast: bool = False,
    options: str = "",
    checkpoint: str = SHIPPED,
) -> Iterator[Row]:
    """Dice of ten deep structures of whole heads, through the public command line, contexts being other people.

    Contexts have the target's contrast. Dice is counted on the target's own voxels; intervals are over the targets.

    Args:
        run: how it is run.
        scans: targets.
        context_sizes: numbers of contexts K.
        other_contrast: contexts are T1-like, targets are not.
        options: further options of ``configs/inference.json``, as on a command line.
        checkpoint: weights.
    """
    scenes = HeadScenes(scans.label_maps, Path(scans.output_dir) / "scenes")
    episodes = scans.settings(max(context_sizes), other_contrast)
    folders = {e.name: scenes.episode(e) for e in tqdm(episodes, "scans")}
    data = f"whole heads, {len(episodes)} {scans.part} targets{weights(checkpoint)}"
    for size in context_sizes:
        dice, seconds, contrasts = [], [], [contrast_name(e.contrast) for e in episodes]
        for episode in tqdm(episodes, f"K={size}"):
            folder, answers = folders[episode.name], Path(scans.output_dir) / "answers" / f"K{size}" / episode.name
            given = f"--checkpoint {shlex.quote(checkpoint)} --context_size {size} --device {run.device} {options}"
            case = segment(folder / TARGETS, folder / CONTEXTS, answers, given)[episode.person]
            seconds.append((case["seconds"], case["command_seconds"]))
            wanted = load_volume(folder / TARGETS / "labelsTs" / f"{episode.person}.nii.gz")
            prediction = load_volume(answers / f"{episode.person}.nii.gz")
            dice.append(label_dice(prediction, wanted, range(1, len(STRUCTURES) + 1)))
            tqdm.write(f"{episode.name}: {np.mean(dice[-1]):.3f}")
        dice, (own, command) = np.array(dice), np.mean(seconds, axis=0)
        name = ", ".join(filter(None, (f"K={size}", "contexts T1-like, targets not" * other_contrast, options)))
        yield Row(name, {"dice": interval(dice.mean(1)), "seconds": own, "command_seconds": command}, data)
        for contrast in dict.fromkeys(contrasts):
            chosen = [one == contrast for one in contrasts]
            yield Row(name, {"dice": interval(dice[chosen].mean(1))}, data, f"contrast {contrast}")
        for structure, found in zip(STRUCTURES, dice.T, strict=True):
            yield Row(name, {"dice": interval(found)}, data, structure)


@work
def unseen(
    run: Run,
    cases: Hippocampus,
    checkpoint: str = SHIPPED,
    context_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    alignments: Sequence[str] = ALIGNMENTS,
    align: str = "deformable",
) -> Iterator[Row]:
    """Dice on scans that were never trained on, and its gain over averaging the contexts' labels.

    Averaging is the mean of the same contexts' labels on the same grid, cut at 0.5: it never looks at an image, and is
    what a network learns first. For ``misaligned`` every scan is turned by up to 20° about each axis and shifted by up
    to 25 % of half its size along each, in its own way. Every target has contexts of its own.

    Args:
        run: how it is run.
        cases: targets.
        checkpoint: weights.
        context_sizes: numbers of contexts K.
        alignments: aligned, misaligned or both.
        align: how contexts are brought to a target: off, affine or deformable.
    """
    context_sizes = (1,) if run.quick else context_sizes
    network = load_network(checkpoint)
    for alignment in alignments:
        found = case_scores(network, cases, context_sizes, alignment, run.device, align)
        for size, scores in found.items():
            yield gain_row(f"{alignment}, K={size}, --align {align}", scores, cases.described + weights(checkpoint))


@work
def labels(
    run: Run, label_maps: str, checkpoint: str = SHIPPED, labels: int = 35, context_size: int = 4
) -> Iterator[Row]:
    """Seconds of each step, and Dice, for many labels of a whole head, from the volumes in memory to the label map.

    Heads are label maps of real subjects in one made-up contrast; the first file is the target.

    Args:
        run: how it is run.
        label_maps: folder of NIfTI label maps, one more than contexts at least.
        checkpoint: weights.
        labels: how many labels, the largest ones.
        context_size: contexts K.

    Raises:
        FileNotFoundError: too few label maps.
    """
    if run.quick:
        labels, context_size = 2, 1
    files = sorted(Path(label_maps).glob("*.nii*"))[: context_size + 1]
    if len(files) <= context_size:
        raise FileNotFoundError(f"{label_maps} has {len(files)} label maps: --label_maps needs {context_size + 1}")
    maps = [load_volume(file) for file in files]
    values, counts = torch.cat([m.flatten().as_tensor() for m in maps]).unique(return_counts=True)
    inside = (values > 0) & (values < _OUTSIDE)
    wanted = sorted(int(v) for v in values[inside][counts[inside].argsort(descending=True)[:labels]])
    means = torch.rand(int(values.max()) + 1, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    images = [
        MetaTensor(means[m.as_tensor().long()] + 0.05 * torch.randn(m.shape, generator=noise), affine=m.affine)
        for m in maps
    ]
    inferer = ICLInferer(checkpoint, run.device, labels=wanted)
    started = time.perf_counter()
    inferer.set_context(images[1:], maps[1:])
    inferer.aligned.describe(wanted)
    ready = time.perf_counter()
    target = inferer.complete(inferer.target(images[0]))
    seconds = {"": time.perf_counter() - ready, "once per context set": ready - started, **target.seconds}
    dice = {"": {"dice": mean_dice(target.prediction, maps[0], wanted)}}
    case = f"{len(wanted)} labels, K={context_size}, --align deformable"
    for step, passed in seconds.items():
        yield Row(case, dice.get(step, {}) | {"seconds": passed}, f"a whole head{weights(checkpoint)}", step)


@work
def precision(run: Run, cases: Hippocampus, checkpoint: str = SHIPPED, context_size: int = 8) -> Iterator[Row]:
    """Dice with ``--amp true`` (bfloat16) against ``--amp false`` (float32), on scans that were never trained on.

    Args:
        run: how it is run.
        cases: targets.
        checkpoint: weights.
        context_size: contexts K.
    """
    dice = {}
    for side, amp in (("float32", "false"), ("bfloat16", "true")):
        found = case_scores(load_network(checkpoint), cases, (context_size,), "aligned", run.device, amp=amp)
        dice[side] = found[context_size][:, 0]
    case, data, change = f"K={context_size}", cases.described + weights(checkpoint), dice["bfloat16"] - dice["float32"]
    yield Row(case, {"dice": interval(dice["float32"])}, data, "float32")
    changes = {"change_of_dice": abs(change.mean()), "dice_of_case": abs(change).max()}
    yield Row(case, {"dice": interval(dice["bfloat16"])} | changes, data, "bfloat16")


def case_scores(
    network: Neuroverse3D,
    cases: Hippocampus,
    context_sizes: Sequence[int],
    alignment: str,
    device: str = "cpu",
    align: str = "deformable",
    amp: str = "auto",
) -> dict[int, np.ndarray]:
    """K -> (targets, 2): mean Dice over the labels on the target's own voxels, of the network and of averaging."""
    inferer = ICLInferer(network, device, spacing=cases.spacing(network.grid.tolist()), align=align, amp=amp)
    scores = {size: [] for size in context_sizes}
    for (scan, wanted), pool in tqdm(cases.episodes(alignment), alignment, total=len(cases.targets)):
        for size in context_sizes:
            inferer.set_context(*zip(*pool[:size], strict=True))
            target = inferer.complete(inferer.target(scan))
            values = inferer.label_values
            predictions = target.prediction, average(inferer, target.image)
            scores[size].append([mean_dice(prediction, wanted, values) for prediction in predictions])
    return {size: np.array(found) for size, found in scores.items()}


def average(inferer: ICLInferer, target: MetaTensor) -> MetaTensor:
    """The mean of the contexts' labels on a target's own voxels."""
    _, labels = inferer.context.pairs()
    means = {value: (labels == value).float().mean(0)[0] for value in inferer.label_values}
    return inferer.context.preprocessing.to_native_labels({v: PlacedScores(mean, target) for v, mean in means.items()})


def gain_row(case: str, scores: np.ndarray, data: str) -> Row:
    """A row of (targets, 2) Dice: of the network and of averaging."""
    ours, averaging = scores.T
    figures = {"dice": interval(ours), "averaging": averaging.mean(), "gain": interval(ours - averaging)}
    return Row(case, figures, data)


def segment(dataset_dir: Path, context_dir: Path, output_dir: Path, options: str) -> dict[str, dict[str, Any]]:
    """Segment targets by the public command line, in a process of its own.

    Args:
        dataset_dir: of the targets.
        context_dir: nnU-Net dataset with the contexts.
        output_dir: for the predictions; what is there is replaced.
        options: further ones, as on a command line.

    Returns:
        What the run's report has of each case, and ``command_seconds``, from start to end over the number of cases.

    Raises:
        ValueError: the command failed, or made no prediction of a target.
    """
    folders = {"dataset_dir": dataset_dir, "context_dir": context_dir, "output_dir": output_dir}
    given = " ".join(f"--{name} {shlex.quote(str(folder))}" for name, folder in folders.items())
    started = time.monotonic()
    run_bundle("inference", f"{given} --overwrite true {options}")
    passed = time.monotonic() - started
    report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
    if report["failed"]:
        raise ValueError(f"{dataset_dir}: no prediction of {report['failed']}")
    seconds = round(passed / len(report["cases"]), 1)
    return {name: case | {"command_seconds": seconds} for name, case in report["cases"].items()}


WORKS = {"heads": heads, "unseen": unseen, "labels": labels, "precision": precision}

if __name__ == "__main__":
    main(WORKS)
