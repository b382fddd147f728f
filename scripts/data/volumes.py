"""Reading image files, with errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

from monai.transforms import LoadImage

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")
"""File endings that are taken for images."""


class VolumeError(ValueError):
    """A file cannot be used as a 3D image; the message names it."""


def strip_ending(path: str | os.PathLike) -> str | None:
    """File name without its image ending; None if it is not an image file."""
    name = Path(path).name
    for ending in ENDINGS:
        if name.lower().endswith(ending) and not name.startswith("."):
            return name[: -len(ending)]
    return None


def volume_reader(path: str | os.PathLike) -> LoadImage:
    """MONAI's loader for this file: ``(1, H, W, D)`` float32 MetaTensor with the file's affine (mm, RAS+)."""
    reader = "NrrdReader" if str(path).lower().endswith(".nrrd") else "NibabelReader"
    loader = LoadImage(reader=reader, image_only=True, ensure_channel_first=True)
    loader.readers = loader.readers[-1:]  # no other reader is to guess at a damaged file
    return loader
