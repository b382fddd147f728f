"""Dice of whole-head scans through the public command line: ten deep structures, contexts of other people.

    python -m benchmarks.whole_heads --label_maps MAPS --output_dir OUT \
        [--part development --contrasts 3 --context_sizes "[8]" --other_contrast true --options="--align off"]

Every target is a person kept aside (``brain_05`` and ``brain_10`` for development, ``brain_15`` and ``brain_20`` for
reporting), once in each contrast: T1-like, T2-like, then made-up ones. Its contexts are other people in the same
contrast, or with ``--other_contrast`` T1-like ones for targets that are not. :mod:`benchmarks.head_scenes` makes the
scans: turned by up to 15 degrees about each axis, moved by up to 8 mm, with a random part of the neck in view, 1.5 mm
voxels. They are kept in ``OUT/scenes`` and used again; each folder there is a target with its contexts, for
``configs/inference.json``. Dice is counted on the target's own voxels.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.metrics import compute_dice
from tqdm import tqdm

from benchmarks.head_scenes import CONTEXTS, HELD_OUT, TARGETS, HeadScenes, Settings, contrast_name
from benchmarks.unseen_brains import STRUCTURES
from benchmarks.unseen_dataset import interval
from scripts.data.volumes import load_volume
from scripts.reporting.report_files import REPORT
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

PARTS = {"development": HELD_OUT[:2], "reporting": HELD_OUT[2:]}
_T1 = 0


def whole_heads(
    label_maps: str,
    output_dir: str,
    part: str = "development",
    contrasts: int = 3,
    context_sizes: Sequence[int] = (8,),
    other_contrast: bool = False,
    options: str = "",
    checkpoint: str = "models/model.pt",
    voxel_mm: float = 1.5,
    seed: int = 0,
) -> None:
    """Print mean Dice for each K, then for each structure and contrast, with 95 % intervals over the targets.

    Args:
        label_maps: folder of label maps published with SynthSeg.
        output_dir: for scans, answers and ``results.json``.
        part: development or reporting.
        contrasts: of every target.
        context_sizes: numbers of contexts K.
        other_contrast: contexts are T1-like, targets are not.
        options: further options of ``configs/inference.json``, as on a command line.
        checkpoint: weights.
        voxel_mm: edge of the scans' voxels.
        seed: of people, contrasts and poses.
    """
    scenes = HeadScenes(label_maps, Path(output_dir) / "scenes")
    episodes = part_settings(part, contrasts, max(context_sizes), other_contrast, voxel_mm, seed)
    folders = {e.name: scenes.episode(e) for e in tqdm(episodes, "scans")}
    rows = []
    for size in context_sizes:
        for episode in tqdm(episodes, f"K={size}"):
            folder, answers = folders[episode.name], Path(output_dir) / "answers" / f"K{size}" / episode.name
            given = f"--context_size {size} {options}"
            case = segment(folder / TARGETS, folder / CONTEXTS, answers, given, checkpoint)[episode.person]
            row = {"context_size": size, "target": episode.name, "contrast": contrast_name(episode.contrast)}
            row |= {name: case[name] for name in ("seconds", "command_seconds")}
            rows.append(row | {"dice": structure_dice(folder, answers, episode.person)})
            print(f"{episode.name}: {np.mean(list(rows[-1]['dice'].values())):.3f}", flush=True)
    print(table(rows))
    settings = {"part": part, "other_contrast": other_contrast, "options": options, "checkpoint": checkpoint}
    write_json(settings | {"seed": seed, "voxel_mm": voxel_mm, "rows": rows}, Path(output_dir) / "results.json")


def part_settings(
    part: str, contrasts: int = 3, contexts: int = 8, other_contrast: bool = False, voxel_mm: float = 1.5, seed: int = 0
) -> list[Settings]:
    """What to make: every target of a part in each contrast.

    Raises:
        ValueError: no such part, or no contrast but that of the contexts.
    """
    if part not in PARTS:
        raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
    shown = [number for number in range(contrasts) if not (other_contrast and number == _T1)]
    if not shown:
        raise ValueError(f"--contrasts {contrasts} leaves no target: give more")
    return [
        Settings(person, number, _T1 if other_contrast else number, contexts, voxel_mm, seed)
        for person in PARTS[part]
        for number in shown
    ]


def segment(
    dataset_dir: str | Path, context_dir: str | Path, output_dir: str | Path, options: str, checkpoint: str
) -> dict[str, dict[str, Any]]:
    """Segment targets with ``configs/inference.json``.

    Args:
        dataset_dir: of the targets.
        context_dir: nnU-Net dataset with the contexts.
        output_dir: for the answers; what is there is replaced.
        options: further ones, as on a command line.
        checkpoint: weights.

    Returns:
        What the run's report has of each case, and ``command_seconds``, from start to end over the number of cases.

    Raises:
        ValueError: the command failed, or made no answer of a target.
    """
    folders = {"dataset_dir": dataset_dir, "context_dir": context_dir, "output_dir": output_dir}
    given = [word for name, value in folders.items() for word in (f"--{name}", str(value))]
    started = time.monotonic()
    run_inference([*given, "--checkpoint", checkpoint, "--overwrite", "true", *shlex.split(options)])
    passed = time.monotonic() - started
    report = json.loads((Path(output_dir) / REPORT).read_text(encoding="utf-8"))
    if report["failed"]:
        raise ValueError(f"{dataset_dir}: no answer of {report['failed']}")
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


def structure_dice(episode: Path, answers: Path, person: str) -> dict[str, float]:
    """Dice of each structure of an episode's target on its own voxels."""
    wanted = load_volume(episode / TARGETS / "labelsTs" / f"{person}.nii.gz").as_tensor()
    answer = load_volume(answers / f"{person}.nii.gz").as_tensor()
    found = {}
    for value, name in enumerate(STRUCTURES, start=1):
        found[name] = compute_dice((answer == value)[None], (wanted == value)[None], ignore_empty=False).item()
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What is printed of the rows of all targets."""
    lines = []
    for size in dict.fromkeys(row["context_size"] for row in rows):
        chosen = [row for row in rows if row["context_size"] == size]
        dice = np.array([list(row["dice"].values()) for row in chosen])
        seconds = np.mean([[row["seconds"], row["command_seconds"]] for row in chosen], axis=0)
        lines.append(
            "K={:<2d} Dice {:.3f} [{:.3f}, {:.3f}]".format(size, *interval(dice.mean(1)))
            + "  {} targets, {:.1f} s each ({:.1f} s with the start)".format(len(chosen), *seconds)
        )
        groups = {contrast: [row["contrast"] == contrast for row in chosen] for contrast in _contrasts(chosen)}
        parts = [(name, dice[:, i]) for i, name in enumerate(STRUCTURES)]
        parts += [(f"all, {contrast}", dice[np.array(there)].mean(1)) for contrast, there in groups.items()]
        lines += ["     {:22s} {:.3f} [{:.3f}, {:.3f}]".format(name, *interval(found)) for name, found in parts]
    return "\n".join(lines)


def _contrasts(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["contrast"] for row in rows))


if __name__ == "__main__":
    main(whole_heads)
