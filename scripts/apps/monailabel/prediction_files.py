"""Predictions as the files that viewers ask for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
from monai.data import MetaTensor

from scripts.inference.native_nifti import native_nifti
from scripts.runtime.atomic_files import write_atomically

ENDINGS = (".nii.gz", ".nii", ".nrrd")

_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def write_prediction(prediction: MetaTensor, source: str | Path, ending: str | None = None) -> str:
    """Write a prediction to a temporary file, which is the caller's to remove.

    Its data type is the prediction's own: a viewer's wish for 8 bits would wrap label numbers above 255.

    Args:
        prediction: ``(1, H, W, D)`` in the scan's own space.
        source: path of the scan, whose ending is taken if it is one of :data:`ENDINGS`.
        ending: what the viewer asks for.

    Returns:
        The file's path.

    Raises:
        ValueError: another ending.
    """
    named = next((known for known in ENDINGS if str(source).lower().endswith(known)), ENDINGS[0])
    ending = str(ending or named).lower()
    if ending not in ENDINGS:
        raise ValueError(f"result_extension must be one of {', '.join(ENDINGS)}, got {ending!r}")
    folder = Path(tempfile.mkdtemp(prefix="neuroverse3d_"))
    path = folder.with_suffix(ending)  # beside it, so that removing the file leaves nothing
    try:
        if ending == ".nrrd":
            save_nrrd(prediction, path)
        else:
            write_atomically(path, lambda temporary: nib.save(native_nifti(prediction), temporary), ending)
    finally:
        folder.rmdir()
    return str(path)


def save_nrrd(prediction: MetaTensor, path: str | Path) -> None:
    """Write ``(1, H, W, D)`` as NRRD, sheared axes as they are, all of it or nothing.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    affine = np.asarray(prediction.affine, dtype=float)
    header = {
        "space": "left-posterior-superior",
        "space directions": (_TO_LPS @ affine[:3, :3]).T,
        "space origin": _TO_LPS @ affine[:3, 3],
        "kinds": ["domain"] * 3,
        "encoding": "gzip",
    }
    voxels = prediction[0].cpu().numpy()
    write_atomically(path, lambda temporary: nrrd.write(temporary, voxels, header), ".nrrd")
