"""Three BIDS datasets with small volumes, of the kinds that bids-standard/bids-examples has; the same for one seed.

Command line, to look at them: ``python -m tests.bids_trees FOLDER``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

SIZE = 20
NAMES = {1: "Left-Caudate", 2: "Right-Caudate"}


def plain(folder: Path) -> Path:
    """As ds001: one scan per subject, and the manual masks of some in ``derivatives/manual``, without scans."""
    root = _dataset(folder / "plain", "Plain", ("01", "02", "03", "04"))
    for number, subject in enumerate(("01", "02", "03", "04")):
        _scan(root, subject, "T1w", seed=number, beside={"FLAIR"} if subject == "02" else ())
    masks = _dataset(root / "derivatives" / "manual", "Manual masks", (), "derivative")
    for number, subject in enumerate(("01", "02", "03")):
        _mask(masks, subject, "dseg", seed=number)
    _table(masks / "dseg.tsv")
    return root


def sessions(folder: Path) -> Path:
    """As 7t_trt: sessions and runs; the examples are a derivative elsewhere, with scans of its own."""
    root = _dataset(folder / "sessions", "Sessions", ("01", "02"))
    for number, name in enumerate(
        f"{subject}_ses-{session}_run-{run}" for subject in ("01", "02") for session in ("1", "2") for run in ("1", "2")
    ):
        if "02_ses-2_run-2" not in name:
            _scan(root, name, "T1w", seed=10 + number)
    examples = _dataset(folder / "examples", "Examples", (), "derivative")
    for number, subject in enumerate(("a", "b", "c")):
        _scan(examples, subject, "desc-preproc_T1w", seed=30 + number, sidecar={"SkullStripped": False})
        _mask(examples, subject, "desc-aseg_dseg", seed=30 + number)
    _table(examples / "desc-aseg_dseg.tsv")
    return root


def labels_are_texts(folder: Path) -> Path:
    """As ds000246 and others: subjects ``1``, ``01`` and ``010``, two acquisitions, uncompressed files."""
    root = _dataset(folder / "texts", "Labels are texts", ("01", "010", "1"))
    for number, subject in enumerate(("01", "010", "1")):
        _scan(root, f"{subject}_acq-highres", "T1w", seed=20 + number, ending=".nii")
    _scan(root, "010_acq-fast", "T1w", seed=27, ending=".nii")
    masks = _dataset(root / "derivatives" / "manual", "Manual masks", (), "derivative")
    for number, subject in enumerate(("01", "010", "1")):
        _mask(masks, f"{subject}_acq-highres", "dseg", seed=20 + number, table=True)
    return root


TREES = {"plain": plain, "sessions": sessions, "texts": labels_are_texts}


def _dataset(root: Path, name: str, subjects: Sequence[str], kind: str = "raw") -> Path:
    root.mkdir(parents=True)
    about = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": kind, "License": "CC0", "Authors": ["A", "B"]}
    if kind == "derivative":
        about["GeneratedBy"] = [{"Name": "by hand"}]
    (root / "dataset_description.json").write_text(json.dumps(about))
    (root / "README").write_text(f"{name}: made-up volumes of {SIZE} voxels a side, to try programs with. " * 3)
    if subjects:
        (root / "participants.tsv").write_text("participant_id\n" + "".join(f"sub-{s}\n" for s in subjects))
    return root


def _volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A dim head with two bright balls, and the balls' labels."""
    rng = np.random.default_rng([5, seed])
    grid = np.stack(np.meshgrid(*map(np.arange, (SIZE, SIZE, SIZE)), indexing="ij"), -1)
    image = rng.integers(1, 40, (SIZE, SIZE, SIZE)).astype(np.int16)
    image[np.linalg.norm(grid - SIZE / 2, axis=-1) < SIZE / 2 - 1] += 100
    label = np.zeros_like(image, dtype=np.uint8)
    for value, x in ((1, SIZE // 3), (2, SIZE - SIZE // 3)):
        ball = np.linalg.norm(grid - (x, *rng.integers(SIZE // 2 - 1, SIZE // 2 + 2, 2)), axis=-1) <= 3
        image[ball], label[ball] = 300 + 50 * value, value
    return image, label


def _save(voxels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.diag([1, 1, 1, 1]))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def _scan(
    root: Path,
    name: str,
    suffix: str,
    seed: int,
    ending: str = ".nii.gz",
    beside: Sequence[str] = (),
    sidecar: dict | None = None,
) -> None:
    for kind in (suffix, *beside):
        path = _anat(root, name) / f"sub-{name}_{kind}{ending}"
        _save(_volumes(seed)[0], path)
        if sidecar:
            Path(str(path).replace(ending, ".json")).write_text(json.dumps(sidecar))


def _mask(root: Path, name: str, suffix: str, seed: int, table: bool = False) -> None:
    path = _anat(root, name) / f"sub-{name}_{suffix}.nii.gz"
    _save(_volumes(seed)[1], path)
    if table:
        _table(Path(str(path).replace(".nii.gz", ".tsv")))


def _anat(root: Path, name: str) -> Path:
    subject, *others = name.split("_")
    return Path(root, f"sub-{subject}", *(part for part in others if part.startswith("ses-")), "anat")


def _table(path: Path) -> None:
    path.write_text("index\tname\n" + "".join(f"{value}\t{name}\n" for value, name in NAMES.items()))


if __name__ == "__main__":
    for make in TREES.values():
        print(make(Path(sys.argv[1])))
