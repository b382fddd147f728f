"""Look at every file once, before any work: what is in it and what is wrong with it.

What was found is remembered in ``integrity.json`` by path, size and modification time, so that a second
run, or a resumed one, does not read the images again.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm

from scripts.data.grids import grid_difference, on_axes_of
from scripts.data.label_numbers import count_labels, label_numbers, without
from scripts.data.nnunet import Case, DatasetError
from scripts.data.records import read_record, write_record
from scripts.data.resampling import closest_axes
from scripts.data.volumes import (
    CONSTANT,
    NOT_FINITE,
    VolumeError,
    load_exact,
    load_volume,
    pair_digest,
    volume_digest,
)

logger = logging.getLogger(__name__)

_VERSION = 4
_MISSING = "missing|"
_FACTS = ("digest", "image_digest", "extent_mm", "voxel_mm", "values", "problems", "reordered")


def inspect_cases(cases: Sequence[Case], record: str | Path | None = None, workers: int = 4) -> list[Case]:
    """Read every case's files and add what was found to it.

    Args:
        cases: dicts with ``image`` and, where there is one, ``label``; or ``output``, an image instead of a label.
        record: ``integrity.json`` to remember results in; None remembers nothing.
        workers: threads that read.

    Returns:
        The cases with ``digest`` (SHA-256 of both volumes and their affine), ``image_digest`` (:func:`volume_digest`),
        ``extent_mm`` and ``voxel_mm`` (size of the foreground box and of a voxel along R, A, S), ``values``
        (label value -> voxels), ``problems`` (one text each, empty for a sound case) and ``reordered`` (label or
        output are stored along other axes than the image) added.
    """
    known = read_record(record)
    keys = [_key(case) for case in cases]
    new = [i for i, key in enumerate(keys) if key not in known]
    if new:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            found = pool.map(lambda i: _inspect(cases[i]), new)
            bar = tqdm(found, "checking files", len(new), unit="case", disable=len(new) == 1)
            for i, result in zip(new, bar, strict=True):
                known[keys[i]] = result
                if _key(cases[i]) != keys[i]:  # what was read may be either
                    raise DatasetError(f"{_name(cases[i])}: a file was replaced while it was read: start again")
        if record is not None:
            write_record({k: v for k, v in known.items() if not k.startswith(_MISSING)}, record)
    inspected = [case | known[key] for case, key in zip(cases, keys, strict=True)]
    for case in inspected:
        case["values"] = {int(value): count for value, count in case["values"].items()}
        case["problems"] = [*case.get("folder_problems", ()), *case["problems"]]
    _mark_unknown_values(inspected)
    _mark_duplicates(inspected)
    if turned := [_name(inspected[i]) for i in new if inspected[i]["reordered"]]:  # said once, when it is found
        logger.warning(
            "%d of %d cases have labels stored along other axes than their images (%s): reordered, without loss",
            len(turned), len(new), ", ".join(turned[:3]) + ", ..." * (len(turned) > 3),
        )  # fmt: skip
    return inspected


def ignored_values(case: Case) -> list[int]:
    """Label values that ``dataset.json`` knows but no class has: nnU-Net's "ignore", which counts nowhere."""
    if not case.get("classes") or case.get("known_values") is None:
        return []
    classes = {value for values in case["classes"].values() for value in values}
    return sorted(set(case["known_values"]) - classes - {0})


def sound_cases(inspected: Sequence[Case], skip_bad_cases: bool = False) -> list[Case]:
    """The cases without problems.

    Args:
        inspected: from :func:`inspect_cases`.
        skip_bad_cases: leave faulty cases out with a warning instead of raising.

    Raises:
        DatasetError: there are faulty cases (every one is named), or none is left.
    """
    bad = [case for case in inspected if case["problems"]]
    if bad:
        listing = "\n".join(f"  {_name(case)}: {'; '.join(case['problems'])}" for case in bad)
        if not skip_bad_cases:
            raise DatasetError(
                f"{len(bad)} of {len(inspected)} cases are faulty; mend them or go on without them by "
                f"--skip_bad_cases true:\n{listing}"
            )
        logger.warning("going on without %d of %d cases:\n%s", len(bad), len(inspected), listing)
    good = [case for case in inspected if not case["problems"]]
    if not good:
        raise DatasetError("no sound case is left")
    return good


def _name(case: Case) -> str:
    channel = f" channel {case['channel']:04d}" if case.get("channel") else ""
    return "/".join(str(case[k]) for k in ("dataset", "case") if k in case) + channel or str(case["image"])


def _inspect(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(_FACTS) | {"values": {}, "problems": [], "reordered": False}
    problems = found["problems"]
    image = _read(case["image"], "image", problems)
    label_kind = _label_kind(case)
    label = _read(case[label_kind], label_kind, problems) if label_kind else None
    return found if image is None else found | examine(image, label, label_kind, problems, ignored_values(case))


def examine(
    image: MetaTensor,
    label: MetaTensor | None,
    label_kind: str | None,
    problems: Sequence[str] = (),
    ignored: Sequence[int] = (),
) -> dict[str, Any]:
    """What is in a case, and what is wrong with it.

    Args:
        image: ``(1, H, W, D)``.
        label: what goes with it, or None; of a label map the file's own numbers (:func:`load_exact`).
        label_kind: ``label`` (label numbers) or ``output`` (an image); None without a label.
        problems: what was found to be wrong already.
        ignored: label values that count nowhere.

    Returns:
        As :func:`inspect_cases` adds it to a case.
    """
    problems = list(problems)
    found: dict[str, Any] = dict.fromkeys(_FACTS) | {"values": {}, "problems": problems, "reordered": False}
    voxels, affine = image[0].numpy(), np.asarray(image.affine, dtype=float)
    problems.extend(_image_faults(voxels, "image"))
    foreground = voxels > voxels.min()
    if label is not None:
        turned = on_axes_of(label, image)
        found["reordered"], label = turned is not label, turned
        if difference := grid_difference(label, image):
            problems.append(f"image and {label_kind} differ {difference}")
        if label_kind == "label":
            try:
                label = MetaTensor(label_numbers(label.as_tensor()), affine=label.affine)
                found["values"] = count_labels(label.as_tensor())
            except ValueError as error:
                problems.append(f"label {error}")
        else:
            problems.extend(_image_faults(label[0].numpy(), label_kind))
    if problems:
        return found
    if label is not None:
        plain = label[0].as_tensor()
        foreground |= (without(plain, ignored) > 0 if label_kind == "label" else plain > plain.min()).numpy()
    found["image_digest"] = volume_digest(image)
    found["digest"] = pair_digest(image, label, found["image_digest"])
    return found | box_and_voxel(foreground, affine)


def _image_faults(voxels: np.ndarray, what: str) -> list[str]:
    low, high = float(voxels.min()), float(voxels.max())  # NaN if any voxel is
    if not np.isfinite((low, high)).all():
        return [f"{what} {NOT_FINITE}"]
    if low == high:
        return [f"{what} {CONSTANT.format(low)}"]
    return []


def box_and_voxel(foreground: np.ndarray, affine: np.ndarray) -> dict[str, list[float]]:
    """``extent_mm`` and ``voxel_mm``, size of the foreground box and of a voxel along R, A and S."""
    one_voxel = np.ones((1, 1, 1), bool)
    return {"extent_mm": _box_extent_mm(foreground, affine), "voxel_mm": _box_extent_mm(one_voxel, affine)}


def _box_extent_mm(foreground: np.ndarray, affine: np.ndarray) -> list[float]:
    """Size of a mask's bounding box along the axes nearest to R, A and S; of the whole grid if it is empty.

    Args:
        foreground: boolean ``(H, W, D)``.
        affine: voxel to mm.
    """
    zooms = nib.affines.voxel_sizes(affine)
    to_ras = closest_axes(affine)[:, 0].astype(int)
    extent = [0.0, 0.0, 0.0]
    for axis in range(3):
        hit = np.flatnonzero(foreground.any(axis=tuple(a for a in range(3) if a != axis)))
        count = hit[-1] - hit[0] + 1 if len(hit) else foreground.shape[axis]
        extent[to_ras[axis]] = float(count * zooms[axis])
    return extent


def _label_kind(case: Case) -> str | None:
    return next((kind for kind in ("label", "output") if kind in case), None)


def _read(path: str | None, what: str, problems: list[str]) -> MetaTensor | None:
    if path is None or not Path(path).is_file():
        problems.append(f"{what} file is missing" + (f": {path}" if path is not None else ""))
        return None
    try:
        return (load_exact if what == "label" else load_volume)(path)
    except VolumeError as error:
        problems.append(f"{what} {Path(path).name} {error.reason}")
        return None


def _mark_unknown_values(cases: Sequence[Case]) -> None:
    for case in cases:
        known = case.get("known_values")
        unknown = sorted(set(case["values"]) - set(known)) if known is not None else []
        if unknown:
            case["problems"].append(f"label values {unknown} are not in dataset.json")


def _mark_duplicates(cases: Sequence[Case]) -> None:
    by_content = defaultdict(list)
    for case in cases:
        if case["image_digest"]:
            by_content[case.get("source", case.get("dataset")), case["image_digest"]].append(case)
    for same in by_content.values():
        for case in same[1:]:
            case["problems"].append(f"duplicate: same image as {_name(same[0])}")


def _key(case: Case) -> str:
    """Changes when a file of the case does; starts with ``_MISSING`` when one cannot be looked at."""
    kind = _label_kind(case)
    parts = [str(_VERSION), kind or "image"]
    for path in (case["image"], case[kind] if kind else None):
        try:
            status = os.stat(path) if path is not None else None
        except OSError:
            return f"{_MISSING}{case['image']}|{path}"
        parts.append(f"{Path(path).resolve()}|{status.st_size}|{status.st_mtime_ns}" if status else "")
    return "|".join(parts)
