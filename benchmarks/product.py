"""What a user gets, from scans to label maps: whole heads, an unseen dataset, many labels, choice of contexts."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from benchmarks.head_scenes import CONTEXTS, STRUCTURES, TARGETS, Heads, HeadScenes, LesionScenes, contrast_name
from benchmarks.hippocampus import ALIGNMENTS, SHIPPED, Hippocampus, interval, label_dice, mean_dice, weights
from benchmarks.measure import Row, Run, work
from scripts.checkpoint import load_network
from scripts.data.nnunet import Case, find_datasets
from scripts.data.preprocessing import PlacedScores
from scripts.data.splits import read_split
from scripts.data.volumes import load_volume
from scripts.inference.context_source import ContextSource
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.reporting.report_files import REPORT
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

SETS = ("aligned", "contrast", "lesions")
_OUTSIDE = 500
"""Values from here on are outside of the brain, in the label maps of SynthSeg (Billot et al. 2023)."""

Score = Callable[[str, Path], dict[str, float]]
"""Mean Dice of each target, of options and a folder for the predictions."""


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
            given = f"--context_size {size} --device {run.device} {options}"
            case = segment(folder / TARGETS, folder / CONTEXTS, answers, given, checkpoint)[episode.person]
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
def never_worse(
    run: Run,
    scans: Heads,
    cases: Hippocampus,
    sets: Sequence[str] = SETS,
    align: str = "deformable",
    context_size: int = 8,
    options: str = "",
    checkpoint: str = SHIPPED,
) -> Iterator[Row]:
    """Whether aligning the contexts makes predictions worse where it has nothing to give: three sets, both ways.

    ``aligned`` are hippocampus crops as they are; ``contrast`` whole heads whose contexts have another contrast;
    ``lesions`` a blob in each brain, bright or dark, elsewhere in everyone, so that nothing corresponds. The paired
    mean gain must not be below -0.005.

    Args:
        run: how it is run.
        scans: whole heads.
        cases: hippocampus targets.
        sets: which ones.
        align: what is compared with ``off``.
        context_size: contexts K.
        options: further options of ``configs/inference.json``, as on a command line.
        checkpoint: weights.

    Raises:
        ValueError: no such set.
    """
    if unknown := sorted(set(sets) - set(SETS)):
        raise ValueError(f"--sets are some of {', '.join(SETS)}, got {', '.join(unknown)}")
    out = Path(scans.output_dir)
    for name in sets:
        if name == "aligned":
            score = _crops(cases, out, checkpoint)
        else:
            kind = HeadScenes if name == "contrast" else LesionScenes
            score = _heads(scans, kind(scans.label_maps, out / "scenes" / name), context_size, checkpoint)
        found = {
            mode: score(
                f"--align {mode} --context_size {context_size} --device {run.device} {options}",
                out / "answers" / name / mode,
            )
            for mode in ("off", align)
        }
        off, aligned = (np.array(list(dice.values())) for dice in found.values())
        data = f"{name}, {len(off)} {scans.part} targets, K={context_size}{weights(checkpoint)}"
        yield Row(name, {"dice": interval(off)}, data, "--align off")
        yield Row(name, {"dice": interval(aligned), "gain": interval(aligned - off)}, data, f"--align {align}")


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
    run: Run,
    label_maps: str,
    checkpoint: str = SHIPPED,
    labels: int = 35,
    context_size: int = 4,
    align: str = "deformable",
) -> Iterator[Row]:
    """Seconds of each step, and Dice, for many labels of a whole head, from the volumes in memory to the label map.

    Heads are label maps of real subjects in one made-up contrast; the first file is the target.

    Args:
        run: how it is run.
        label_maps: folder of NIfTI label maps, one more than contexts at least.
        checkpoint: weights.
        labels: how many labels, the largest ones.
        context_size: contexts K.
        align: how contexts are brought to the target: off, affine or deformable.

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
    inferer = ICLInferer(checkpoint, run.device, labels=wanted, align=align)
    started = time.perf_counter()
    inferer.set_context(images[1:], maps[1:])
    if inferer.aligned is not None:
        inferer.aligned.describe(wanted)
    ready = time.perf_counter()
    target = inferer.complete(inferer.target(images[0]))
    seconds = {"": time.perf_counter() - ready, "once per context set": ready - started, **target.seconds}
    dice = {"": {"dice": mean_dice(target.prediction, maps[0], wanted)}}
    case = f"{len(wanted)} labels, K={context_size}, --align {align}"
    for step, passed in seconds.items():
        yield Row(case, dice.get(step, {}) | {"seconds": passed}, f"a whole head{weights(checkpoint)}", step)


@work
def precision(run: Run, demo_dir: str = "demo_output") -> Iterator[Row]:
    """Dice of the demo's cases with ``--amp true`` and with ``--amp false``.

    Args:
        run: how it is run.
        demo_dir: folder of a finished demo (``make demo``).

    Raises:
        FileNotFoundError: there is no finished demo.
    """
    from scripts.demo import GRID

    if not (Path(demo_dir) / "scores" / "summary.json").is_file():
        raise FileNotFoundError(f"no finished demo in {demo_dir}: run make demo first")
    dataset = next((Path(demo_dir) / "data").glob("Dataset*"))
    dice = {}
    with tempfile.TemporaryDirectory() as answers:
        for name, amp in (("float32", "false"), ("bfloat16", "true")):
            options = f"{GRID} --overlays false --amp {amp} --device {run.device}"
            cases = segment(dataset, dataset, answers, options, SHIPPED)
            dice[name] = np.array([_file_dice(Path(answers), dataset / "labelsTr", case) for case in cases])
    change = dice["bfloat16"] - dice["float32"]
    changes = {"change_of_dice": abs(change.mean()), "dice_of_case": abs(change).max()}
    for name, found in dice.items():
        yield Row(
            "demo", {"dice": found.mean()} | (changes if name == "bfloat16" else {}), f"demo, {len(change)} cases", name
        )


@work
def selection(
    run: Run,
    dataset_dir: str,
    checkpoint: str,
    split_file: str,
    selections: Sequence[str] = ("random", "first", "similar"),
    context_size: int = 8,
    align: str = "deformable",
    turned: bool = False,
    cases: int | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Dice of the test cases of a split by how their contexts are chosen from its training cases.

    Args:
        run: how it is run.
        dataset_dir: nnU-Net dataset folder.
        checkpoint: weights.
        split_file: its training cases are the candidates, its test cases the targets.
        selections: to compare.
        context_size: contexts K.
        align: how contexts are brought to a target: off, affine or deformable.
        turned: turn every second candidate by 90 degrees without its header saying so: contexts that a good choice
            avoids.
        cases: at most so many test cases.
        seed: of ``random``.
    """
    parts = read_split(split_file, find_datasets(dataset_dir)[0].cases())
    targets, network = parts["test"][: 1 if run.quick else cases], load_network(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        candidates = [
            _turned(case, Path(folder)) if turned and i % 2 else case for i, case in enumerate(parts["train"])
        ]
        given = {"images": [case["image"] for case in candidates], "labels": [case["label"] for case in candidates]}
        data = f"{Path(dataset_dir).name}, {len(targets)} cases, {len(candidates)} candidates{weights(checkpoint)}"
        for name in selections:
            source = ContextSource(None, network, context_size, selection=name, seed=seed, **given)
            inferer = ICLInferer(network, run.device, source, align=align)
            values, dice, used, started = inferer.label_values, [], [], time.perf_counter()
            for case in tqdm(targets, name):
                target = inferer.complete(inferer.target(case["image"]))
                dice.append(mean_dice(target.prediction, load_volume(case["label"]), values))
                used += [Path(one).parent == Path(folder) for names in target.used.values() for one in names]
            seconds = (time.perf_counter() - started) / len(targets)
            case = f"{name}, K={context_size}, --align {align}{', every second one turned' if turned else ''}"
            figures = {"dice": interval(dice), "seconds": seconds} | ({"turned": np.mean(used)} if turned else {})
            yield Row(case, figures, data)


def case_scores(
    network: Neuroverse3D,
    cases: Hippocampus,
    context_sizes: Sequence[int],
    alignment: str,
    device: str = "cpu",
    align: str = "deformable",
) -> dict[int, np.ndarray]:
    """K -> (targets, 2): mean Dice over the labels on the target's own voxels, of the network and of averaging."""
    inferer = ICLInferer(network, device, spacing=cases.spacing(network.grid.tolist()), align=align)
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


def segment(
    dataset_dir: str | Path, context_dir: str | Path, output_dir: str | Path, options: str, checkpoint: str
) -> dict[str, dict[str, Any]]:
    """Segment targets with ``configs/inference.json``.

    Args:
        dataset_dir: of the targets.
        context_dir: nnU-Net dataset with the contexts.
        output_dir: for the predictions; what is there is replaced.
        options: further ones, as on a command line.
        checkpoint: weights.

    Returns:
        What the run's report has of each case, and ``command_seconds``, from start to end over the number of cases.

    Raises:
        ValueError: the command failed, or made no prediction of a target.
    """
    folders = {"dataset_dir": dataset_dir, "context_dir": context_dir, "output_dir": output_dir}
    given = [word for name, value in folders.items() for word in (f"--{name}", str(value))]
    started = time.monotonic()
    run_inference([*given, "--checkpoint", checkpoint, "--overwrite", "true", *shlex.split(options)])
    passed = time.monotonic() - started
    report = json.loads((Path(output_dir) / REPORT).read_text(encoding="utf-8"))
    if report["failed"]:
        raise ValueError(f"{dataset_dir}: no prediction of {report['failed']}")
    seconds = round(passed / len(report["cases"]), 1)
    return {name: case | {"command_seconds": seconds} for name, case in report["cases"].items()}


def run_inference(arguments: Sequence[str]) -> None:
    """The public command line in a process of its own.

    Raises:
        ValueError: it failed; the message has the end of what it said.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"inference ended with status {done.returncode}: {last[0]}")


def _crops(cases: Hippocampus, out: Path, checkpoint: str) -> Score:
    """Hippocampus scans of a part, all with contexts from the split's pool."""
    file, name = out / "aligned_split.json", cases.folder.name
    write_json({"train": {name: cases.split["train"]}, "test": {name: cases.targets}}, file)

    def score(options: str, answers: Path) -> dict[str, float]:
        given = f"--split_file {shlex.quote(str(file))} --target_split test {options}"
        segment(cases.folder, cases.folder, answers, given, checkpoint)
        return {case: _file_dice(answers, cases.folder / "labelsTr", case) for case in cases.targets}

    return score


def _heads(scans: Heads, scenes: HeadScenes, contexts: int, checkpoint: str) -> Score:
    """Whole heads; with lesions in one contrast, without in two."""
    episodes = scans.settings(contexts, other_contrast=not isinstance(scenes, LesionScenes))

    def score(options: str, answers: Path) -> dict[str, float]:
        found = {}
        for episode in episodes:
            folder = scenes.episode(episode)
            segment(folder / TARGETS, folder / CONTEXTS, answers / episode.name, options, checkpoint)
            found[episode.name] = _file_dice(answers / episode.name, folder / TARGETS / "labelsTs", episode.person)
        return found

    return score


def _file_dice(answers: Path, wanted: Path, case: str) -> float:
    """Mean over the labels that there are."""
    return mean_dice(load_volume(answers / f"{case}.nii.gz"), load_volume(wanted / f"{case}.nii.gz"))


def _turned(case: Case, folder: Path) -> Case:
    turned = {}
    for kind in ("image", "label"):
        source = nib.load(case[kind])
        turned[kind] = str(folder / f"{case['case']}_{kind}.nii.gz")
        nib.save(nib.Nifti1Image(np.rot90(np.asanyarray(source.dataobj), axes=(1, 2)), source.affine), turned[kind])
    return case | turned


WORKS = {
    "heads": heads,
    "never_worse": never_worse,
    "unseen": unseen,
    "labels": labels,
    "precision": precision,
    "selection": selection,
}

if __name__ == "__main__":
    main(WORKS)
