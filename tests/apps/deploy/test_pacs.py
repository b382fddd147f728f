"""The round trip of docs/deploy.md: from a PACS, through the application, and back into it."""

import json
import subprocess
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai.deploy", reason="the MONAI Deploy App SDK is not installed: .ci/pacs-test runs these")

import highdicom
from pydicom import dcmread

from scripts.apps.deploy.app import RECORD
from tests.data.dicom_series import rotation

OBLIQUE = nib.affines.from_matvec(rotation(20, -35, 15) @ np.diag([0.9, 1.3, 2.2]), (-31.2, 47.8, 12.5))


def storescu(orthanc, *files):
    """As a scanner or an application sends; ``-R`` proposes what the files are, of which ``storescu`` knows few."""
    command = ["storescu", "-R", "-aet", "SCANNER", "-aec", orthanc.AET, "127.0.0.1", str(orthanc.dicom_port)]
    subprocess.run([*command, *map(str, files)], check=True, capture_output=True, text=True)


def test_there_and_back(tmp_path, model, make_scan, to_dicom, run_app, answer_of, on_voxels_of, orthanc):
    scan = make_scan(tmp_path / "scan.nii.gz", OBLIQUE)
    storescu(orthanc, *to_dicom(scan, tmp_path / "scanner").iterdir())
    received = tmp_path / "received"
    received.mkdir()
    for number, file in enumerate(orthanc.files(Modality="MR")):
        (received / f"{number}.dcm").write_bytes(file)
    output = run_app(received, model)
    (path,) = output.glob("*.dcm")
    storescu(orthanc, path)

    # in the PACS: the same study, linked to its series, and the voxels of inference.json
    (back,) = orthanc.files(Modality="SEG")
    (study,) = orthanc.find("Study", StudyInstanceUID="1.2.3")
    assert len(json.loads(orthanc.ask("GET", f"/studies/{study}"))["Series"]) == 2
    found = highdicom.seg.segread(BytesIO(back))
    assert found.SOPInstanceUID == dcmread(path).SOPInstanceUID
    answer = answer_of(scan, model)
    voxels = np.asarray(answer.dataobj)
    assert voxels.any() and np.array_equal(on_voxels_of(found, answer), voxels)
    record = json.loads((output / RECORD).read_text())
    assert record["series"]["SeriesInstanceUID"] == found.ReferencedSeriesSequence[0].SeriesInstanceUID

    # dciodvfy finds no error
    check = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True)
    assert not [line for line in (check.stdout + check.stderr).splitlines() if line.startswith("Error")]

    # dcmqi has each segment where it is, and its volume
    (tmp_path / "read").mkdir()
    command = ["segimage2itkimage", "--inputDICOM", str(path), "--outputDirectory", "read", "-t", "nifti"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for entry in record["segments"]:
        read = nib.load(tmp_path / "read" / f"{entry['segment']}.nii.gz")
        mask = np.asarray(read.dataobj) > 0
        assert mask.sum() == entry["voxels"]
        places = nib.affines.apply_affine(np.linalg.inv(answer.affine) @ read.affine, np.argwhere(mask))
        assert np.abs(places - places.round()).max() < 0.01
        assert (voxels[tuple(places.round().astype(int).T)] == entry["label"]).all()

    # dcm2niix puts the series where the application had it
    command = ["dcm2niix", "-f", "converted", "-o", str(tmp_path), str(received)]
    subprocess.run(command, check=True, capture_output=True)
    converted = nib.as_closest_canonical(nib.load(tmp_path / "converted.nii"))
    expected = nib.as_closest_canonical(nib.load(scan))
    assert np.allclose(converted.affine, expected.affine, atol=1e-3)
    assert np.array_equal(np.asarray(converted.dataobj), np.asarray(expected.dataobj))
