"""BIDS datasets by their names: which scans they hold, what new files are called, what label numbers mean.

Brain Imaging Data Structure: Gorgolewski et al. 2016, Scientific Data 3:160044, https://bids-specification.readthedocs.io.
Labels of subjects, sessions and runs are texts: ``01``, ``1`` and ``010`` are three of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.data.files import DatasetError, image_files, read_json
from scripts.data.volumes import strip_ending

DESCRIPTION = "dataset_description.json"

ENTITIES = {
    "subject": "sub", "template": "tpl", "session": "ses", "cohort": "cohort", "sample": "sample", "task": "task",
    "tracksys": "tracksys", "acquisition": "acq", "nucleus": "nuc", "volume": "voi", "ceagent": "ce", "tracer": "trc",
    "stain": "stain", "reconstruction": "rec", "direction": "dir", "run": "run", "modality": "mod", "echo": "echo",
    "flip": "flip", "inversion": "inv", "mtransfer": "mt", "part": "part", "processing": "proc", "hemisphere": "hemi",
    "space": "space", "split": "split", "recording": "recording", "chunk": "chunk", "atlas": "atlas",
    "segmentation": "seg", "scale": "scale", "resolution": "res", "density": "den", "label": "label",
    "description": "desc",
}  # fmt: skip
"""Long name of an entity -> what it is in file names, in the order in which it stands there (BIDS 1.11)."""

_KEYS = tuple(ENTITIES.values())
_GRID = {"space": "orig", "res": None, "den": None, "cohort": None}
"""Entities that tell of a grid, and what those that are absent stand for."""
_OF_DERIVATIVES = {*_GRID, "desc", "label", "atlas", "seg", "scale"}
"""Entities that tell how a file was made, not what it is of."""
_NAME = re.compile(r"((?:[a-z]+-[0-9A-Za-z+]+_)+)([0-9A-Za-z]+)", re.ASCII)
_FORM = 'expected filters of scans, {"t1w": {"session": "02", "acquisition": null, "run": ["1", "2"]}}'
_SHOWN = 8


class BidsFile(NamedTuple):
    """A file that is named as BIDS has it.

    Attributes:
        path: the file.
        entities: key -> label, such as ``{"sub": "01", "ses": "pre"}``.
        suffix: what stands behind them, such as ``T1w``.
    """

    path: Path
    entities: dict[str, str]
    suffix: str

    @property
    def datatype(self) -> str:
        """The folder it is in, such as ``anat``."""
        return self.path.parent.name


def read_name(path: str | Path) -> BidsFile | None:
    """The parts of an image's name; None if it is no image, or not named as BIDS has it."""
    return _parts(Path(path), strip_ending(path))


def _parts(path: Path, stem: str | None) -> BidsFile | None:
    match = _NAME.fullmatch(stem or "")
    if match is None:
        return None
    return BidsFile(path, dict(part.split("-") for part in match[1][:-1].split("_")), match[2])


def file_name(entities: Mapping[str, str], suffix: str, ending: str) -> str:
    """A file's name, with its entities in the standard's order; unknown ones go before the description."""
    order = sorted(entities, key=lambda key: _KEYS.index(key) if key in _KEYS else len(_KEYS) - 1.5)
    return "_".join([*(f"{key}-{entities[key]}" for key in order), suffix]) + ending


def is_bids(folder: str | Path) -> bool:
    """Whether a folder is a BIDS dataset, raw or derivative: it says so, or has folders of subjects."""
    folder = Path(folder)
    return (folder / DESCRIPTION).is_file() or any(path.is_dir() for path in folder.glob("sub-*"))


def find_scans(
    root: str | Path,
    participants: Sequence[str] | None = None,
    sessions: Sequence[str] | None = None,
    suffix: str = "T1w",
    filters: Mapping[str, Any] | None = None,
) -> list[BidsFile]:
    """Scans of a dataset, sorted by name.

    Args:
        root: the dataset.
        participants: labels of subjects, with ``sub-`` or without; None for all.
        sessions: labels of sessions, with ``ses-`` or without; None for all.
        suffix: kind of scan.
        filters: further conditions from :func:`read_filters`; they may name another suffix or datatype than ``anat``.

    Raises:
        FileNotFoundError: no such folder, or no such scan.
        DatasetError: a subject or session that the dataset does not have, or it is no BIDS dataset.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: give the root of a BIDS dataset")
    subjects = sorted(path.name.removeprefix("sub-") for path in root.glob("sub-*") if path.is_dir())
    if not subjects:
        raise DatasetError(f"{root} holds no sub-* folders: give the root of a BIDS dataset")
    wanted = _known(participants, subjects, "sub-", f"{root} has no subject")
    conditions = {"suffix": suffix, "datatype": "anat"} | dict(filters or {})
    found = []
    for subject in wanted:
        for folder in (*root.glob(f"sub-{subject}/*"), *root.glob(f"sub-{subject}/ses-*/*")):
            names = map(read_name, image_files(folder))
            found += [file for file in names if file and file.entities.get("sub") == subject]
    there = sorted({file.entities["ses"] for file in found if "ses" in file.entities})
    if sessions is not None:
        conditions["ses"] = _known(sessions, there, "ses-", f"{root} has no session")
    chosen = [file for file in found if _fits(file, conditions)]
    if not chosen:
        kinds = ", ".join(sorted({file.suffix for file in found})[:_SHOWN]) or "no images"
        asked = ", ".join(f"{key} {value}" for key, value in conditions.items())
        raise FileNotFoundError(f"{root}: no scan has {asked}; there are {kinds}")
    return sorted(chosen, key=lambda file: str(file.path))


def _known(labels: Sequence[str] | None, there: Sequence[str], prefix: str, refusal: str) -> list[str]:
    """Labels without their prefix, each once; all of them for None."""
    if labels is None:
        return list(there)
    wanted = list(dict.fromkeys(label.removeprefix(prefix) for label in labels))
    if missing := [label for label in wanted if label not in there]:
        known = ", ".join(there[:_SHOWN]) + (", ..." if len(there) > _SHOWN else "")
        raise DatasetError(f"{refusal} {', '.join(missing)}; it has {known or 'none'}")
    return wanted


def _fits(file: BidsFile, conditions: Mapping[str, Any]) -> bool:
    values = {**file.entities, "suffix": file.suffix, "datatype": file.datatype}
    for key, asked in conditions.items():
        value = values.get(key)
        if asked == "*":
            fits = value is not None
        elif isinstance(asked, list):
            fits = value in asked
        else:
            fits = value == asked
        if not fits:
            return False
    return True


def read_filters(path: str | Path, suffix: str = "T1w") -> dict[str, Any]:
    """Conditions of a filter file, in the form that fMRIPrep made known.

    Args:
        path: JSON file: query -> entity -> label. A label is a text, a list of texts of which one fits, null for an
            entity that must be absent, or ``"*"`` for one that must be there. Entities go by their long or short names.
        suffix: the query is called so, in lower case (``t1w``); other queries are passed over.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: not such a file, no such query, or an entity that BIDS does not know.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: --bids_filter_file takes a JSON file of filters")
    queries = read_json(path, dict, _FORM)
    query = queries.get(suffix.lower())
    if not isinstance(query, dict):
        raise DatasetError(f"{path} has no filters called {suffix.lower()!r}: {_FORM}")
    found = {}
    for name, label in query.items():
        key = ENTITIES.get(name, name)
        if key not in (*_KEYS, "suffix", "datatype"):
            raise DatasetError(f"{path}: BIDS has no entity {name!r}: {_FORM}")
        labels = label if isinstance(label, list) else [label]
        if not all(isinstance(one, (str, type(None))) for one in labels):
            raise DatasetError(
                f"{path}: {name} must be a text, null or a list of them (labels such as 01 are no numbers)"
            )
        prefix = f"{key}-"
        labels = [one.removeprefix(prefix) if one else one for one in labels]
        found[key] = labels if isinstance(label, list) else labels[0]
    return found


def pair_with_scans(
    masks: Sequence[BidsFile], scans: Sequence[BidsFile]
) -> tuple[list[tuple[BidsFile, BidsFile]], list[BidsFile]]:
    """Label maps with the scans that they are of.

    Those are of the same subject and session and on the same grid; no entity of the acquisition that both name differs,
    and of several scans it is the one that shares most of them.

    Returns:
        The pairs, and the label maps without a scan.

    Raises:
        DatasetError: a label map could be of several scans.
    """
    pairs, alone = [], []
    for mask in masks:
        fitting = [scan for scan in scans if _may_be_of(mask, scan)]
        shared = [len(mask.entities.items() & scan.entities.items()) for scan in fitting]
        best = [scan for scan, count in zip(fitting, shared, strict=True) if count == max(shared)]
        if len(best) > 1:
            raise DatasetError(f"{mask.path.name} could be of {' or '.join(scan.path.name for scan in best)}")
        if best:
            pairs.append((mask, best[0]))
        else:
            alone.append(mask)
    return pairs, alone


def _may_be_of(mask: BidsFile, scan: BidsFile) -> bool:
    own, other = mask.entities, scan.entities
    if any(own.get(key) != other.get(key) for key in ("sub", "ses")):
        return False
    if any(own.get(key, same) != other.get(key, same) for key, same in _GRID.items()):
        return False
    return all(own[key] == other[key] for key in own.keys() & other.keys() - _OF_DERIVATIVES)


def dataset_name(root: str | Path) -> str:
    """A dataset's name as it describes itself, else its folder's."""
    description = Path(root, DESCRIPTION)
    name = read_json(description, dict, "expected BIDS's form").get("Name") if description.is_file() else None
    return name if isinstance(name, str) and name else Path(root).absolute().name


def label_names(mask: str | Path, root: str | Path) -> dict[int, str]:
    """Names of a mask's labels by number, from the ``_dseg.tsv`` that goes with it; empty if there is none.

    That is the table whose name has the mask's suffix and no entity that the mask has not, in the folder nearest to
    the mask, up to ``root`` (BIDS's inheritance principle).

    Raises:
        DatasetError: a table without the columns ``index`` and ``name``, or with other than whole numbers.
    """
    own = read_name(mask)
    if own is None:
        return {}
    for folder in Path(mask).absolute().parents:
        tables = [_parts_of_table(path) for path in sorted(folder.glob(f"*{own.suffix}.tsv"))]
        fitting = [t for t in tables if t and t.suffix == own.suffix and t.entities.items() <= own.entities.items()]
        if fitting:
            return _read_table(max(fitting, key=lambda table: len(table.entities)).path)
        if folder == Path(root).absolute():
            break
    return {}


def _parts_of_table(path: Path) -> BidsFile | None:
    return BidsFile(path, {}, path.stem) if "_" not in path.stem else _parts(path, path.stem)


def _read_table(path: Path) -> dict[int, str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        return {int(row["index"]): row["name"].strip() for row in rows if row["name"] is not None}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path}: expected the columns index (whole numbers) and name ({error})") from error


def same_names(tables: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """One table of label names of several.

    Raises:
        DatasetError: a number has two names.
    """
    names: dict[int, str] = {}
    for table in tables:
        for value, name in table.items():
            if names.setdefault(value, name) != name:
                raise DatasetError(
                    f"label {value} of the examples is {names[value]!r} in one table and {name!r} in another"
                )
    return names
