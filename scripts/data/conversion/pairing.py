"""A user's raw files -> which image channels and which mask make up a case.

Nothing is read but names and headers here; what is wrong with a pairing is noted in the case, so that all faults
can be told at once. ``bids``, ``decathlon`` and ``dicom`` find their cases by other rules and share the rest.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.data.files import is_dangling, printable
from scripts.data.volumes import strip_ending

Key = tuple[str, ...]
"""What is common to the files of a case: sub-folders and whatever a pattern's ``*`` stood for."""


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    Attributes:
        path: the file.
        channels: how many 3D volumes it holds along its fourth axis; 1 for a 3D file.
    """

    path: Path
    channels: int = 1

    def describe(self, root: Path) -> str:
        """The path within ``root``."""
        return printable(str(self.path.relative_to(root)))


@dataclass(frozen=True)
class DicomSeries:
    """The slices of one DICOM series.

    Attributes:
        path: the folder.
        files: its slices, in the order of their positions.
        description: SeriesDescription, or whatever else tells it from others.
    """

    path: Path
    files: tuple[str, ...] = field(repr=False)
    description: str
    channels: int = 1

    def describe(self, root: Path) -> str:
        """Folder within ``root``, description and number of files."""
        return f"{self.path.relative_to(root)} ({self.description!r}, {len(self.files)} files)"


Source = ImageFile | DicomSeries


@dataclass(frozen=True)
class RawCase:
    """A case as it is to be.

    Attributes:
        case: its name, safe as part of a file name.
        images: what its channels are read from, in order.
        mask: its label file, if there is one.
        problems: what is wrong with the pairing, one text each.
        test: goes to ``imagesTs``.
    """

    case: str
    images: tuple[Source, ...]
    mask: Path | None = None
    problems: tuple[str, ...] = ()
    test: bool = False


@dataclass(frozen=True)
class RawDataset:
    """All that a reader of raw data found.

    Attributes:
        root: folder that the files are told apart in.
        cases: sorted by name.
        channel_names: one per channel.
        label_names: label value -> name, where the source has names; then other values are faults.
    """

    root: Path
    cases: list[RawCase]
    channel_names: tuple[str, ...]
    label_names: dict[int, str] | None = None


def pair_files(root: str | Path, image_patterns: Sequence[str], mask_pattern: str | None) -> RawDataset:
    """Pair image and mask files by name.

    A pattern is matched against the end of a path within ``root``; its ``*`` stands for one or more characters of
    one name. What it stood for, and the sub-folders in front, is the same for the files of a case. A file that
    several patterns match belongs to the one with most fixed characters, so that ``*.nii.gz`` and
    ``*_seg.nii.gz`` go together.

    Args:
        root: folder with the files, sub-folders included; hidden ones are left out.
        image_patterns: one per channel, such as ``*_img.nii.gz`` or ``images/*.nii.gz``.
        mask_pattern: None if there are no masks.

    Raises:
        FileNotFoundError: no such folder, or a pattern matches nothing.
        ValueError: a pattern is not usable, or given twice.
    """
    root = existing_folder(root)
    patterns = checked_patterns(image_patterns, mask_pattern)
    files = [path for path in visible_files(root) if strip_ending(path)]
    found: list[dict[Key, list[Path]]] = [defaultdict(list) for _ in patterns]
    undecided = []
    for path in files:
        keys = {pattern: match(pattern, path.relative_to(root).parts) for pattern in patterns}
        hits = [pattern for pattern in patterns if keys[pattern] is not None]
        most = max((_fixed(pattern) for pattern in hits), default=0)
        best = [pattern for pattern in hits if _fixed(pattern) == most]
        if len(best) > 1:
            name = ImageFile(path).describe(root)
            undecided.append(RawCase(name, (), problems=(f"{name} is matched by {' and by '.join(best)}",)))
        elif best:
            found[patterns.index(best[0])][keys[best[0]]].append(path)
    if not undecided:
        for pattern, hits in zip(patterns, found, strict=True):
            if not hits:
                raise FileNotFoundError(_nothing_found(root, pattern, files, pattern is mask_pattern))
    channels = [{key: [ImageFile(p) for p in paths] for key, paths in hits.items()} for hits in found]
    masks = found[-1] if mask_pattern is not None else None
    cases = make_cases(root, channels[: len(image_patterns)], masks, image_patterns, mask_pattern)
    return RawDataset(root, [*cases, *undecided], channel_names_of(image_patterns))


def make_cases(
    root: Path,
    channels: Sequence[Mapping[Key, Sequence[Source]]],
    masks: Mapping[Key, Sequence[Path]] | None,
    image_patterns: Sequence[str],
    mask_pattern: str | None,
    remedy: str = "narrow the pattern",
) -> list[RawCase]:
    """Put together what has the same key; what is missing, ambiguous or of the same name is a problem of the case.

    Args:
        root: folder that files are named in.
        channels: for each channel, key -> images found.
        masks: key -> masks found; None if there are none to be.
        image_patterns: of the channels, for the messages.
        mask_pattern: of the masks, for the messages.
        remedy: what to do where several images are found.
    """
    cases = []
    for key in sorted(set().union(*channels, masks or ())):
        images = [found.get(key, ()) for found in channels]
        labels = [ImageFile(path) for path in masks.get(key, ())] if masks is not None else []
        all_files = _listing([*(image for several in images for image in several), *labels], root)
        problems = []
        for number, several in enumerate(images):
            if not several:
                problems.append(f"no image of channel {number:04d} ({image_patterns[number]}) for {all_files}")
            elif len(several) > 1:
                problems.append(f"several images of channel {number:04d}, {remedy}: {_listing(several, root)}")
        if len(labels) > 1:
            problems.append(f"several masks, narrow the pattern: {_listing(labels, root)}")
        elif masks is not None and not labels:
            problems.append(f"no mask ({mask_pattern}) for {all_files}")
        for source in (*(image for several in images for image in several), *labels):
            if is_dangling(source.path):
                problems.append(f"{source.describe(root)} is a link to nothing: fetch the file (datalad get)")
        name = case_name(key)
        if not name:
            problems.append(f"no case name can be made of {all_files}")
        chosen = tuple(several[0] for several in images if several)
        mask = labels[0].path if labels else None
        cases.append(RawCase(name, chosen, mask, tuple(problems)))
    return mark_clashes(cases, root)


def mark_clashes(cases: Sequence[RawCase], root: Path) -> list[RawCase]:
    """Add a problem to cases that would be written to the same files, also where case is ignored in file names."""
    same = defaultdict(list)
    for case in cases:
        same[case.case.casefold()].append(case)
    marked = []
    for case in cases:
        others = [other for other in same[case.case.casefold()] if other is not case]
        if case.case and others:
            files = [_listing(_files_of(c), root) for c in (case, *others)]
            case = replace(case, problems=(*case.problems, f"one case name for {' and for '.join(files)}"))
        marked.append(case)
    return marked


def case_name(key: Key) -> str:
    """A file name's stem of a key: parts joined by ``_``, safe characters only; may be empty.

    A folder whose name the file repeats (``sub1/sub1_img.nii.gz``) is not named twice.
    """
    *folders, last = key
    repeated = [f for f in folders if last == f or (last.startswith(f) and not last[len(f)].isalnum())]
    name = unicodedata.normalize("NFC", "_".join([*(f for f in folders if f not in repeated), last]))
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")


def match(pattern: str, parts: Sequence[str]) -> Key | None:
    """The key of a path that ends as the pattern says, else None.

    Args:
        pattern: ``/`` separates names, ``*`` is one or more characters of one; everything else stands for itself.
        parts: the path's names.
    """
    wanted = pattern.split("/")
    if len(parts) < len(wanted):
        return None
    key = list(parts[: -len(wanted)])
    for part, name in zip(wanted, parts[-len(wanted) :], strict=True):
        found = re.fullmatch("(.+)".join(map(re.escape, part.split("*"))), name)
        if found is None:
            return None
        key += found.groups()
    return tuple(key) or None


def checked_patterns(image_patterns: Sequence[str], mask_pattern: str | None) -> list[str]:
    """All patterns in a row, the masks' last.

    Raises:
        ValueError: a pattern that cannot match as meant, or is given twice.
    """
    patterns = [*image_patterns, *([mask_pattern] if mask_pattern is not None else [])]
    for pattern in patterns:
        parts = pattern.split("/")
        if pattern.startswith("/") or "**" in pattern or {"", ".", ".."} & set(parts):
            raise ValueError(
                f"pattern {pattern!r}: give the end of a path within --input_dir, such as *_img.nii.gz or "
                "images/*.nii.gz; sub-folders are searched anyway"
            )
        if patterns.count(pattern) > 1:
            raise ValueError(f"pattern {pattern!r} is given twice: every channel and the masks need one of their own")
    return patterns


def channel_names_of(patterns: Sequence[str]) -> tuple[str, ...]:
    """Names by the fixed part of each pattern (``*_t1.nii.gz``: ``t1``); MRI for a single channel."""
    if len(patterns) == 1:
        return ("MRI",)
    return tuple("_".join(re.findall(r"\w+", without_ending(p).replace("_", " "))) or "MRI" for p in patterns)


def without_ending(pattern: str) -> str:
    """The pattern less its image ending."""
    ending = Path(pattern).name
    stem = strip_ending(ending)
    return pattern if stem is None else pattern[: len(pattern) - len(ending) + len(stem)]


def visible_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; hidden files and folders are left out, as are folders that are links."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def existing_folder(root: str | Path) -> Path:
    """The folder's absolute path.

    Raises:
        FileNotFoundError: no such folder.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: --input_dir takes the folder of the raw files")
    return root


def pairing_table(dataset: RawDataset) -> str:
    """The cases without problems as a table: case, files of each channel, mask."""
    sound = [case for case in dataset.cases if not case.problems]
    masks = any(case.mask for case in sound)
    parts = any(case.test for case in sound)
    numbers = [f"{number:04d} {name}" for number, name in enumerate(dataset.channel_names)]
    head = ["case", *(["part"] if parts else []), *numbers, *(["mask"] if masks else [])]
    rows = [head]
    for case in sound:
        images = [
            s.describe(dataset.root) + f" #{i}" * (s.channels > 1) for s in case.images for i in range(s.channels)
        ]
        part = [f"imagesT{'s' if case.test else 'r'}"] if parts else []
        mask = [ImageFile(case.mask).describe(dataset.root) if case.mask else "-"] if masks else []
        rows.append([case.case, *part, *images, *mask])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def _fixed(pattern: str) -> int:
    return len(pattern.replace("*", ""))


def _files_of(case: RawCase) -> list[Source]:
    return [*case.images, *([ImageFile(case.mask)] if case.mask else [])]


def _listing(sources: Sequence[Source], root: Path) -> str:
    return ", ".join(source.describe(root) for source in sources)


def _nothing_found(root: Path, pattern: str, files: Sequence[Path], is_mask: bool) -> str:
    there = _listing([ImageFile(path) for path in files[:3]], root) or "no image files"
    option, none = ("--mask_pattern", " (None: there are no masks)") if is_mask else ("--image_pattern", "")
    return f"{root}: no file matches {option} {pattern!r}{none}; there are {len(files)} image files: {there}" + (
        ", …" if len(files) > 3 else ""
    )
