"""Reading image files, with errors that name the file."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, MapTransform
from monai.utils import optional_import

# MONAI tells with every reader it makes, that is with every file, that a GPU decoder for DICOM is absent
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").addFilter(lambda record: record.levelno >= logging.ERROR)

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")
"""File endings that are taken for images."""


AFFINE_TOLERANCE_MM = 1e-2
"""Two affines that differ by no more in any entry are of the same voxels: headers hold float32, or less."""

VOXEL_RANGE_MM = (0.01, 50.0)
"""Voxel edges outside of this range are taken for a mistake in the header (metres, micrometres, zeros)."""

NOT_FINITE = "holds NaN or infinite voxels: replace them, or take the scan anew from its source"
"""What is said of such an image."""

CONSTANT = "is constant (every voxel is {:g}): is it the right file?"
"""What is said of an image of one value."""

NIFTI_SPACE = "nifti_space"
"""Meta data key: values of :data:`NIFTI_SPACE_FIELDS` of the file's header, one after the other."""

NIFTI_SPACE_FIELDS = {
    "qform_code": 1,
    "sform_code": 1,
    "xyzt_units": 1,
    "pixdim": 8,
    "quatern_b": 1,
    "quatern_c": 1,
    "quatern_d": 1,
    "qoffset_x": 1,
    "qoffset_y": 1,
    "qoffset_z": 1,
    "srow_x": 4,
    "srow_y": 4,
    "srow_z": 4,
}
"""NIfTI header fields, and their lengths, that say where the voxels are: viewers differ in which they go by."""


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
    """Read a NIfTI, MGH or NRRD file.

    A NIfTI file's affine is its sform if that has a code, else its qform, as nibabel has it. (MONAI's reader replaces
    an sform whose voxel sizes are not those of the header by the qform.)

    Returns:
        ``(1, H, W, D)`` float32, scaled by the file's slope and intercept, with the file's affine (voxel to mm, RAS+);
        meta data ``filename_or_obj``, and :data:`NIFTI_SPACE` for a NIfTI file. Trailing axes of length 1 are dropped.

    Raises:
        VolumeError: missing, unreadable, not one 3D volume of numbers, or without a usable affine.
    """
    if not Path(path).is_file():
        raise VolumeError(path, "is missing")
    volume = _read_nrrd(path) if str(path).lower().endswith(".nrrd") else _read_nibabel(path)
    if fault := volume_fault(volume):
        raise VolumeError(path, fault)
    volume.meta["filename_or_obj"] = str(path)
    return volume


def volume_fault(volume: MetaTensor) -> str | None:
    """What is wrong with a volume's shape or affine, and what to do; None if nothing is.

    Args:
        volume: should be ``(1, H, W, D)``.
    """
    if volume.ndim != 4 or volume.shape[0] != 1 or 0 in volume.shape:
        shape = (*volume.shape[1:], volume.shape[0]) if volume.ndim == 4 and volume.shape[0] > 1 else volume.shape[1:]
        return (
            f"must be one 3D volume, got shape {tuple(shape)}: save each volume or channel as a file of its own, and "
            "slices as one stack"
        )
    if sum(n > 1 for n in volume.shape[1:]) < 2:
        return f"must be one 3D volume, got {tuple(volume.shape[1:])} voxels, a point or a line: is it the right file?"
    affine = np.asarray(volume.affine, dtype=float)
    if not np.isfinite(affine).all():
        return "has NaN or infinite values in its affine: set its sform or qform anew"
    zooms = nib.affines.voxel_sizes(affine)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 * np.prod(zooms) or not zooms.all():
        return "has a singular affine (axes of no length, or two that point the same way): set its sform or qform anew"
    low, high = VOXEL_RANGE_MM
    if zooms.min() < low or zooms.max() > high:
        sizes = " x ".join(f"{zoom:.3g}" for zoom in zooms)
        return f"has voxels of {sizes} mm, not within {low:g} to {high:g} mm: mend the spacing in its header"
    return None


def volume_digest(volume: MetaTensor) -> str:
    """SHA-256 of a scan's voxels in RAS order.

    Recognises the scan under another name, compressed, oriented or typed otherwise, or in another file format. Of the
    affine only the orientation counts: headers round the rest, or differ in it. A scan that was resampled, rescaled
    or stored with a coarser slope is another one.

    Args:
        volume: ``(1, H, W, D)``.
    """
    to_ras = nib.io_orientation(np.asarray(volume.affine, dtype=float))
    voxels = nib.orientations.apply_orientation(volume[0].numpy(), to_ras)
    digest = hashlib.sha256(str(voxels.shape).encode())
    for plane in voxels:  # plane by plane, so that no second copy of the scan is made
        digest.update(np.ascontiguousarray(plane + np.float32(0), dtype=np.float32))  # -0 becomes 0
    return digest.hexdigest()


class LoadVolumed(MapTransform):
    """Reads paths with :func:`load_volume`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key: path -> ``(1, H, W, D)`` float32."""
        return {**data, **{key: load_volume(data[key]) for key in self.key_iterator(data)}}


def _read_nibabel(path: str | os.PathLike) -> MetaTensor:
    try:
        image = nib.load(path)
        if image.get_data_dtype().fields:
            raise VolumeError(path, "holds colours (RGB): convert it to one grey value per voxel")
        if np.issubdtype(image.get_data_dtype(), np.complexfloating):
            raise VolumeError(path, "holds complex numbers: save their magnitude")
        if not all(_header_zooms(image)):
            raise VolumeError(path, "has voxels of 0 mm: mend the spacing in its header")
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except VolumeError:
        raise
    except Exception as error:  # nibabel, gzip and zlib each raise their own on damaged files
        raise VolumeError(path, f"cannot be read ({_short(error, path)})") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    meta = {NIFTI_SPACE: _nifti_space(image.header)} if isinstance(image.header, nib.Nifti1Header) else {}
    return MetaTensor(torch.as_tensor(voxels)[None], affine=torch.as_tensor(image.affine).double(), meta=meta)


def _header_zooms(image: nib.spatialimages.SpatialImage) -> list[float]:
    """Voxel sizes that the affine goes by, as they are in the file: nibabel takes 1 mm for 0."""
    if isinstance(image.header, nib.Nifti1Header) and image.header["sform_code"] == 0:
        with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
            header = type(image.header).from_fileobj(file, check=False)
        return header["pixdim"][1 : 1 + min(3, image.ndim)].tolist()
    return list(image.header.get_zooms()[:3])


def _read_nrrd(path: str | os.PathLike) -> MetaTensor:
    if not optional_import("nrrd")[1]:
        raise VolumeError(path, "needs a reader that is not installed: pip install pynrrd")
    loader = LoadImage(reader="NrrdReader", image_only=True, ensure_channel_first=True)
    loader.readers = loader.readers[-1:]  # no other reader is to guess at a damaged file
    try:
        volume = loader(path)
    except Exception as error:  # pynrrd raises its own on damaged files
        raise VolumeError(path, f"cannot be read ({_short(error, path)})") from error
    return MetaTensor(volume.as_tensor(), affine=volume.affine)


def _nifti_space(header: nib.Nifti1Header) -> np.ndarray:
    return np.concatenate([np.atleast_1d(header[field]).astype(np.float64) for field in NIFTI_SPACE_FIELDS])


def _short(error: BaseException, path: str | os.PathLike) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    lines = [line for line in lines if not line.startswith("- ")] or lines  # nibabel's afterthoughts
    reason = re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else type(error).__name__
    return reason.replace(str(path), Path(path).name)[:120]
