"""Whether aligning the contexts makes answers worse where it has nothing to give, through the public command line.

    python -m benchmarks.never_worse --label_maps MAPS --dataset_dir DATA/Dataset004_Hippocampus --output_dir OUT \
        [--sets "['aligned','contrast','lesions']" --cases 12 --part development]

Three sets, each segmented with ``--align off`` and ``--align deformable``:

- ``aligned``: scans that are aligned already, hippocampus crops (``benchmarks/hippocampus_split.json``);
- ``contrast``: whole heads whose contexts have another contrast than they (:mod:`benchmarks.whole_heads`);
- ``lesions``: a blob somewhere in each brain, bright or dark, elsewhere in every context: nothing corresponds.

Printed is the paired mean difference with its 95 % interval; a set holds where it is not below -0.005.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.head_scenes import CONTEXTS, TARGETS, HeadScenes, LesionScenes
from benchmarks.unseen_dataset import PARTS, SPLIT_FILE, interval, mean_dice
from benchmarks.whole_heads import part_settings, segment
from scripts.data.volumes import load_volume
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

SETS = ("aligned", "contrast", "lesions")
TOLERANCE = -0.005

Score = Callable[[str, Path], dict[str, float]]
"""Mean Dice of each target, of options and a folder for the answers."""


def never_worse(
    label_maps: str,
    dataset_dir: str,
    output_dir: str,
    sets: Sequence[str] = SETS,
    align: str = "deformable",
    part: str = "development",
    cases: int | None = None,
    contrasts: int = 3,
    context_size: int = 8,
    options: str = "",
    checkpoint: str = "models/model.pt",
    voxel_mm: float = 1.5,
    seed: int = 0,
) -> None:
    """Print mean Dice of both ways, and their difference, for each set.

    Args:
        label_maps: folder of label maps published with SynthSeg.
        dataset_dir: nnU-Net dataset folder of the hippocampus scans.
        output_dir: for scans, answers and ``never_worse.json``.
        sets: which ones.
        align: what is compared with ``off``.
        part: development or reporting.
        cases: at most so many hippocampus targets.
        contrasts: of every head, that of the contexts among them.
        context_size: contexts K.
        options: further options of ``configs/inference.json``, as on a command line.
        checkpoint: weights.
        voxel_mm: edge of the heads' voxels.
        seed: of people, contrasts, poses and lesions.

    Raises:
        ValueError: no such set or part.
    """
    if unknown := sorted(set(sets) - set(SETS)):
        raise ValueError(f"--sets are some of {', '.join(SETS)}, got {', '.join(unknown)}")
    out, rows = Path(output_dir), []
    for name in sets:
        if name == "aligned":
            score = _crops(dataset_dir, out, part, cases, checkpoint)
        else:
            kind = HeadScenes if name == "contrast" else LesionScenes
            score = _heads(
                kind(label_maps, out / "scenes" / name), part, contrasts, context_size, voxel_mm, seed, checkpoint
            )
        dice = {
            mode: score(f"--align {mode} --context_size {context_size} {options}", out / "answers" / name / mode)
            for mode in ("off", align)
        }
        rows.append({"set": name, "dice": dice})
        print(line(name, *(np.array(list(found.values())) for found in dice.values()), align), flush=True)
    write_json({"align": align, "part": part, "options": options, "seed": seed, "rows": rows}, out / "never_worse.json")


def line(name: str, off: np.ndarray, aligned: np.ndarray, align: str = "deformable") -> str:
    """What is printed of a set; Dice of the same targets, in the same order."""
    difference = interval(aligned - off)
    return "{:9s} {} targets  off {:.3f}  {} {:.3f}  difference {:+.4f} [{:+.4f}, {:+.4f}]  {}".format(
        name,
        len(off),
        off.mean(),
        align,
        aligned.mean(),
        *difference,
        "holds" if difference[0] >= TOLERANCE else "WORSE",
    )


def _crops(dataset_dir: str, out: Path, part: str, cases: int | None, checkpoint: str) -> Score:
    """Hippocampus scans of a part, all with contexts from the split's pool."""
    if part not in PARTS:
        raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
    folder = Path(dataset_dir)
    split = json.loads(SPLIT_FILE.read_text(encoding="utf-8"))
    targets = split[PARTS[part]][folder.name][:cases]
    file = out / "aligned_split.json"
    write_json({"train": split["train"], "test": {folder.name: targets}}, file)

    def score(options: str, answers: Path) -> dict[str, float]:
        segment(folder, folder, answers, f"--split_file '{file}' --target_split test {options}", checkpoint)
        return {name: _dice(answers / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz") for name in targets}

    return score


def _heads(
    scenes: HeadScenes, part: str, contrasts: int, contexts: int, voxel_mm: float, seed: int, checkpoint: str
) -> Score:
    """Whole heads; with lesions in one contrast, without in two."""
    other_contrast = not isinstance(scenes, LesionScenes)
    episodes = part_settings(part, contrasts, contexts, other_contrast, voxel_mm, seed)

    def score(options: str, answers: Path) -> dict[str, float]:
        found = {}
        for episode in episodes:
            folder, file = scenes.episode(episode), f"{episode.person}.nii.gz"
            segment(folder / TARGETS, folder / CONTEXTS, answers / episode.name, options, checkpoint)
            found[episode.name] = _dice(answers / episode.name / file, folder / TARGETS / "labelsTs" / file)
        return found

    return score


def _dice(answer: Path, wanted: Path) -> float:
    """Mean over the labels that there are."""
    label = load_volume(wanted)
    return mean_dice(load_volume(answer), label, [int(v) for v in label.unique() if v > 0])


if __name__ == "__main__":
    main(never_worse)
