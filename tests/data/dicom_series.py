"""Small DICOM series on disk, at any place and angle."""

from __future__ import annotations

import numpy as np
import pytest


def rotation(*degrees):
    """Rotation about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def write_dicom(folder, voxels, spacing=(1.0, 1.0, 1.0), axes=None, origin=(0, 0, 0), description="T1", **options):
    """Write (columns, rows, slices) voxels as one file per slice, in no order of names.

    ``axes`` has the directions of columns, rows and slices in LPS as its columns, ``spacing`` is in the same order;
    Options: ``position`` may move a slice, (number, position) -> position; ``missing`` has numbers of slices to
    leave out; ``series`` is the series' UID; ``prefix`` begins the file names; ``colour`` makes RGB slices;
    ``change`` may change a slice's data set before it is written, (number, data set).
    """
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.eye(3) if axes is None else axes
    series = options.get("series", pydicom.uid.generate_uid())
    rng = np.random.default_rng(len(description))
    for name, number in enumerate(rng.permutation(voxels.shape[2])):
        if number in options.get("missing", ()):
            continue
        position = np.asarray(origin) + axes[:, 2] * spacing[2] * number
        position = options.get("position", lambda _, p: p)(number, position)
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data = pydicom.dataset.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.StudyInstanceUID = series, "1.2.3"
        data.Modality, data.SeriesDescription, data.InstanceNumber = "MR", description, int(number) + 1
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.PixelSpacing = [f"{spacing[1]:.8g}", f"{spacing[0]:.8g}"]  # between rows first
        data.SliceThickness = f"{spacing[2]:.8g}"
        data.ImageOrientationPatient = [f"{v:.10f}" for v in (*axes[:, 0], *axes[:, 1])]
        data.ImagePositionPatient = [f"{v:.8f}" for v in position]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        if options.get("colour"):
            data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
            data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
            data.PixelData = bytes(3 * voxels.shape[0] * voxels.shape[1])
            save_dicom(data, folder / f"IM{name:04d}")
            continue
        data.PixelData = voxels[:, :, number].T.astype("<i2").tobytes()
        options.get("change", lambda _, d: None)(number, data)
        save_dicom(data, folder / f"{options.get('prefix', 'IM')}{name:04d}")


def save_dicom(data, path):
    """Write a whole file, with pydicom 3 or with pydicom 2, which MONAI Label needs."""
    if int(pytest.importorskip("pydicom").__version__.split(".")[0]) > 2:
        data.save_as(path, enforce_file_format=True)
    else:
        data.is_little_endian, data.is_implicit_VR = True, data.file_meta.TransferSyntaxUID.is_implicit_VR
        data.save_as(path, write_like_original=False)
