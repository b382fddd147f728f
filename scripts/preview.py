"""See what the network sees: pictures of training groups before and after augmentation.

Command line::

    python -m scripts.preview --dataset_dir DATA --output_dir OUT/preview

With the options of a training (data, task, grid, context size, seed), its first groups are shown.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from tqdm import trange

from scripts.data import Collection, EpisodeDataset
from scripts.data.global_intensity import GlobalIntensityNonlinear
from scripts.data.tasks import find_task
from scripts.reporting.pictures import GroupView, contact_sheet, group_figure, save_png
from scripts.runtime.options import flag, normalise
from scripts.runtime.output_folder import OutputFolder

_SHEET = "preview.png"
_GROUPS = "group_*.png"


def preview(
    output_dir: str,
    dataset_dir: str | None = None,
    collection_file: str | None = None,
    datasets: str | Sequence[str] | None = None,
    task: str | Sequence[str] | None = None,
    channel: int | None = None,
    groups: int = 6,
    context_size: int | Sequence[int] = 3,
    max_classes: int = 5,
    spatial_size: int | Sequence[int] = 64,
    split_file: str | None = None,
    fold: int | None = None,
    subject_pattern: str | None = None,
    skip_bad_cases: bool = False,
    cache_dir: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write one picture per training group, group_0000.png and so on, and all of them in preview.png.

    The groups are the first ones that a training with these options draws. Most changes are rare, so a group may well
    stay as it is; its title then says so.

    Args:
        output_dir: where the pictures go.
        dataset_dir: nnU-Net dataset folder, or a folder of Dataset* folders.
        collection_file: JSON file of rows: dataset, channels, task, classes, weights.
        datasets: use only these datasets, by folder name or its Dataset001 part.
        task: tasks to draw, such as segmentation or "['inpainting','super_resolution']".
        channel: input channel; by default every channel.
        groups: how many groups.
        context_size: context pairs in a group: a number, or "[low,high]".
        max_classes: at most this many random classes are merged into one foreground.
        spatial_size: the network's grid in voxels, one number or three.
        split_file: splits.json of a run, or nnU-Net's splits_final.json, to use instead of a fresh split.
        fold: which fold of nnU-Net's.
        subject_pattern: regular expression for the subject in case names.
        skip_bad_cases: go on without faulty cases instead of stopping.
        cache_dir: preprocessed cases, such as those of a training; by default OUT/cache.
        seed: of split, groups and augmentation.
        overwrite: replace the pictures that are there.
    """
    number = int(groups) if str(groups).isdigit() else 0
    if number < 1:
        raise ValueError(f"--groups must be a whole number of at least 1, got {groups!r}")
    if dataset_dir is None and collection_file is None:
        raise ValueError("no data: give --dataset_dir or --collection_file")
    folder = Path(str(output_dir))
    _check_place(folder, flag(overwrite))
    grid, seed = normalise("spatial_size", spatial_size), normalise("seed", seed)
    cache = str(cache_dir or folder / "cache")
    collection = Collection(
        normalise("dataset_dir", dataset_dir),
        cache,
        datasets=normalise("datasets", datasets),
        collection_file=normalise("collection_file", collection_file),
        tasks=normalise("task", task),
        channel=normalise("channel", channel),
        split_file=normalise("split_file", split_file),
        fold=normalise("fold", fold),
        subject_pattern=normalise("subject_pattern", subject_pattern),
        skip_bad_cases=flag(skip_bad_cases),
        seed=seed,
    )
    dataset = EpisodeDataset.from_collection(
        collection,
        augment=True,
        spatial_size=grid,
        cache_dir=cache,
        context_size=normalise("context_size", context_size),
        max_classes=normalise("max_classes", max_classes),
        seed=seed,
    )
    figures = [draw_group(dataset, index) for index in trange(number, desc="groups", unit="group")]
    OutputFolder.of(folder / _SHEET).remove(*folder.glob(_GROUPS))
    for index, figure in enumerate(figures):
        save_png(figure, folder / f"group_{index:04d}.png")
    save_png(contact_sheet(figures), folder / _SHEET)
    print(f"{folder}: {number} groups, together in {_SHEET}")


def draw_group(dataset: EpisodeDataset, number: int) -> Image.Image:
    """Picture of a training group: as drawn and, where augmentation changed anything, as the network gets it.

    Args:
        dataset: where the group is drawn from.
        number: the group's.
    """
    group, drawn, augmented = dataset.draw(number), dataset.make(number, augment=False), dataset.make(number)
    generation = find_task(group.task).generation
    views = [GroupView("as drawn", drawn["image"][:, 0], drawn["label"][:, 0])]
    gin = augmented["gin"] >= 0
    image = augmented["image"]
    if gin:
        image = GlobalIntensityNonlinear()(image, augmented["gin"])
    changed = gin or not all(torch.equal(drawn[name], augmented[name]) for name in ("image", "label"))
    if changed:
        # GIN returns values of any range
        name, window = ("augmented, with GIN (each image in its own window)", None) if gin else ("augmented", (0, 1))
        views.append(GroupView(name, image[:, 0], augmented["label"][:, 0], window))
    what = f"{group.task} of {group.classes}" if group.classes else group.task
    title = f"group {number}: {group.members[0]['dataset']}, {what}{'' if changed else ', not augmented'}"
    return group_figure(views, [str(case["case"]) for case in group.members], generation, title)


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give another --output_dir")
    pictures = [path for path in (folder / _SHEET, *folder.glob(_GROUPS)) if os.path.lexists(path)]
    OutputFolder.of(folder / _SHEET).check(*pictures)
    if pictures and not overwrite:
        raise FileExistsError(f"{folder} already holds pictures: give another --output_dir or --overwrite true")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(preview)
