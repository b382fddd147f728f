"""The application on real DICOM, through the SDK: what it writes lies on the series and is the bundle's own answer."""

import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai.deploy", reason="the MONAI Deploy App SDK is not installed: make deploy-test has it")

from pydicom import dcmread

from scripts.apps.deploy.app import RECORD, RESEARCH_USE
from scripts.apps.deploy.icl_operator import segment_numbers
from scripts.apps.deploy.model_folder import context_set_sha256, make_predictor
from scripts.apps.deploy.stage import stage
from scripts.runtime.output_folder import file_sha256
from tests.data.dicom_series import rotation

OBLIQUE = nib.affines.from_matvec(rotation(20, -35, 15) @ np.diag([0.9, 1.3, 2.2]), (-31.2, 47.8, 12.5))
GEOMETRIES = {
    "axial": np.diag([1.0, 1.0, 1.5, 1.0]),
    "sagittal": nib.affines.from_matvec(rotation(90, 0, 90) @ np.diag([1.1, 0.8, 1.6]), (5, -20, 60)),
    "oblique, anisotropic": OBLIQUE,
    "mirrored slices": OBLIQUE @ np.diag([1.0, 1.0, -1.0, 1.0]),
}


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


def test_a_hippocampus(tmp_path, shared_dir, weights, to_dicom, run_app, answer_of, read_segmentation, on_voxels_of):
    """Real MRI: three cases as contexts, chosen from five when the package is made, and a sixth as the target."""
    data = shared_dir / "data" / "Dataset004_Hippocampus"
    images = sorted((data / "imagesTr").iterdir())[:6]
    few = tmp_path / "few"
    for source in (*images[:5], *(data / "labelsTr" / i.name.replace("_0000", "") for i in images[:5])):
        (few / source.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, few / source.parent.name)
    shutil.copy(data / "dataset.json", few)
    stage(str(weights), str(few), str(tmp_path / "staged"), context_size=3)
    scan = nib.load(images[5])
    whole = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj).round().astype(np.int16), scan.affine), whole)
    output = run_app(to_dicom(whole, tmp_path / "dicom"), tmp_path / "staged" / "models")
    packaged = tmp_path / "staged" / "models" / "neuroverse3d"
    answer = answer_of(whole, packaged)
    voxels = np.asarray(answer.dataobj)
    assert voxels.any() and np.array_equal(on_voxels_of(read_segmentation(output), answer), voxels)
    record = json.loads((output / RECORD).read_text())
    assert record["alignment"]["mode"] == "deformable" and record["alignment"]["contexts"]
    # and what inference.json answers from the folder that the contexts were chosen from
    shutil.copytree(few, tmp_path / "from_all" / "contexts")
    shutil.copy(weights, tmp_path / "from_all" / "model.pt")
    shutil.rmtree(tmp_path / "inference")
    assert np.array_equal(np.asarray(answer_of(whole, tmp_path / "from_all", context_size=3).dataobj), voxels)


def test_what_the_segmentation_says_of_itself(tmp_path, model, make_scan, to_dicom, run_app, read_segmentation):
    dicom = to_dicom(make_scan(tmp_path / "scan.nii.gz", OBLIQUE), tmp_path / "dicom")
    found = read_segmentation(run_app(dicom, model))
    sources = [dcmread(path, stop_before_pixels=True) for path in dicom.iterdir()]
    (series,) = found.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == sources[0].SeriesInstanceUID
    referenced = {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence}
    assert referenced == {source.SOPInstanceUID for source in sources}
    assert "RESEARCH" in found.SeriesDescription and found.ContentLabel == "RESEARCH"
    assert RESEARCH_USE.startswith(found.ContentDescription) and "not a medical device" in RESEARCH_USE.lower()
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber"):
        assert found[name] == sources[0][name]
    assert found.Modality == "SEG" and found.SeriesInstanceUID != series.SeriesInstanceUID
    first, second = (found.get_segment_description(number) for number in (1, 2))
    assert [first.SegmentLabel, second.SegmentLabel] == ["first", "Second ball"]
    kind = first.segmented_property_type
    assert (kind.value, kind.scheme_designator, kind.meaning) == ("1", "99NEUROVERSE3D", "first")
    kind = second.segmented_property_type
    assert (kind.value, kind.scheme_designator, kind.meaning) == ("12738006", "SCT", "Brain")
    assert second.segmented_property_category.meaning == "Anatomical Structure"
    assert {first.algorithm_type.value, second.algorithm_type.value} == {"AUTOMATIC"}
    assert first.SegmentAlgorithmName == "Neuroverse3D"


def test_the_record_of_the_run(tmp_path, model, make_scan, to_dicom, run_app, read_segmentation):
    dicom = to_dicom(make_scan(tmp_path / "scan.nii.gz"), tmp_path / "dicom")
    output = run_app(dicom, model)
    record = json.loads((output / RECORD).read_text())
    assert record["weights_sha256"] == file_sha256(model / "model.pt")
    context = make_predictor(model / "model.pt", model / "contexts", {"align": "off"}).context
    assert record["context_set_sha256"] == context_set_sha256(context) and record["contexts"] == context.names
    versions = record["environment"]["packages"]
    assert {"torch", "monai", "monai-deploy-app-sdk", "holoscan-cu13", "pydicom", "highdicom"} <= versions.keys()
    assert record["use"] == RESEARCH_USE and record["bundle"]["name"] == "Neuroverse3D"
    source = dcmread(next(dicom.iterdir()))
    assert record["series"]["SeriesInstanceUID"] == source.SeriesInstanceUID and record["series"]["slices"] == 12
    (path,) = output.glob("*.dcm")
    assert record["output"] == [{"file": path.name, "sha256": file_sha256(path)}]
    assert {p.name for p in output.iterdir()} == {path.name, RECORD}
    volume = read_segmentation(output).get_volume(combine_segments=True)
    for entry in record["segments"]:
        assert entry["voxels"] == (volume.array == entry["segment"]).sum() > 0
        assert entry["volume_mm3"] == pytest.approx(entry["voxels"] * 1.0) and len(entry["contexts"]) == 3
    assert record["alignment"] is None and record["confidence"]["agreement"].keys() == {"1", "2"}
    text = json.dumps(record)
    assert "Doe" not in text and "P1" not in text


def test_a_series_unlike_every_context_is_marked(
    tmp_path, make_model, write_nifti, to_dicom, run_app, read_segmentation, answer_of
):
    """As ``inference.json`` flags it: in the record, and for whoever sees the segmentation alone."""
    model = make_model(tmp_path / "models", contexts=4)
    ramp = np.add.outer(np.arange(20), np.zeros((20, 20))).astype(np.int16)  # nothing of the contexts' layout
    dicom = to_dicom(write_nifti(tmp_path / "scan.nii.gz", ramp), tmp_path / "dicom")
    output = run_app(dicom, model)
    record = json.loads((output / RECORD).read_text())
    answer_of(tmp_path / "scan.nii.gz", model)
    (report,) = json.loads((tmp_path / "inference" / "report.json").read_text())["cases"].values()
    said = record["confidence"]
    assert any("unlike every context" in flag for flag in said["flags"])
    assert said == {name: report[name] for name in said}
    assert set(report["warnings"]) <= set(record["warnings"])
    description = read_segmentation(output).SeriesDescription
    assert "UNLIKE EVERY EXAMPLE" in description and "RESEARCH ONLY" in description and len(description) <= 64

    for choice, files in (("false", {RECORD}), (False, {RECORD})):
        (model / "options.json").write_text(json.dumps({"align": "off", "write_flagged": choice}))
        output = run_app(dicom, model, tmp_path / f"none {choice!r}")
        assert {path.name for path in output.iterdir()} == files
        record = json.loads((output / RECORD).read_text())
        assert record["output"] == [] and record["confidence"] == said
    known = np.asarray(nib.load(model / "contexts" / "imagesTr" / "case_01_0000.nii.gz").dataobj)
    usual = write_nifti(tmp_path / "usual.nii.gz", 2 * known)
    usual = to_dicom(usual, tmp_path / "usual")
    assert "UNLIKE" not in read_segmentation(run_app(usual, model, tmp_path / "usual_out")).SeriesDescription
    (model / "options.json").write_text(json.dumps({"write_flagged": "perhaps"}))
    with pytest.raises(ValueError, match="options.json: write_flagged: expected true or false, got 'perhaps'"):
        run_app(dicom, model, tmp_path / "refused")


def test_other_contexts_give_another_device(tmp_path, make_model, make_scan, to_dicom, run_app, read_segmentation):
    """What made a segmentation is told apart by weights and contexts, in the DICOM file too."""
    dicom = to_dicom(make_scan(tmp_path / "scan.nii.gz"), tmp_path / "dicom")
    uids = []
    for number, size in enumerate((3, 2, 3)):
        model = make_model(tmp_path / f"model{number}", options={"context_size": size})
        found = read_segmentation(run_app(dicom, model, tmp_path / f"out{number}"))
        uids.append(found.ContributingEquipmentSequence[0].DeviceUID)
    assert uids[0] == uids[2] != uids[1]


def test_more_than_255_labels_keep_their_numbers(
    tmp_path, make_model, make_scan, to_dicom, run_app, answer_of, read_segmentation, on_voxels_of
):
    labels = 1000 + 3 * np.arange(260)
    blocks = np.kron(np.arange(512).reshape(8, 8, 8), np.ones((2, 2, 2), int))
    many = np.where(blocks < 260, 1000 + 3 * blocks, 0).astype(np.int16)
    model = make_model(tmp_path / "models", contexts=1)
    (model / "contexts" / "dataset.json").unlink()
    for path in (model / "contexts" / "labelsTr").iterdir():
        nib.save(nib.Nifti1Image(many, np.eye(4)), path)
    scan = make_scan(tmp_path / "scan.nii.gz", size=(14, 14, 8))
    output = run_app(to_dicom(scan, tmp_path / "dicom"), model)
    found = read_segmentation(output)
    assert found.number_of_segments == 260
    assert [found.get_segment_description(n).SegmentLabel for n in (1, 256, 260)] == [
        f"label {labels[n - 1]}" for n in (1, 256, 260)
    ]
    answer = answer_of(scan, model)
    voxels = np.asarray(answer.dataobj)
    assert voxels.max() > labels[255]  # of a segment whose number does not fit into a byte
    numbers = on_voxels_of(found, answer)
    assert np.array_equal(np.concatenate([[0], labels])[numbers], voxels)


@pytest.mark.parametrize("labels, kind", [([2, 9], np.uint8), (range(1, 301), np.uint16)])
def test_segment_numbers(labels, kind):
    answer = np.array([[0, labels[0]], [labels[-1], 0]], np.int16)
    numbers = segment_numbers(answer, labels)
    assert numbers.dtype == kind and numbers.tolist() == [[0, 1], [len(labels), 0]]


def test_nothing_found_is_an_empty_segmentation(tmp_path, make_model, make_scan, to_dicom, run_app, read_segmentation):
    model = make_model(tmp_path / "models")
    state = torch.load(model / "model.pt", weights_only=True)
    state["target_decoder.output.bias"] -= 1000
    torch.save(state, model / "model.pt")
    output = run_app(to_dicom(make_scan(tmp_path / "scan.nii.gz"), tmp_path / "dicom"), model)
    found = read_segmentation(output)
    assert not found.pixel_array.any() and found.number_of_segments == 2
    assert [s["voxels"] for s in json.loads((output / RECORD).read_text())["segments"]] == [0, 0]


def test_the_staged_application_runs_from_anywhere(tmp_path, weights, model, make_scan, to_dicom, run_app):
    """As in a package: folders from environment variables, nothing but the staged files."""
    stage(
        str(weights),
        str(model / "contexts"),
        str(tmp_path / "staged"),
        segments=str(model / "segments.json"),
        align="off",
    )
    dicom = to_dicom(make_scan(tmp_path / "scan.nii.gz", OBLIQUE), tmp_path / "dicom")
    variables = {"INPUT": dicom, "OUTPUT": tmp_path / "staged_out", "MODEL": tmp_path / "staged" / "models"}
    environment = {f"HOLOSCAN_{name}_PATH": str(path) for name, path in variables.items()}
    path = os.environ["PATH"]
    command = [sys.executable, "-P", str(tmp_path / "staged" / "app")]
    run = subprocess.run(
        command, env={"PATH": path, "OMP_NUM_THREADS": "1", **environment}, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert RESEARCH_USE in run.stderr
    here, there = run_app(dicom, model), tmp_path / "staged_out"
    arrays = [dcmread(next(folder.glob("*.dcm"))).PixelData for folder in (here, there)]
    assert arrays[0] == arrays[1]
    records = [json.loads((folder / RECORD).read_text()) for folder in (here, there)]
    assert records[0]["context_set_sha256"] == records[1]["context_set_sha256"]
    assert records[0]["bundle"] == records[1]["bundle"]
    shutil.rmtree(dicom)
    dicom.mkdir()
    environment["HOLOSCAN_OUTPUT_PATH"] = str(tmp_path / "other_out")
    run = subprocess.run(command, env={"PATH": path, **environment}, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert run.returncode == 1 and len(errors) == 1 and "no DICOM series" in errors[0]
    assert "Traceback" not in run.stderr and not list((tmp_path / "other_out").iterdir())
