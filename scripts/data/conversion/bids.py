"""BIDS folders -> cases: ``sub-*/[ses-*/]anat`` with masks in ``derivatives``.

Brain Imaging Data Structure: Gorgolewski et al. 2016, Scientific Data 3:160044, https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from scripts.data.conversion.pairing import (
    ImageFile,
    Key,
    RawCase,
    RawDataset,
    case_name,
    checked_patterns,
    existing_folder,
    make_cases,
    match,
    without_ending,
)
from scripts.data.files import DatasetError
from scripts.data.volumes import strip_ending

_Runs = dict[str, list[Path]]  # run, empty where the name has none -> files

_ENTITY = re.compile(r"(?:^|_)([A-Za-z]+)-([^_]*)")
_KEYS = {"sub", "ses", "run"}
"""Entities that tell cases apart."""

_RESAMPLED = {"space", "res", "den", "cohort"}
"""Entities of files on another grid than the subject's own, but for ``space-orig``, which is that one."""


def pair_bids(root: str | Path, image_patterns: Sequence[str], mask_pattern: str | None) -> RawDataset:
    """Pair by subject, session and run.

    A run that not all files of a session name is left out of the case's name, if it is the only one. Any other entity
    (``acq``, ``space``, ``desc``, …) that a pattern does not name is absent in what it matches, so that ``*_dseg``
    beside ``*_space-MNI_dseg`` is the one on the subject's own grid. Only if no file at all is without, and all have
    the same, none of it telling of another grid, that may be left unsaid: ``*_T1w`` is ``*_acq-mprage_T1w`` then.

    Args:
        root: folder with ``sub-*`` folders.
        image_patterns: one per channel, such as ``*_T1w.nii.gz``, which is looked for in ``sub-*/[ses-*/]anat``;
            any image ending is taken. ``acq-*`` names an entity of any value. With a folder in front
            (``derivatives/PIPELINE/*_desc-preproc_T1w.nii.gz``) it is looked for in the ``anat`` folders below it.
        mask_pattern: such as ``*_dseg.nii.gz``, looked for below ``derivatives`` (below ``root``, if it has no such
            folder: it is a pipeline's own then), or below the folder in front of it. None if there are no masks.

    Raises:
        FileNotFoundError: no such folder, or a pattern matches nothing.
        ValueError: a pattern is not usable, or given twice.
        DatasetError: no ``sub-*`` folders, or a pattern's files have entities that it has to choose by.
    """
    root = existing_folder(root)
    patterns = checked_patterns(image_patterns, mask_pattern)
    if not any(root.glob("sub-*")):
        raise DatasetError(f"{root} holds no sub-* folders: --source bids takes the root of a BIDS dataset")
    roles = [_find(root, pattern, is_mask=pattern is mask_pattern) for pattern in patterns]
    found = [matching for matching, _ in roles]
    keys = {scan: _keys([files.get(scan, {}) for files in found]) for scan in set().union(*found)}
    by_key: list[dict[Key, list[Path]]] = [defaultdict(list) for _ in patterns]
    for files, keyed in zip(found, by_key, strict=True):
        for scan, runs in files.items():
            for run, paths in runs.items():
                keyed[(*scan, *keys[scan][run])] += paths
    channels = [{key: [ImageFile(p) for p in paths] for key, paths in keyed.items()} for keyed in by_key]
    masks = by_key[-1] if mask_pattern is not None else None
    cases = make_cases(root, channels[: len(image_patterns)], masks, image_patterns, mask_pattern)
    cases += _left_out(root, patterns, found, [others for _, others in roles])
    suffixes = tuple(without_ending(pattern).rpartition("_")[2].strip("*") or "MRI" for pattern in image_patterns)
    return RawDataset(root, cases, suffixes)


def _find(root: Path, pattern: str, is_mask: bool) -> tuple[dict[Key, _Runs], dict[Key, list[Path]]]:
    """(sub-XX[, ses-YY]) -> run -> files; and files that fit but for entities that the pattern does not name."""
    folder, _, name = pattern.rpartition("/")
    anywhere = "**/" if is_mask or folder else ""
    base = root / (folder or ("derivatives" if is_mask and (root / "derivatives").is_dir() else ""))
    asked = {key for key, _ in _ENTITY.findall(without_ending(name))} | _KEYS
    by_unasked: dict[tuple[tuple[str, str], ...], list[tuple[Key, str, Path]]] = defaultdict(list)
    for scan in ("sub-*", "sub-*/ses-*"):
        for path in sorted(base.glob(f"{anywhere}{scan}/anat/*")):
            stem = strip_ending(path)
            if stem is None or match(without_ending(name), (stem,)) is None:
                continue
            session = path.parts[-3 if scan == "sub-*" else -4 : -2]
            entities = dict(_ENTITY.findall(stem))
            unasked = tuple((key, value) for key, value in entities.items() if key not in asked)
            run = f"run-{entities['run']}" if "run" in entities else ""
            by_unasked[unasked].append((session, run, path))
    option, none = ("mask", "; None: there are no masks") if is_mask else ("image", "")
    if not by_unasked:
        where = f"{anywhere}sub-*/[ses-*/]anat"
        raise FileNotFoundError(f"{base}: no file in {where} matches --{option}_pattern {pattern!r}{none}")
    if () not in by_unasked:
        (entities, files), *more = by_unasked.items()
        if more or _RESAMPLED & {key for key, value in entities if (key, value) != ("space", "orig")}:
            there = ", ".join(f"{_text(e)} ({len(f)} files)" for e, f in sorted(by_unasked.items()))
            one = name.replace("*_", f"*_{_text(entities)}_", 1)
            raise DatasetError(
                f"{base}: no file matches --{option}_pattern {pattern!r} without further entities; there are {there}. "
                f"Name them in the pattern: {one!r}, or {entities[0][0]}-* for any"
            )
        by_unasked[()] = by_unasked.pop(entities)
    found: dict[Key, _Runs] = defaultdict(lambda: defaultdict(list))
    for session, run, path in by_unasked.pop(()):
        found[session][run].append(path)
    others = defaultdict(list)
    for session, _, path in (file for files in by_unasked.values() for file in files):
        if session not in found:
            others[session].append(path)
    return dict(found), dict(others)


def _left_out(
    root: Path, patterns: Sequence[str], found: Sequence[dict[Key, _Runs]], others: Sequence[dict[Key, list[Path]]]
) -> list[RawCase]:
    """Faults for the scans of which no pattern has a file, but one would but for entities that it does not name."""
    cases = []
    for session in sorted(set().union(*others) - set().union(*found)):
        problems = []
        for pattern, files in zip(patterns, others, strict=True):
            if names := ", ".join(ImageFile(path).describe(root) for path in files.get(session, ())):
                problems.append(f"{names}: entities that the pattern {pattern!r} does not name")
        cases.append(RawCase(case_name(session), (), problems=tuple(problems)))
    return cases


def _text(entities: tuple[tuple[str, str], ...]) -> str:
    return "_".join(f"{key}-{value}" for key, value in entities)


def _keys(roles: Sequence[_Runs]) -> dict[str, Key]:
    """Run -> what it adds to the key, given the runs of each channel and of the masks in one session."""
    runs = sorted(set().union(*roles))
    if len([run for run in runs if run]) > 1:
        return {run: (run,) if run else () for run in runs}
    shared = len(runs) == 1
    return {run: (run,) if run and shared else () for run in runs}
