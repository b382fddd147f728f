"""DICOM series: geometry to the hundredth of a millimetre, and series that are no volume."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from scripts.data.conversion import dicom
from scripts.data.conversion.dicom import pair_dicom, write_series
from scripts.data.nnunet import DatasetError
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


def test_two_volumes_in_one_series(tmp_path):
    write_dicom(tmp_path / "d", volume(), position=lambda i, p: p * [1, 1, 0] + [0, 0, i // 2])
    refused(tmp_path / "d", tmp_path, "several slices at one position")


def test_single_slice(tmp_path):
    write_dicom(tmp_path / "d", volume((8, 8, 1)))
    refused(tmp_path / "d", tmp_path, "single slice or a multi-frame file")


def test_slices_of_several_orientations(tmp_path):
    """Three-plane scouts are often one series."""
    for axes in (np.eye(3), rotation(90, 0, 0)):
        write_dicom(tmp_path / "d", volume((8, 8, 3)), axes=axes, prefix=f"{axes[1, 1]:.0f}", series="1.2.34")
    refused(tmp_path / "d", tmp_path, "slices of several orientations")


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


# --- folders


def test_folders_are_cases_and_masks_go_by_name(tmp_path, write_nifti):
    for name in ("s1/T1", "s2/T1"):
        write_dicom(tmp_path / "raw" / name, volume())
        write_nifti(tmp_path / "raw" / "masks" / f"{name.replace('/', '_')}.nii.gz", np.zeros((2, 2, 2), np.uint8))
    (tmp_path / "raw" / "s1" / "readme.txt").write_text("no image")
    found = pair_dicom(tmp_path / "raw", None, "masks/*.nii.gz").cases
    assert [(c.case, c.mask.name, c.problems) for c in found] == [
        ("s1_T1", "s1_T1.nii.gz", ()),
        ("s2_T1", "s2_T1.nii.gz", ()),
    ]
    assert len(found[0].images[0].files) == 6 and found[0].images[0].description == "T1"


def test_the_folder_itself(tmp_path):
    write_dicom(tmp_path / "patient", volume())
    assert [case.case for case in pair_dicom(tmp_path / "patient", None, None).cases] == ["patient"]


def test_channels_by_folder(tmp_path):
    for name in ("s1/T1", "s1/T2", "s2/T1"):
        write_dicom(tmp_path / "raw" / name, volume(), description=name[3:])
    found = pair_dicom(tmp_path / "raw", ["*/T2", "*/T1"], None)
    assert [i.description for i in found.cases[0].images] == ["T2", "T1"] and found.channel_names == ("T2", "T1")
    assert "no image of channel 0000 (*/T2) for s2/T1" in found.cases[1].problems[0]


def test_several_series_are_listed_and_chosen_by_description(tmp_path):
    for folder in ("s1", "s2"):
        write_dicom(tmp_path / "raw" / folder, volume(), description="Sag T1 MPRAGE")
        write_dicom(tmp_path / "raw" / folder, volume(), description="Ax FLAIR", prefix="F")
    for case in pair_dicom(tmp_path / "raw", None, None).cases:
        assert "'Sag T1 MPRAGE', 6 files" in case.problems[0] and "'Ax FLAIR', 6 files" in case.problems[0]
        assert "--series" in case.problems[0]
    chosen = pair_dicom(tmp_path / "raw", None, None, series="flair").cases
    assert [(c.case, c.images[0].description, c.problems) for c in chosen] == [
        ("s1", "Ax FLAIR", ()),
        ("s2", "Ax FLAIR", ()),
    ]
    assert all("Ax FLAIR" in c.problems[0] for c in pair_dicom(tmp_path / "raw", None, None, series="T2").cases)


def test_folders_of_another_series_are_left_out_aloud(tmp_path, caplog):
    write_dicom(tmp_path / "raw" / "1", volume(), description="T1")
    write_dicom(tmp_path / "raw" / "2", volume(), description="scout")
    assert [c.case for c in pair_dicom(tmp_path / "raw", None, None, series="T1").cases] == ["1"]
    assert "1 folders without a series named like 'T1'" in caplog.text
    with pytest.raises(FileNotFoundError, match="--series 'T9'; there are .*'T1'"):
        pair_dicom(tmp_path / "raw", None, None, series="T9")


def test_nothing_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no DICOM series"):
        pair_dicom(tmp_path, None, None)
    write_dicom(tmp_path / "s1", volume())
    with pytest.raises(FileNotFoundError, match=r"--mask_pattern '\*.nii.gz'"):
        pair_dicom(tmp_path, None, "*.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"--image_pattern '\*/T9'"):
        pair_dicom(tmp_path, ["*/T9"], None)


def test_without_simpleitk(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "optional_import", lambda name: (None, False))
    with pytest.raises(DatasetError, match="pip install SimpleITK"):
        pair_dicom(tmp_path, None, None)
