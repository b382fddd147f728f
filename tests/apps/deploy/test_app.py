"""The application on real DICOM, through the SDK: what it writes lies on the series and is the bundle's own answer."""

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai.deploy", reason="the MONAI Deploy App SDK is not installed: make deploy-test has it")

from tests.data.dicom_series import rotation

OBLIQUE = nib.affines.from_matvec(rotation(20, -35, 15) @ np.diag([0.9, 1.3, 2.2]), (-31.2, 47.8, 12.5))
MIRRORED = OBLIQUE @ np.diag([1.0, 1.0, -1.0, 1.0])
GEOMETRIES = {"axial": np.diag([1.0, 1.0, 1.5, 1.0]), "oblique, anisotropic": OBLIQUE, "mirrored slices": MIRRORED}


@pytest.mark.parametrize("affine", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_segmentation_is_the_answer_of_inference_json(
    tmp_path, model, make_scan, to_dicom, run_app, answer_of, read_segmentation, on_voxels_of, affine
):
    scan = make_scan(tmp_path / "scan.nii.gz", affine)
    output = run_app(to_dicom(scan, tmp_path / "dicom"), model)
    answer = answer_of(scan, model)
    voxels = np.asarray(answer.dataobj)
    assert {1, 2} <= set(np.unique(voxels)) and (voxels > 0).mean() < 0.9
    assert np.array_equal(on_voxels_of(read_segmentation(output), answer), voxels)
