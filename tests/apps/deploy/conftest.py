"""A packaged model folder with made weights, DICOM series made from NIfTI volumes, and the application run on them."""

import json
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.networks import Neuroverse3D
from tests.data.dicom_series import write_dicom
from tests.workflows import run_workflow

CODES = {
    "segmentAttributes": [
        [
            {
                "labelID": 2,
                "SegmentLabel": "Second ball",
                "SegmentedPropertyCategoryCodeSequence": {
                    "CodeValue": "91723000",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Anatomical Structure",
                },
                "SegmentedPropertyTypeCodeSequence": {
                    "CodeValue": "12738006",
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": "Brain",
                },
            }
        ]
    ]
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A narrow network with random weights whose output is above the threshold in a fifth of the volume."""
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(4, 8), spatial_size=16).eval()
    images, labels, _ = synthesize_cohort(0, subjects=4, spatial_size=16, num_labels=1)
    with torch.no_grad():
        network.target_decoder.output.weight.mul_(50)
        output = network(images[:1], images[None, 1:], labels[None, 1:].float())
        network.target_decoder.output.bias.add_(0.5 - output.quantile(0.8))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make_model(weights, make_dataset):
    """``make_model(folder, contexts=3, options={}, **files) -> Path``: a model folder; files are JSON contents by name.

    Contexts are not aligned unless options say so.
    """

    def make(folder, contexts=3, options=None, **files):
        folder.mkdir(parents=True)
        shutil.copy(weights, folder / "model.pt")
        make_dataset(folder, "contexts", cases=contexts)
        for name, content in {"options": {"align": "off"} | (options or {}), **files}.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def model(make_model, tmp_path_factory):
    """A model folder with codes for label 2."""
    return make_model(tmp_path_factory.mktemp("package") / "models", segments=CODES)


@pytest.fixture(scope="session")
def make_scan(write_nifti):
    """``make_scan(path, affine, size, seed) -> Path``: whole numbers with two bright blobs."""

    def make(path, affine=None, size=(18, 20, 12), seed=0):
        rng = np.random.default_rng(seed)
        voxels = rng.integers(1, 100, size).astype(np.int16)
        for value, centre in ((400, 0.3), (800, 0.7)):
            low = (np.array(size) * centre).astype(int) - 2
            voxels[tuple(slice(a, a + 4) for a in low)] = value
        return write_nifti(path, voxels, np.eye(4) if affine is None else affine)

    return make


def complete(number, data, **attributes):
    """What a scanner writes besides the geometry."""
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "P1", "Doe^Jane", "19700101", "F"
    data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20240102", "101112", "A1"
    data.FrameOfReferenceUID, data.StudyInstanceUID = "1.2.3.4", "1.2.3"
    for name, value in attributes.items():
        setattr(data, name, value)


@pytest.fixture(scope="session")
def to_dicom():
    """``to_dicom(nifti, folder, description="T1", attributes={}, **options)``: a NIfTI file as a DICOM series.

    Array axes become columns, rows and slices; files are in no order. Options are those of ``write_dicom``.
    """

    def convert(nifti, folder, description="T1", attributes=None, **options):
        image = nib.load(nifti)
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
        spacing = nib.affines.voxel_sizes(lps)
        change = options.pop("change", lambda number, data: None)

        def both(number, data):
            complete(number, data, **(attributes or {}))
            change(number, data)

        voxels = np.asanyarray(image.dataobj)
        axes = lps[:3, :3] / spacing
        write_dicom(folder, voxels, spacing, axes, lps[:3, 3], description, change=both, **options)
        return folder

    return convert


@pytest.fixture
def run_app(tmp_path, capfd):
    """``run_app(dicom, model, output=None) -> Path``: run the application in this process; the output folder."""
    from scripts.apps.deploy.app import NeuroverseApp

    def run(dicom, model, output=None):
        output = tmp_path / "out" if output is None else output
        folders = ["--input", str(dicom), "--output", str(output), "--model", str(model)]
        NeuroverseApp([sys.executable, "app", *folders]).run()
        return output

    return run


@pytest.fixture
def answer_of(tmp_path):
    """``answer_of(nifti, model, **options) -> Nifti1Image``: of ``inference.json`` with the model's options."""

    def answer(nifti, model, **options):
        output = tmp_path / "inference"
        packaged = model / "options.json"
        options = {"align": None} | (json.loads(packaged.read_text()) if packaged.is_file() else {}) | options
        run_workflow(
            "inference",
            dataset_dir=str(nifti),
            context_dir=str(model / "contexts"),
            checkpoint=str(model / "model.pt"),
            output_dir=str(output),
            device="cpu",
            overlays=False,
            **options,
        )
        return nib.load(output / f"{nifti.name.removesuffix('.nii.gz')}.nii.gz")

    return answer


@pytest.fixture
def read_segmentation():
    """``read_segmentation(output) -> highdicom.seg.Segmentation``: of the one file in a folder."""
    import highdicom

    def read(output):
        (path,) = output.glob("*.dcm")
        return highdicom.seg.segread(path)

    return read


@pytest.fixture
def on_voxels_of():
    """``on_voxels_of(segmentation, nifti) -> array``: segment numbers on a NIfTI image's voxels, found by position."""

    def place(segmentation, image):
        volume = segmentation.get_volume(combine_segments=True)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
        places = np.argwhere(np.ones(volume.spatial_shape, bool))
        indices = nib.affines.apply_affine(np.linalg.inv(image.affine) @ affine, places)
        assert np.abs(indices - np.round(indices)).max() < 0.01
        found = np.zeros(image.shape, np.int32)
        found[tuple(np.round(indices).astype(int).T)] = volume.array.ravel()
        return found

    return place
