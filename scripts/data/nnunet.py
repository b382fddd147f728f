"""nnU-Net dataset folders -> lists of cases.

Reads both layouts of ``dataset.json``: version 1 (``"labels": {"0": "background", ...}``, ``modality``) and
version 2 (``"labels": {"background": 0, ...}``, ``channel_names``, regions as lists, ``ignore``). See
https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md.

A case is a plain dict, as MONAI's datasets take them: ``image`` and ``label`` (paths), ``case`` and
``dataset`` (names), ``classes`` (class name -> label values, background left out).
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.data.files import DatasetError, file_faults, image_files, is_dangling, printable, read_json
from scripts.data.volumes import strip_ending

logger = logging.getLogger(__name__)

Case = dict[str, Any]

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.ASCII | re.DOTALL)
_LABELS = 'expected nnU-Net\'s form, {"labels": {"background": 0, "anterior": 1}, "channel_names": {"0": "T1"}, ...}'
_SHOWN = 5


@dataclass(frozen=True)
class NnunetDataset:
    """One ``DatasetXXX_Name`` folder.

    Attributes:
        root: the folder.
        classes: class name -> label values that belong to it (several for a region).
        known_values: all values ``dataset.json`` allows in a label file; None when it says nothing.
    """

    root: Path
    classes: dict[str, tuple[int, ...]]
    known_values: frozenset[int] | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.name

    @classmethod
    def read(cls, root: str | Path) -> NnunetDataset:
        """Read ``dataset.json``; without one, the classes are whatever the label files hold.

        Raises:
            DatasetError: no images, or an unreadable ``dataset.json``.
        """
        root = Path(os.path.abspath(root))  # a link keeps its own name
        if not image_files(root / "imagesTr"):
            raise DatasetError(f"{root / 'imagesTr'} holds no images (expected CASE_0000.nii.gz)")
        description = root / "dataset.json"
        if is_dangling(description):
            raise DatasetError(f"{root}: {file_faults(description)[0]}")
        if not description.is_file():
            return cls(root, {}, None)
        content = read_json(description, dict, _LABELS, "has no readable 'labels' entry")
        try:
            classes = _read_labels(content["labels"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"{description} has no readable 'labels' entry ({error}): {_LABELS}") from error
        known = frozenset(value for values in classes.values() for value in values) | {0}
        foreground = {n: tuple(v for v in values if v != 0) for n, values in classes.items()}
        classes = {n: v for n, v in foreground.items() if v and n.lower() not in ("background", "ignore")}
        return cls(root, classes, known)

    def channels(self) -> tuple[int, ...]:
        """Image channels that any training case has."""
        return tuple(sorted(self._images()))

    def cases(self, channel: int = 0, partner: str | int = "label") -> list[Case]:
        """Every training case with this image channel, sorted by name; what is missing is None.

        ``folder_problems`` says what is wrong with a case already by the look of the folder.

        Args:
            channel: of the images.
            partner: what goes with an image: ``"label"`` (its label map), ``"image"`` (nothing), or the channel of
                another image, which the case then has as ``output``.

        Raises:
            DatasetError: no image has this channel.
        """
        by_channel = self._images()
        unnumbered = [n for n in files_by_name(self.root / "imagesTr") if not split_channel(n)]
        if unnumbered:
            logger.warning("%s: %d files without a channel (CASE_0000) are left out: %s", self.root / "imagesTr",
                           len(unnumbered), ", ".join(unnumbered[:_SHOWN]))  # fmt: skip
        for wanted in (channel, *([partner] if isinstance(partner, int) else [])):
            if wanted not in by_channel:
                raise DatasetError(
                    f"{self.root / 'imagesTr'} has no files of channel {wanted:04d} "
                    f"(channels there: {sorted(by_channel)})"
                )
        images = by_channel[channel]
        facts: dict[str, Any] = {"dataset": self.name, "channel": channel}
        partners: dict[str, list[Path]] = {}
        if isinstance(partner, int):
            partners, kind = by_channel[partner], "output"
        elif partner == "label":
            partners, kind = files_by_name(self.root / "labelsTr"), "label"
            facts["classes"] = {k: list(v) for k, v in self.classes.items()}
            facts["known_values"] = sorted(self.known_values) if self.known_values is not None else None
            if not channel:  # a label without image; of another channel there may well be fewer images
                images = {name: [] for name in partners} | images
        else:
            kind = None
        return [
            {"image": str(images[name][0]) if images[name] else None}
            | ({kind: str(partners[name][0]) if name in partners else None} if kind else {})
            | {
                "case": name,
                "folder_problems": folder_problems(images[name], partners.get(name, [])),
            }
            | facts
            for name in sorted(images)
        ]

    def _images(self) -> dict[int, dict[str, list[Path]]]:
        found: dict[int, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
        for name, paths in files_by_name(self.root / "imagesTr").items():
            if case := split_channel(name):
                found[case[1]][case[0]] += paths
        return {channel: dict(images) for channel, images in found.items()}


def ignored_labels(description: str | Path) -> set[int]:
    """Values that a ``dataset.json`` calls "ignore".

    Raises:
        DatasetError: it cannot be read.
    """
    content = read_json(description, dict, _LABELS, "has no readable 'labels' entry")
    try:
        labels = _read_labels(content.get("labels", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{description} has no readable 'labels' entry: {error}") from error
    return {value for name, values in labels.items() if name.lower() == "ignore" for value in values}


def find_datasets(folder: str | Path, names: Sequence[str] | None = None) -> list[NnunetDataset]:
    """The nnU-Net datasets at a path: the folder itself, or its ``Dataset*``/``Task*`` sub-folders.

    Args:
        folder: a dataset folder (``imagesTr`` inside) or a folder of them.
        names: keep only these, by folder name or by its part before the first underscore.

    Raises:
        FileNotFoundError: no such folder.
        DatasetError: no dataset there, or a name that is not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}: --dataset_dir takes an nnU-Net dataset folder or a folder of them"
        )
    if (folder / "imagesTr").is_dir():
        roots = [Path(os.path.abspath(folder))]
    else:
        inside = sorted(folder.iterdir())
        roots = [p for p in inside if (p / "imagesTr").is_dir()]
        gone = [p.name for p in inside if is_dangling(p) and p.name.startswith(("Dataset", "Task"))]
        if gone:
            raise DatasetError(f"{folder}: {', '.join(gone)} are links to nothing: mend or remove them")
    if not roots:
        raise DatasetError(f"no nnU-Net dataset in {folder}: expected imagesTr/ and labelsTr/ there or one level below")
    if names:
        named = {
            name: [r for r in roots if r.name == name] or [r for r in roots if r.name.split("_")[0] == name]
            for name in names
        }
        missing = [name for name in names if not named[name]]
        if missing:
            raise DatasetError(f"{', '.join(missing)} not in {folder}, which has {', '.join(r.name for r in roots)}")
        for name, several in named.items():
            if len(several) > 1:
                raise DatasetError(f"{name} could be any of {', '.join(r.name for r in several)}: give the full name")
        roots = sorted({several[0] for several in named.values()})
    return [NnunetDataset.read(root) for root in roots]


def find_targets(path: str | Path, channel: int = 0) -> list[Case]:
    """Images to run on: ``image`` and ``case`` of every file at a path.

    Args:
        path: one file, a folder of image files, or an nnU-Net dataset (its ``imagesTs``, else ``imagesTr``).
            The channel suffix is part of the name, except in ``imagesTs`` and ``imagesTr`` folders, where it
            is stripped and selects the channel.
        channel: image channel in nnU-Net folders.

    Raises:
        FileNotFoundError: nothing there.
        DatasetError: two files would be written under one name.
    """
    path = Path(path)
    for inner in ("imagesTs", "imagesTr"):
        if image_files(path / inner):
            path = path / inner
            break
    if path.is_file() or is_dangling(path):
        files = [path] if strip_ending(path) else []
    elif path.is_dir():
        files = image_files(path)
    else:
        raise FileNotFoundError(f"no file or folder {path}: --dataset_dir takes the images to segment")
    named = [(file, printable(strip_ending(file) or "")) for file in files]
    if Path(os.path.abspath(path)).name in ("imagesTs", "imagesTr"):
        named = _of_channel(Path(os.path.abspath(path)), named, channel)
    if not named:
        raise FileNotFoundError(
            f"no image files in {path} (channel {channel:04d} of an nnU-Net folder, else any image)"
        )
    return _targets(named, str(path))


def listed_targets(images: Sequence[str]) -> list[Case]:
    """Images given file by file, as :func:`find_targets` returns those of a folder.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: no image, or two files would be written under one name.
    """
    named = []
    for path in map(Path, images):
        if not (path.is_file() or is_dangling(path)):
            raise FileNotFoundError(f"no file {path}: --target_images takes the images to segment")
        if strip_ending(path) is None:
            raise DatasetError(f"{path} is no image file")
        named.append((path, printable(strip_ending(path))))
    return _targets(named, "--target_images")


def _targets(named: Sequence[tuple[Path, str]], where: str) -> list[Case]:
    """Cases of files and their names; faults that show before a file is read are noted in them.

    Raises:
        DatasetError: two files would be written under one name.
    """
    found = [{"image": str(file), "case": name} for file, name in named]
    for target in found:
        if faults := file_faults(target["image"]):
            target["folder_problems"] = faults
    names = [target["case"] for target in found]
    twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DatasetError(f"{where}: several files would be written as the same case: {', '.join(twice)}")
    return found


def _of_channel(folder: Path, named: Sequence[tuple[Path, str]], channel: int) -> list[tuple[Path, str]]:
    """Files of a channel, by case, in a folder of the nnU-Net layout; says what is left out."""
    channels: dict[str, set[int]] = defaultdict(set)
    for _, name in named:
        if in_channel := split_channel(name):
            channels[in_channel[0]].add(in_channel[1])
    if channel == 0 and len(channels) == 1 and len(numbers := next(iter(channels.values()))) > 1:
        known = _known_channels(folder)
        if known is None or max(numbers) >= known:
            case = next(iter(channels))
            logger.warning("%s: the %d files %s_%04d to %04d are taken for scans of their own, not for channels of "
                           "one case: nothing else there has channels", folder, len(numbers), case, min(numbers),
                           max(numbers))  # fmt: skip
            return list(named)
    found = []
    for file, name in named:
        in_channel = split_channel(name)
        if in_channel is None or in_channel[1] == channel:
            found.append((file, in_channel[0] if in_channel else name))
    left_out = len(named) - len(found)
    if left_out and found:
        odd = [case for case, there in channels.items() if channel not in there]
        regular = len({frozenset(there) for there in channels.values()}) == 1
        others = sorted(set().union(*channels.values()) - {channel})
        text = (
            f"{folder}: {len(found)} of {len(named)} images are of channel {channel:04d}; {left_out} of the channels "
        )
        text += ", ".join(f"{n:04d}" for n in others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        text += " are left out"
        if odd:
            text += f", and with them all of {', '.join(odd[:_SHOWN])}{' ...' if len(odd) > _SHOWN else ''}"
        if not regular:
            text += ". If these are running numbers, rename the folder: only imagesTs and imagesTr have channels"
        logger.log(logging.INFO if regular else logging.WARNING, text)
    return found


def _known_channels(folder: Path) -> int | None:
    """How many channels the cases of ``imagesTs`` or ``imagesTr`` have, as the files beside it say; None: unknown."""
    description = folder.parent / "dataset.json"
    if description.is_file():
        content = read_json(description, dict, _LABELS)
        listed = content.get("channel_names", content.get("modality"))
        if isinstance(listed, (dict, list)):
            return len(listed)
    training = folder.parent / "imagesTr"
    there = [split_channel(name) for name in files_by_name(training)] if training != folder else []
    return max((case[1] + 1 for case in there if case), default=None)


def files_by_name(folder: Path) -> dict[str, list[Path]]:
    """Image files of a folder (not of its sub-folders) by their name without ending; usually one for each name."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in image_files(folder):
        found[printable(strip_ending(path))].append(path)
    return dict(found)


def folder_problems(images: Sequence[Path], partners: Sequence[Path]) -> list[str]:
    """What is wrong with a case by the look of its files; one text each."""
    problems = ["more than one file for the case"] if max(len(images), len(partners)) > 1 else []
    return list(dict.fromkeys([*problems, *(fault for path in (*images, *partners) for fault in file_faults(path))]))


def split_channel(name: str) -> tuple[str, int] | None:
    """``("CASE", k)`` of ``CASE_000k``; None for a name without channel suffix."""
    match = _CHANNEL.fullmatch(name)
    return (match["case"], int(match["channel"])) if match else None


def _read_labels(labels: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    if all(re.fullmatch(r"-?\d+", str(key)) for key in labels):  # version 1: value -> name
        classes: dict[str, tuple[int, ...]] = defaultdict(tuple)
        for value, name in labels.items():
            classes[str(name)] += (int(value),)
        return dict(classes)
    return {
        str(name): tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
        for name, value in labels.items()
    }
