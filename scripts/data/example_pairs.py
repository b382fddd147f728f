"""Example pairs, however they are given -> inspected cases: an nnU-Net dataset, two folders, or lists of files."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from scripts.data.files import read_json
from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError, files_by_name, find_datasets, folder_problems, split_channel
from scripts.data.splits import read_split, subjects_of


def context_cases(
    context_dir: str | Path,
    channel: int = 0,
    label_channel: int | None = None,
    split_file: str | Path | None = None,
    record: str | Path | None = None,
    skip_bad_cases: bool = False,
    fold: int | None = None,
    subject_pattern: str | None = None,
) -> list[Case]:
    """Pairs of an nnU-Net dataset folder, inspected.

    Under a split each has ``kin``: digests of the images of its subject (``splits.subjects_of``), in whatever part.

    Args:
        context_dir: the folder, with ``imagesTr`` and ``labelsTr``.
        channel: image channel.
        label_channel: generation: the channel that is the wanted output, instead of ``labelsTr``.
        split_file: take only the cases in its training part.
        record: where to remember what was found in the files.
        skip_bad_cases: leave faulty cases out instead of raising.
        fold: of nnU-Net's ``splits_final.json``.
        subject_pattern: regular expression that finds the subject in a case's name.

    Raises:
        FileNotFoundError, DatasetError: nothing there, or faulty cases (all named).
    """
    if Path(context_dir).is_file():
        raise DatasetError(f"{context_dir} is a file: --context_dir takes a folder, --context_file a JSON list")
    if not Path(context_dir).is_dir():
        raise FileNotFoundError(f"no folder {context_dir}: --context_dir takes an nnU-Net dataset folder")
    datasets = find_datasets(context_dir)
    if len(datasets) > 1:
        names = ", ".join(d.name for d in datasets)
        raise DatasetError(f"--context_dir takes one dataset, {context_dir} has {names}")
    cases = datasets[0].cases(channel, "label" if label_channel is None else label_channel)
    inspected = sound_cases(inspect_cases(cases, record), skip_bad_cases)
    if split_file is None:
        return inspected
    training = read_split(split_file, inspected, fold)["train"]
    if not training:
        raise DatasetError(f"{split_file} has no training cases of {datasets[0].name} to take contexts from")
    subjects = subjects_of((case["case"] for case in inspected), subject_pattern)
    kin = defaultdict(list)
    for case in inspected:
        kin[subjects[case["case"]]].append(case["image_digest"])
    return [case | {"kin": kin[subjects[case["case"]]]} for case in training]


def folder_cases(
    images: str | Path,
    labels: str | Path,
    channel: int = 0,
    label_channel: int | None = None,
    record: str | Path | None = None,
    skip_bad_cases: bool = False,
) -> list[Case]:
    """Pairs of two parallel folders, matched by file name, inspected.

    An image goes with the label of the same name, whatever their endings; or, as in nnU-Net, the image
    ``CASE_000k`` with the label ``CASE``, where k is the channel.

    Args:
        images: folder of the images.
        labels: folder of the label maps (for generation: of the wanted outputs).
        channel: of images with a channel suffix.
        label_channel: generation: the labels are images, and this is their channel if they have a suffix.
        record: where to remember what was found in the files.
        skip_bad_cases: leave faulty pairs out instead of raising.

    Raises:
        DatasetError: no pairs, or faulty ones: those without a partner are named as the others are.
    """
    label_files = _by_case(labels, label_channel)
    image_files = _by_case(images, channel, plain=label_files)
    if not image_files.keys() & label_files.keys():
        raise DatasetError(
            f"no file in {images} has a partner in {labels}: images (CASE or CASE_{channel:04d}) and their labels "
            "(CASE) are paired by name"
        )
    kind = "label" if label_channel is None else "output"
    cases = []
    for name in sorted(image_files.keys() | label_files):
        image, label = image_files.get(name, []), label_files.get(name, [])
        found = ((images, image), (labels, label))
        problems = [f"nothing of this name in {folder}" for folder, files in found if not files]
        problems += folder_problems(image, label)
        paths = {"image": str(image[0]) if image else None, kind: str(label[0]) if label else None}
        cases.append({**paths, "case": name, "folder_problems": problems})
    return sound_cases(inspect_cases(cases, record), skip_bad_cases)


def _by_case(folder: str | Path, channel: int | None, plain: Container[str] = ()) -> dict[str, list[Path]]:
    """Image files of a folder by case: ``CASE``, or ``CASE_000k`` of the channel k, whose other channels are left out.

    A name in ``plain`` is a case's as it is. Letters with accents are one or two characters, as the system had it; here
    they are one.
    """
    named = {unicodedata.normalize("NFC", name): files for name, files in files_by_name(Path(folder)).items()}
    found = {}
    for name, files in named.items():
        case, its_channel = split_channel(name) or (name, None)
        of_channel = channel is not None and f"{case}_{channel:04d}" in named
        if name in plain or its_channel is None or case in named or not (of_channel or case in plain):
            found[name] = files
        elif its_channel == channel:
            found[case] = files
    return found


def listed_cases(
    images: Sequence[str],
    labels: Sequence[str | None],
    generation: bool = False,
    record: str | Path | None = None,
    skip_bad_cases: bool = False,
) -> list[Case]:
    """Pairs given file by file, inspected; each is called by its image's path.

    Args:
        images: paths of the images.
        labels: path of each one's label map (for generation: of its wanted output); None is a fault of the pair.
        generation: the labels are images.
        record: where to remember what was found in the files.
        skip_bad_cases: leave faulty pairs out instead of raising.

    Raises:
        ValueError: not as many labels as images, or none.
        DatasetError: faulty pairs (all named).
    """
    if not images or len(images) != len(labels):
        raise ValueError(
            f"--context_images and --context_labels need equally many files, at least one: got {len(images)} and "
            f"{len(labels)}"
        )
    kind = "output" if generation else "label"
    cases = [{"image": i, kind: label, "case": i} for i, label in zip(images, labels, strict=True)]
    return sound_cases(inspect_cases(cases, record), skip_bad_cases)


def read_pair_list(path: str | Path, channel: int = 0) -> tuple[list[str], list[str | None]]:
    """Images and labels of a JSON list.

    The file is a list of ``{"image": ..., "label": ...}``, or such a list under ``training``, as in the data lists
    of the Medical Segmentation Decathlon and of MONAI. Paths are relative to the file's folder, or absolute.

    Args:
        path: the file.
        channel: which of an entry's images, where ``image`` is a list of channels.

    Returns:
        Paths of the images, and of their labels (None where an entry has none).

    Raises:
        FileNotFoundError: no such file.
        DatasetError: not such a list; the message says which entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --context_file takes a JSON list of pairs")
    form = 'expected [{"image": "a.nii.gz", "label": "a_seg.nii.gz"}, ...], or such a list as "training"'
    content = read_json(path, (dict, list), form)
    entries = content.get("training") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f"{path} holds no pairs: {form}")
    images: list[str] = []
    labels: list[str | None] = []
    for number, entry in enumerate(entries, 1):
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if isinstance(image, list):
            image = image[channel] if 0 <= channel < len(image) else None
        if not isinstance(image, str) or not isinstance(label, (str, type(None))) or "\0" in image + (label or ""):
            raise DatasetError(f"{path}, entry {number}: no image of channel {channel}, or no path as label: {form}")
        images.append(str(path.parent / image))
        labels.append(None if label is None else str(path.parent / label))
    return images, labels
