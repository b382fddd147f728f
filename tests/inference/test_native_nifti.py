"""Predictions as NIfTI files."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.volumes import load_volume
from scripts.inference.native_nifti import SavePredictiond
from scripts.runtime.output_folder import STATE


def save(prediction, folder):
    SavePredictiond("pred", str(folder))({"pred": prediction})


@pytest.mark.parametrize("name", ["case 1.nii.gz", "case.1.nii.gz"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 1), (1, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32])
def test_voxels_affine_and_type_are_kept(tmp_path, name, shape, dtype):
    voxels = torch.arange(np.prod(shape)).reshape(1, *shape).to(dtype)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    prediction = MetaTensor(voxels, affine=torch.as_tensor(affine), meta={"filename_or_obj": f"/elsewhere/{name}"})
    save(prediction, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != STATE] == [name], "and nothing is left over"
    assert (tmp_path / name).read_bytes()[:2] == b"\x1f\x8b"
    read = nib.load(tmp_path / name)
    assert read.shape == shape and read.get_data_dtype() == voxels.numpy().dtype
    assert np.array_equal(np.asanyarray(read.dataobj), voxels[0]) and np.array_equal(read.affine, affine)
    assert read.header["qform_code"] == read.header["sform_code"] == 1 and read.header.get_xyzt_units()[0] == "mm"


def test_the_scans_header_is_taken_over(tmp_path):
    source = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), None)
    source.set_sform(np.diag([2.0, 2.0, 3.0, 1.0]), 4)
    source.set_qform(np.diag([-1.0, 1.0, 1.0, 1.0]), 2)
    nib.save(source, tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    (tmp_path / "out").mkdir()
    save(MetaTensor(volume.as_tensor().to(torch.uint8), affine=volume.affine, meta=volume.meta), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.nii.gz")
    read, source = nib.load(path), nib.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(read.get_sform(), source.get_sform()) and np.array_equal(read.get_qform(), source.get_qform())
    assert (int(read.header["sform_code"]), int(read.header["qform_code"])) == (4, 2)
