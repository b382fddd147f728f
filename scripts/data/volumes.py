"""Reading image files, with errors that name the file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monai.utils import optional_import

# MONAI tells with every reader it makes, that is with every file, that a GPU decoder for DICOM is absent
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").addFilter(lambda record: record.levelno >= logging.ERROR)

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")
"""File endings that are taken for images."""


AFFINE_TOLERANCE_MM = 1e-2
"""Two affines that differ by no more in any entry are of the same voxels: headers hold float32, or less."""


class VolumeError(ValueError):
    """A file cannot be used as a 3D image.

    Attributes:
        reason: what is wrong, without the file's name.
    """

    def __init__(self, path: str | os.PathLike, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.reason = reason


def strip_ending(path: str | os.PathLike) -> str | None:
    """File name without its image ending; None if it is not an image file."""
    name = Path(path).name
    for ending in ENDINGS:
        if name.lower().endswith(ending) and not name.startswith("."):
            return name[: -len(ending)]
    return None


def load_volume(path: str | os.PathLike) -> MetaTensor:
    """``(1, H, W, D)`` float32 with the file's affine (voxel to mm, RAS+).

    Raises:
        VolumeError: missing, unreadable, not one 3D volume, or without a usable affine.
    """
    nrrd = str(path).lower().endswith(".nrrd")
    if nrrd and not optional_import("nrrd")[1]:
        raise VolumeError(path, "needs a reader that is not installed: pip install pynrrd")
    if not Path(path).is_file():
        raise VolumeError(path, "is missing")
    loader = LoadImage(reader="NrrdReader" if nrrd else "NibabelReader", image_only=True, ensure_channel_first=True)
    loader.readers = loader.readers[-1:]  # no other reader is to guess at a damaged file
    try:
        volume = loader(path)
    except Exception as error:  # nibabel, gzip and zlib each raise their own on damaged files
        raise VolumeError(path, f"cannot be read ({_short(error, path)})") from error
    if volume.ndim != 4 or volume.shape[0] != 1 or 0 in volume.shape:
        raise VolumeError(path, f"must be one 3D volume, got shape {(*volume.shape[1:], volume.shape[0])}")
    affine = np.asarray(volume.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(path, "has a singular affine")
    return volume


def volume_digest(volume: MetaTensor) -> str:
    """SHA-256 of voxels and affine: recognises a scan under another name, or compressed anew."""
    digest = hashlib.sha256(np.ascontiguousarray(volume.numpy(), dtype=np.float32).tobytes())
    digest.update(str(tuple(volume.shape)).encode())
    digest.update(np.round(np.asarray(volume.affine, dtype=float), 3).astype(np.float32).tobytes())
    return digest.hexdigest()


def _short(error: BaseException, path: str | os.PathLike) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else type(error).__name__
    return reason.replace(str(path), Path(path).name)[:120]
