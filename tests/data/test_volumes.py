"""Reading image files: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.volumes import VolumeError, load_volume, volume_digest

VOXELS = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)


def with_sform(sform, voxels=VOXELS, qform=None):
    image = nib.Nifti1Image(voxels, None)
    image.header.set_sform(sform, code=1)
    if qform is not None:
        image.header.set_qform(qform, code=1)
    return image


def rgb():
    colours = np.zeros(VOXELS.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nib.Nifti1Image(colours, np.eye(4))


def plain(voxels):
    return nib.Nifti1Image(voxels, np.eye(4))


FAULTS = {
    "colours": (rgb(), r"holds colours \(RGB\): convert it"),
    "complex": (plain(VOXELS.astype(np.complex64)), "holds complex numbers: save their magnitude"),
    "4D": (plain(np.zeros((6, 5, 4, 3), np.int16)), r"must be one 3D volume, got shape \(6, 5, 4, 3\): save each"),
    "5D": (
        plain(np.zeros((6, 5, 4, 1, 3), np.int16)),
        r"must be one 3D volume, got shape \(6, 5, 4, 1, 3\): save each",
    ),
    "2D": (plain(VOXELS[..., 0]), r"must be one 3D volume, got shape \(6, 5\): save .* slices as one stack"),
    "no voxels": (plain(VOXELS[:0]), r"must be one 3D volume, got shape \(0"),
    "one voxel": (plain(VOXELS[:1, :1, :1]), r"got \(1, 1, 1\) voxels, a point or a line: is it the right file\?"),
    "line": (plain(VOXELS[:1, :1]), r"got \(1, 1, 4\) voxels, a point or a line"),
    "zero spacing": (with_sform(np.diag([1.0, 0.0, 1.0, 1.0])), "has a singular affine .*: set its sform or qform"),
    "parallel axes": (
        with_sform(np.array([[1.0, 2.0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
        "has a singular affine",
    ),
    "metres": (
        with_sform(np.diag([1e-3, 1e-3, 1e-3, 1.0])),
        r"voxels of 0\.001 x 0\.001 x 0\.001 mm, not within .*: mend",
    ),
    "micrometres": (with_sform(np.diag([900.0, 900.0, 900.0, 1.0])), "has voxels of 900 x 900 x 900 mm"),
    "NaN affine": (with_sform(np.diag([np.nan, 1.0, 1.0, 1.0])), "NaN or infinite values in its affine: set"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_faulty_files_are_named(tmp_path, fault, ending):
    image, message = FAULTS[fault]
    path = tmp_path / f"Müller 7{ending}"
    nib.save(image, path)
    with pytest.raises(VolumeError, match=message) as caught:
        load_volume(path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.nrrd"])
@pytest.mark.parametrize("damage", ["empty", "text", "header only", "half", "missing", "folder"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    voxels = np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)  # does not compress to nothing
    if name.endswith("nrrd"):
        pytest.importorskip("nrrd").write(str(path), voxels)
    else:
        nib.save((nib.MGHImage if name.endswith("mgz") else nib.Nifti1Image)(voxels, np.eye(4)), path)
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        parts = {"empty": b"", "text": b"no image\n" * 99, "header only": content[:340], "half": content[:4000]}
        path.write_bytes(parts[damage])
    with pytest.raises(
        VolumeError, match="is missing" if damage in ("missing", "folder") else "cannot be read"
    ) as caught:
        load_volume(path)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


def test_the_affine_is_nibabels(tmp_path):
    # MONAI's reader prefers a qform that fits the header's voxel sizes to an sform that does not
    sform, qform = np.diag([2.0, 2.0, 2.5, 1.0]), np.diag([1.0, 1.0, 1.0, 1.0])
    nib.save(with_sform(sform, qform=qform), tmp_path / "a.nii.gz")
    assert np.array_equal(load_volume(tmp_path / "a.nii.gz").affine, sform)


def test_trailing_axes_of_one_are_dropped(tmp_path):
    nib.save(plain(VOXELS[..., None, None]), tmp_path / "a.nii")
    read = load_volume(tmp_path / "a.nii")
    assert read.shape == (1, 6, 5, 4) and np.array_equal(read[0], VOXELS)


def test_slopes_are_applied(tmp_path):
    image = plain(VOXELS)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii.gz")
    assert np.array_equal(load_volume(tmp_path / "a.nii.gz")[0], VOXELS * np.float32(0.5) - 3)


def test_what_is_read_may_be_written_to(tmp_path):
    nib.save(plain(VOXELS.astype(np.float32)), tmp_path / "a.nii")  # mapped into memory
    before = (tmp_path / "a.nii").read_bytes()
    load_volume(tmp_path / "a.nii").mul_(2)
    assert (tmp_path / "a.nii").read_bytes() == before


def test_digests_go_by_content_not_by_memory_layout():
    voxels = torch.rand(1, 4, 5, 6)
    fortran = voxels.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert volume_digest(MetaTensor(voxels)) == volume_digest(MetaTensor(fortran))
    assert volume_digest(MetaTensor(voxels)) != volume_digest(MetaTensor(voxels + 1))
    assert volume_digest(MetaTensor(voxels)) == volume_digest(
        MetaTensor(voxels, affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    )
    assert volume_digest(MetaTensor(voxels)) != volume_digest(MetaTensor(voxels.reshape(1, 5, 4, 6)))
