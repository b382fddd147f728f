"""Reading image files, with errors that name the file."""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import re
import zlib
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NrrdReader
from monai.transforms import LoadImage
from monai.utils import optional_import

from scripts.data.grids import grid_difference, on_axes_of
from scripts.data.label_numbers import label_numbers
from scripts.runtime.memory import free_host_memory

# MONAI tells with every reader it makes, that is with every file, that a GPU decoder for DICOM is absent
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").addFilter(lambda record: record.levelno >= logging.ERROR)

ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".nrrd")
"""File endings that are taken for images."""


VOXEL_RANGE_MM = (0.01, 50.0)
"""Voxel edges outside of this range are taken for a mistake in the header (metres, micrometres, zeros)."""

NOT_FINITE = "holds NaN or infinite voxels: replace them, or take the scan anew from its source"
"""What is said of such an image."""

CONSTANT = "is constant (every voxel is {:g}): is it the right file?"
"""What is said of an image of one value."""

UNIT_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""NIfTI's codes of units of length, in mm: unknown (taken for mm), metre, mm, micron."""

_UNIT_BITS = 0b111  # of xyzt_units; the others are the unit of time

_MOST_PACKING = 1032
"""Deflate makes no more bytes of one: a header that promises more is wrong."""

_SPARE_BYTES = 2**26
"""More than this behind the voxels is none of an image's: it is not read on for ever."""

_KEPT = 0.9
"""Part of the free memory that one volume may take."""

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
    """Read a NIfTI, MGH or NRRD file as an image.

    A NIfTI file's affine is its sform if that has a code, else its qform, as nibabel has it. (MONAI's reader replaces
    an sform whose voxel sizes are not those of the header by the qform.) Its unit of length is applied. Of a
    compressed file everything is read, up to the checksum behind the data, which nibabel does not reach.

    Returns:
        ``(1, H, W, D)`` float32, scaled by the file's slope and intercept, with the file's affine (voxel to mm, RAS+);
        meta data ``filename_or_obj``, and :data:`NIFTI_SPACE` for a NIfTI file. Trailing axes of length 1 are dropped.

    Raises:
        VolumeError: missing, unreadable, damaged, larger than the free memory, not one 3D volume of numbers, or
            without a usable affine.
    """
    return _load(path, exact=False)


def load_exact(path: str | os.PathLike) -> MetaTensor:
    """As :func:`load_volume`, in a type that holds the file's numbers exactly: float32 loses integers above 2^24."""
    return _load(path, exact=True)


def load_labels(path: str | os.PathLike) -> MetaTensor:
    """Read a label map.

    Returns:
        ``(1, H, W, D)`` integers (:func:`label_numbers`), otherwise as :func:`load_volume`.

    Raises:
        VolumeError: as :func:`load_volume`, or values that are no label numbers.
    """
    return as_labels(load_exact(path), path)


def as_labels(volume: MetaTensor, name: str | os.PathLike) -> MetaTensor:
    """A volume's voxels as label numbers, with its affine and meta data.

    Raises:
        VolumeError: values that are no label numbers; ``name`` is named.
    """
    try:
        return MetaTensor(label_numbers(volume.as_tensor()), meta=volume.meta)
    except ValueError as error:
        raise VolumeError(name, str(error)) from error


def load_known(path: str | os.PathLike, digest: str | None = None) -> MetaTensor:
    """As :func:`load_volume`, of an image that is known to have a :func:`pair_digest` of its own, unless None.

    Raises:
        VolumeError: it is another one.
    """
    volume = load_volume(path)
    if digest is not None and pair_digest(volume, None) != digest:
        raise VolumeError(path, "has been replaced since it was checked: start again")
    return volume


def load_pair(
    image: str | os.PathLike | MetaTensor,
    label: str | os.PathLike | MetaTensor,
    labels: bool,
    digest: str | None = None,
) -> tuple[MetaTensor, MetaTensor]:
    """An image and what goes with it, on the image's voxels; one stored along other axes is reordered.

    Args:
        image: path, or the volume ``(1, H, W, D)``.
        label: the same of its label map, or of a second image.
        labels: ``label`` is a label map.
        digest: :func:`pair_digest` that they are known to have; of volumes it is not compared.

    Returns:
        The image as from :func:`load_volume`, the other as from that or :func:`load_labels`.

    Raises:
        VolumeError: one of them cannot be read, they are not on the same voxels, or are not what they were.
    """
    in_hand = isinstance(image, MetaTensor), isinstance(label, MetaTensor)
    volume = image if in_hand[0] else load_volume(image)
    names = [
        v.meta.get("filename_or_obj", "the given volume") if isinstance(v, MetaTensor) else v for v in (image, label)
    ]
    if in_hand[1]:
        other = as_labels(label, names[1]) if labels else label
    else:
        other = (load_labels if labels else load_volume)(label)
    other = on_axes_of(other, volume)
    if difference := grid_difference(other, volume):
        raise VolumeError(names[1], f"and its image differ {difference}")
    if digest is not None and not any(in_hand) and pair_digest(volume, other) != digest:
        raise VolumeError(names[0], f"or {names[1]} has been replaced since it was checked: start again")
    return volume, other


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
        return f"has voxels of {sizes} mm, not within {low:g} to {high:g} mm: mend the spacing or unit in its header"
    return None


def volume_digest(volume: MetaTensor) -> str:
    """SHA-256 of a scan's voxels in RAS order.

    Recognises the scan under another name, compressed, oriented or typed otherwise, or in another file format. Of the
    affine only the orientation counts: headers round the rest, or differ in it. A scan that was resampled, rescaled
    or stored with a coarser slope is another one.

    Args:
        volume: ``(1, H, W, D)``.

    Returns:
        That of the voxels as float32, or as int64 where they are integers that float32 does not hold.
    """
    exact = not volume.is_floating_point() and int(volume.max()) > 2**24
    kind, zero = (np.int64, np.int64(0)) if exact else (np.float32, np.float32(0))
    to_ras = nib.io_orientation(np.asarray(volume.affine, dtype=float))
    voxels = nib.orientations.apply_orientation(volume[0].numpy(), to_ras)
    digest = hashlib.sha256(str(voxels.shape).encode())
    for plane in voxels:  # plane by plane, so that no second copy of the scan is made
        digest.update(np.ascontiguousarray(plane + zero, dtype=kind))  # -0 becomes 0
    return digest.hexdigest()


def pair_digest(image: MetaTensor, label: MetaTensor | None, image_digest: str | None = None) -> str:
    """SHA-256 of an image, what goes with it, and their affine.

    Args:
        image: ``(1, H, W, D)``.
        label: the same voxels, or None.
        image_digest: :func:`volume_digest` of ``image``, where it is known.
    """
    parts = [image_digest or volume_digest(image), volume_digest(label) if label is not None else ""]
    geometry = (np.round(np.asarray(image.affine, dtype=float), 3) + 0.0).tolist()  # -0 becomes 0
    return hashlib.sha256(f"{''.join(parts)}{geometry}".encode()).hexdigest()


def _load(path: str | os.PathLike, exact: bool) -> MetaTensor:
    if not Path(path).is_file():
        raise VolumeError(path, "is missing")
    read = _read_nrrd if str(path).lower().endswith(".nrrd") else _read_nibabel
    try:
        volume = read(path, exact)
    except VolumeError:
        raise
    except MemoryError as error:
        raise VolumeError(path, "is larger than the free memory: crop it, or use a computer with more") from error
    except Exception as error:  # nibabel, gzip, zlib and pynrrd each raise their own on damaged files
        raise VolumeError(path, f"cannot be read ({_short(error, path)})") from error
    if fault := volume_fault(volume):
        raise VolumeError(path, fault)
    volume.meta["filename_or_obj"] = str(path)
    return volume


def _read_nibabel(path: str | os.PathLike, exact: bool) -> MetaTensor:
    image = nib.load(path)
    if image.get_data_dtype().fields:
        raise VolumeError(path, "holds colours (RGB): convert it to one grey value per voxel")
    if np.issubdtype(image.get_data_dtype(), np.complexfloating):
        raise VolumeError(path, "holds complex numbers: save their magnitude")
    if not all(_header_zooms(image)):
        raise VolumeError(path, "has voxels of 0 mm: mend the spacing in its header")
    packed = str(path).lower().endswith("gz")
    _check_size(path, image.shape, image.get_data_dtype(), packed)
    if packed:
        with gzip.open(path) as stream:
            voxels = _voxels(type(image).from_stream(stream), exact)
            _read_to_checksum(path, stream)
    else:
        voxels = _voxels(image, exact)
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    nifti = isinstance(image.header, nib.Nifti1Header)
    meta = {NIFTI_SPACE: _nifti_space(image.header)} if nifti else {}
    affine = np.asarray(image.affine, dtype=float)
    if nifti:
        affine = affine_in_mm(affine, int(image.header["xyzt_units"]))
    return MetaTensor(torch.as_tensor(voxels)[None], affine=torch.as_tensor(affine), meta=meta)


def check_packing(path: str | os.PathLike) -> None:
    """Read a gzip file to its end, for readers that do not compare its checksums; other files are left alone.

    Raises:
        VolumeError: it is damaged.
    """
    if not str(path).lower().endswith("gz"):
        return
    try:
        with gzip.open(path) as stream:
            while stream.read(2**20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise VolumeError(path, f"cannot be read ({_short(error, path)})") from error


def affine_in_mm(affine: np.ndarray, xyzt_units: int) -> np.ndarray:
    """A NIfTI header's affine from its own unit of length to mm."""
    return np.diag([*[UNIT_MM.get(xyzt_units & _UNIT_BITS, 1.0)] * 3, 1.0]) @ affine


def _voxels(image: nib.spatialimages.SpatialImage, exact: bool) -> np.ndarray:
    if not exact:
        return image.get_fdata(dtype=np.float32, caching="unchanged")
    return _as_torch_type(np.asanyarray(image.dataobj))


def _as_torch_type(voxels: np.ndarray) -> np.ndarray:
    """The same numbers in a type that PyTorch computes with; the memory is the array's own, and not mapped."""
    if voxels.dtype.kind == "f":
        kind = np.float32 if voxels.dtype.itemsize <= 4 else np.float64
    elif voxels.dtype.kind == "u" and voxels.dtype.itemsize > 1:
        kind = np.int32 if voxels.dtype.itemsize == 2 else np.int64 if voxels.dtype.itemsize == 4 else np.float64
    else:
        kind = voxels.dtype.newbyteorder("=")
    return np.array(voxels, dtype=kind) if isinstance(voxels, np.memmap) else np.asarray(voxels, dtype=kind)


def _check_size(path: str | os.PathLike, shape: tuple[int, ...], kind: np.dtype, packed: bool) -> None:
    """Refuse what the memory does not hold, before it is read: a small compressed file may unpack to any size."""
    stored = math.prod(map(int, shape)) * kind.itemsize
    if packed and stored > _MOST_PACKING * os.path.getsize(path):
        raise VolumeError(path, f"cannot be read (it ended early: its header promises {stored} bytes)")
    needed, free = stored + 4 * math.prod(map(int, shape)), free_host_memory()
    if needed > _KEPT * free:
        size = " x ".join(map(str, shape))
        raise VolumeError(
            path,
            f"needs {needed / 2**30:.1f} GiB of memory for its {size} voxels, and {free / 2**30:.1f} GiB are free: "
            "crop it, or use a computer with more",
        )


def _read_to_checksum(path: str | os.PathLike, stream: BinaryIO) -> None:
    """Read what is behind the voxels: at the end, Python's gzip compares checksum and length of every member."""
    left = _SPARE_BYTES
    while chunk := stream.read(2**20):
        left -= len(chunk)
        if left < 0:
            raise VolumeError(path, "cannot be read (it holds far more bytes than its header says)")


def _header_zooms(image: nib.spatialimages.SpatialImage) -> list[float]:
    """Voxel sizes that the affine goes by, as they are in the file: nibabel takes 1 mm for 0."""
    if isinstance(image.header, nib.Nifti1Header) and image.header["sform_code"] == 0:
        with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
            header = type(image.header).from_fileobj(file, check=False)
        return header["pixdim"][1 : 1 + min(3, image.ndim)].tolist()
    return list(image.header.get_zooms()[:3])


def _read_nrrd(path: str | os.PathLike, exact: bool) -> MetaTensor:
    nrrd, installed = optional_import("nrrd")
    if not installed:
        raise VolumeError(path, "needs a reader that is not installed: pip install pynrrd")
    kind = np.float64 if exact else np.float32
    _check_size(path, tuple(nrrd.read_header(str(path))["sizes"]), np.dtype(kind), packed=False)
    loader = LoadImage(reader=NrrdReader(dtype=kind), dtype=kind, image_only=True, ensure_channel_first=True)
    loader.readers = loader.readers[-1:]  # no other reader is to guess at a damaged file
    volume = loader(path)
    return MetaTensor(volume.as_tensor(), affine=volume.affine)


def _nifti_space(header: nib.Nifti1Header) -> np.ndarray:
    return np.concatenate([np.atleast_1d(header[field]).astype(np.float64) for field in NIFTI_SPACE_FIELDS])


def _short(error: BaseException, path: str | os.PathLike) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (gzip.BadGzipFile, zlib.error)) and "not a gzip" not in str(error).lower():
        return f"damaged: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    lines = [line for line in lines if not line.startswith("- ")] or lines  # nibabel's afterthoughts
    reason = re.sub(r"^[\w.]+: ", "", lines[-1]) if lines else type(error).__name__
    return reason.replace(str(path), Path(path).name)[:120]
