"""DICOM series: geometry to the hundredth of a millimetre, and series that are no volume."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest

from scripts.data.conversion.dicom import pair_dicom, write_series
from scripts.data.volumes import VolumeError
from tests.data.dicom_series import rotation, write_dicom

pytest.importorskip("SimpleITK")


def volume(size=(8, 10, 6), seed=0):
    return np.random.default_rng(seed).integers(-50, 1000, size).astype(np.int16)


def convert(folder, tmp_path):
    (case,) = pair_dicom(folder, None, None).cases
    assert not case.problems
    write_series(case.images[0], tmp_path / "out.nii.gz")
    return nib.load(tmp_path / "out.nii.gz")


# --- geometry


@pytest.mark.parametrize("axes", [np.eye(3), rotation(20, -35, 15), rotation(90, 0, 0), rotation(0, 90, 10)])
def test_a_marked_voxel_stays_in_its_place_in_the_world(tmp_path, axes):
    spacing, origin, marked = np.array([0.9, 1.1, 2.3]), np.array([-31.2, 47.8, 12.5]), np.array([5, 2, 4])
    voxels = volume()
    voxels[tuple(marked)] = 5000
    write_dicom(tmp_path / "dicom", voxels, spacing, axes, origin)
    image = convert(tmp_path / "dicom", tmp_path)
    found = np.argwhere(np.asarray(image.dataobj) == 5000)
    assert len(found) == 1
    left_posterior = origin + axes @ (marked * spacing)
    world = left_posterior * [-1, -1, 1]
    assert np.abs(nib.affines.apply_affine(image.affine, found[0]) - world).max() < 0.01


def test_all_voxels_and_their_type_are_kept(tmp_path):
    voxels, spacing, axes = volume(), np.array([0.7, 0.8, 3.0]), rotation(5, 10, -20)
    write_dicom(tmp_path / "dicom", voxels, spacing, axes)
    image = convert(tmp_path / "dicom", tmp_path)
    assert image.get_data_dtype() == np.int16 and sorted(image.shape) == [6, 8, 10]
    stored = np.asarray(image.dataobj)
    places = np.argwhere(np.ones(voxels.shape, bool))
    world = (axes @ (places * spacing).T).T * [-1, -1, 1]
    indices = nib.affines.apply_affine(np.linalg.inv(image.affine), world)
    assert np.abs(indices - np.round(indices)).max() < 0.01
    assert np.array_equal(stored[tuple(np.round(indices).astype(int).T)], voxels[tuple(places.T)])


def test_every_slice_is_rescaled_by_its_own_slope(tmp_path):
    """The first slice alone would be whole numbers."""
    slopes, voxels = np.array([1, 1.25, 0.5, 40, 1.75, 2.5]), volume()

    def rescale(number, data):
        data.RescaleIntercept, data.RescaleSlope = "0", f"{slopes[number]:g}"

    write_dicom(tmp_path / "d", voxels, change=rescale)
    stored = np.asarray(convert(tmp_path / "d", tmp_path).dataobj)
    assert np.array_equal(np.sort(stored, axis=None), np.sort(voxels * slopes, axis=None).astype(np.float32))


# --- series that are no volume


def refused(folder, tmp_path, message):
    with pytest.raises(VolumeError, match=message):
        convert(folder, tmp_path)
    assert not (tmp_path / "out.nii.gz").exists()


def test_missing_slice(tmp_path):
    write_dicom(tmp_path / "d", volume(), missing=(3,))
    refused(tmp_path / "d", tmp_path, r"'T1'.*lacks slices.*from 1.000 to 2.000 mm")


def test_rounded_positions_are_no_fault(tmp_path):
    axes, spacing = rotation(20, -35, 15), np.array([1, 1, 0.937])
    write_dicom(tmp_path / "d", volume((6, 6, 40)), spacing, axes, position=lambda i, p: np.round(p, 1))
    affine = convert(tmp_path / "d", tmp_path).affine
    last = axes @ [0, 0, 39 * 0.937] * [-1, -1, 1]
    assert np.abs(nib.affines.apply_affine(affine, [0, 0, 39]) - last).max() < 0.1


def test_uneven_spacing(tmp_path):
    write_dicom(tmp_path / "d", volume(), position=lambda i, p: p + [0, 0, 0.4 * (i > 2)])
    refused(tmp_path / "d", tmp_path, "unevenly spaced")


def test_gantry_tilt(tmp_path):
    write_dicom(tmp_path / "d", volume(), position=lambda i, p: p + [0, 0.3 * i, 0])
    refused(tmp_path / "d", tmp_path, "gantry tilt")


@pytest.mark.parametrize(
    "name, values", [("EchoTime", (4.9, 9.8)), ("TemporalPositionIdentifier", (1, 2, 3)), (None, (0, 0))]
)
def test_several_volumes_in_one_series(tmp_path, name, values):
    """Their files come mixed, and not in the order of the slices."""
    for number, value in enumerate(values):
        change = (lambda _, data, value=value: setattr(data, name, value)) if name else (lambda _, data: None)
        write_dicom(tmp_path / "d", volume(seed=number), prefix=f"{number}", series="1.2.34", change=change)
    what = {"EchoTime": ", which differ in echo time", "TemporalPositionIdentifier": ", which differ in time point"}
    refused(tmp_path / "d", tmp_path, f"at one position: {len(values)} volumes of 6{what.get(name, '')}$")


def test_several_volumes_of_which_one_is_not_complete(tmp_path):
    write_dicom(tmp_path / "d", volume(), series="1.2.34")
    write_dicom(tmp_path / "d", volume(), series="1.2.34", prefix="E", missing=(2, 3))
    refused(tmp_path / "d", tmp_path, r"several slices at one position \(1 to 2 at each of 6\)")


def test_an_instance_that_is_there_twice_counts_once(tmp_path):
    voxels = volume()
    write_dicom(tmp_path / "d", voxels)
    shutil.copy(tmp_path / "d" / "IM0002", tmp_path / "d" / "copy")
    stored = np.asarray(convert(tmp_path / "d", tmp_path).dataobj)
    assert np.array_equal(np.sort(stored, axis=None), np.sort(voxels, axis=None))


def test_single_slice(tmp_path):
    write_dicom(tmp_path / "d", volume((8, 8, 1)))
    refused(tmp_path / "d", tmp_path, "is a single slice$")


@pytest.mark.parametrize("files", [1, 3])
def test_mosaics_and_enhanced_files_are_called_so(tmp_path, files):
    """Every file holds a volume: they lie at one position, or say nothing of it."""

    def mosaic(number, data):
        data.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]

    write_dicom(tmp_path / "m", volume((8, 8, files)), change=mosaic, position=lambda i, p: [0, 0, 0])
    refused(tmp_path / "m", tmp_path, "is made of mosaics.*dcm2niix")

    def enhanced(number, data):
        data.NumberOfFrames, data.PixelData = 2, 2 * data.PixelData
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
        del data.ImagePositionPatient, data.ImageOrientationPatient

    write_dicom(tmp_path / "e", volume((8, 8, files)), change=enhanced)
    refused(tmp_path / "e", tmp_path, "is enhanced DICOM, with many frames in a file.*dcm2niix")


@pytest.mark.parametrize("sizes", [(8, 8), (8, 6)])
def test_slices_of_several_orientations(tmp_path, sizes):
    """Three-plane scouts are often one series, and their planes may differ in size."""
    for axes, size in zip((np.eye(3), rotation(90, 0, 0)), sizes, strict=True):
        write_dicom(tmp_path / "d", volume((8, size, 3)), axes=axes, prefix=f"{axes[1, 1]:.0f}", series="1.2.34")
    refused(tmp_path / "d", tmp_path, "slices of several orientations, as a localizer has")


def test_slices_of_several_sizes(tmp_path):
    for z, size in enumerate((8, 6)):
        write_dicom(tmp_path / "d", volume((8, size, 2)), origin=(0, 0, 2 * z), prefix=f"{z}", series="1.2.34")
    refused(tmp_path / "d", tmp_path, "slices of several sizes")


def test_directions_that_scanners_round_are_one(tmp_path):
    rng, axes = np.random.default_rng(0), rotation(-14, 2, 1)

    def noise(number, data):
        data.ImageOrientationPatient = [f"{float(v) + rng.normal(0, 3e-7):.9f}" for v in data.ImageOrientationPatient]

    write_dicom(tmp_path / "d", volume(), (1, 1, 3), axes, change=noise)
    affine = convert(tmp_path / "d", tmp_path).affine
    assert np.abs(nib.affines.apply_affine(affine, [0, 0, 5]) - axes @ [0, 0, 15] * [-1, -1, 1]).max() < 0.001


def test_colour_images(tmp_path):
    write_dicom(tmp_path / "d", volume(), colour=True)
    refused(tmp_path / "d", tmp_path, "is a colour image")


def test_damaged_slice(tmp_path):
    write_dicom(tmp_path / "d", volume())
    (case,) = pair_dicom(tmp_path / "d", None, None).cases
    path = tmp_path / "d" / "IM0003"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(VolumeError, match="cannot be read"):
        write_series(case.images[0], tmp_path / "out.nii.gz")
