"""BIDS folders -> cases: ``sub-*/[ses-*/]anat`` with masks in ``derivatives``.

Brain Imaging Data Structure: Gorgolewski et al. 2016, Scientific Data 3:160044, https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from scripts.data.nnunet import DatasetError
from scripts.data.pairing import (
    ImageFile,
    Key,
    RawDataset,
    checked_patterns,
    existing_folder,
    make_cases,
    match,
    without_ending,
)
from scripts.data.volumes import strip_ending

_Runs = dict[str, list[Path]]  # run, empty where the name has none -> files


def pair_bids(root: str | Path, image_patterns: Sequence[str], mask_pattern: str | None) -> RawDataset:
    """Pair by subject, session and run.

    A run that not all files of a session name is left out of the case's name, if it is the only one. Other
    entities (``acq``, ``space``, ``desc``, …) do not tell cases apart: the patterns choose by them.

    Args:
        root: folder with ``sub-*`` folders.
        image_patterns: one per channel, such as ``*_T1w.nii.gz``, which is looked for in ``sub-*/[ses-*/]anat``;
            any image ending is taken. With a folder in front (``derivatives/PIPELINE/*_desc-preproc_T1w.nii.gz``)
            it is looked for in the ``anat`` folders below that one.
        mask_pattern: such as ``*_dseg.nii.gz``, looked for below ``derivatives``, or below the folder in front of
            it. None if there are no masks.

    Raises:
        FileNotFoundError: no such folder, or a pattern matches nothing.
        ValueError: a pattern is not usable, or given twice.
    """
    root = existing_folder(root)
    patterns = checked_patterns(image_patterns, mask_pattern)
    if not any(root.glob("sub-*")):
        raise DatasetError(f"{root} holds no sub-* folders: --source bids takes the root of a BIDS dataset")
    found = [_find(root, pattern, is_mask=pattern is mask_pattern) for pattern in patterns]
    keys = {scan: _keys([files.get(scan, {}) for files in found]) for scan in set().union(*found)}
    by_key: list[dict[Key, list[Path]]] = [defaultdict(list) for _ in patterns]
    for files, keyed in zip(found, by_key, strict=True):
        for scan, runs in files.items():
            for run, paths in runs.items():
                keyed[(*scan, *keys[scan][run])] += paths
    channels = [{key: [ImageFile(p) for p in paths] for key, paths in keyed.items()} for keyed in by_key]
    masks = by_key[-1] if mask_pattern is not None else None
    cases = make_cases(root, channels[: len(image_patterns)], masks, image_patterns, mask_pattern)
    suffixes = tuple(without_ending(pattern).rpartition("_")[2].strip("*") or "MRI" for pattern in image_patterns)
    return RawDataset(root, cases, suffixes)


def _find(root: Path, pattern: str, is_mask: bool) -> dict[Key, _Runs]:
    """(sub-XX[, ses-YY]) -> run -> files."""
    folder, _, name = pattern.rpartition("/")
    anywhere = "**/" if is_mask or folder else ""
    base = root / (folder or ("derivatives" if is_mask else ""))
    found: dict[Key, _Runs] = defaultdict(lambda: defaultdict(list))
    for scan in ("sub-*", "sub-*/ses-*"):
        for path in sorted(base.glob(f"{anywhere}{scan}/anat/*")):
            stem = strip_ending(path)
            if stem is None or match(without_ending(name), (stem,)) is None:
                continue
            session = path.parts[-3 if scan == "sub-*" else -4 : -2]
            run = re.search(r"_(run-[A-Za-z0-9]+)", stem)
            found[session][run[1] if run else ""].append(path)
    if not found:
        option, none = ("mask", "; None: there are no masks") if is_mask else ("image", "")
        where = f"{anywhere}sub-*/[ses-*/]anat"
        raise FileNotFoundError(f"{base}: no file in {where} matches --{option}_pattern {pattern!r}{none}")
    return dict(found)


def _keys(roles: Sequence[_Runs]) -> dict[str, Key]:
    """Run -> what it adds to the key, given the runs of each channel and of the masks in one session."""
    runs = sorted(set().union(*roles))
    if len([run for run in runs if run]) > 1:
        return {run: (run,) if run else () for run in runs}
    shared = len(runs) == 1
    return {run: (run,) if run and shared else () for run in runs}
