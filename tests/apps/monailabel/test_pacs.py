"""The app on a real DICOMweb server: annotations come back as they were saved, and what cannot be used is said."""

import json
import subprocess
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/pacs-test runs these")

import SimpleITK as sitk  # noqa: E402
from fastapi import HTTPException  # noqa: E402
from highdicom.seg import Segmentation, SegmentationTypeValues, SegmentDescription  # noqa: E402
from highdicom.sr import CodedConcept  # noqa: E402
from monailabel.config import settings  # noqa: E402
from monailabel.interfaces.utils import app as monailabel_apps  # noqa: E402
from pydicom import dcmread  # noqa: E402
from pydicom.uid import generate_uid  # noqa: E402

from scripts.apps.deploy.source_headers import stacked  # noqa: E402
from scripts.apps.monailabel import dicomweb_datastore  # noqa: E402
from scripts.data.volumes import load_volume  # noqa: E402
from scripts.runtime.manifest import bundle_identity  # noqa: E402
from tests.apps.monailabel.server import Server  # noqa: E402
from tests.data.dicom_series import rotation, write_dicom  # noqa: E402

MODEL = "neuroverse3d"
OBLIQUE = rotation(20, -35, 15)


def complete(number, data):
    """What a scanner writes besides the geometry."""
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "P1", "Doe^Jane", "19700101", "F"
    data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20240102", "101112", "A1"
    data.FrameOfReferenceUID, data.StudyInstanceUID = "1.2.3.4", "1.2.3"


@pytest.fixture
def store(tmp_path, orthanc, make_dataset):
    """Four scans in the PACS, as series ``1.2.3.100`` and so on, with their label maps."""
    source = make_dataset(tmp_path, cases=4, size=(16, 18, 14))
    labels = {}
    for number in range(4):
        folder, series = tmp_path / "dicom" / str(number), f"1.2.3.10{number}"
        voxels = np.asarray(nib.load(source / "imagesTr" / f"case_{number:02d}_0000.nii.gz").dataobj)
        write_dicom(folder, voxels, (1.1, 0.9, 1.4), OBLIQUE, (4, -7, 11), series=series, change=complete)
        orthanc.send(*sorted(folder.iterdir()))
        labels[series] = np.asarray(nib.load(source / "labelsTr" / f"case_{number:02d}.nii.gz").dataobj)
    return labels


@pytest.fixture
def make_app(tmp_path, weights, make_app_dir, monkeypatch, orthanc):
    """``make_app(cache, **conf)``: the app on the PACS, with a cache of that name."""
    monkeypatch.setattr(settings, "MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_SEARCH_FILTER", {"Modality": "MR"})
    app_dir = make_app_dir(tmp_path)

    def make(cache="cache", **conf):
        monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / cache))
        conf = {"weights": str(weights), "device": "cpu", "align": "off"} | conf
        monailabel_apps.apps.clear()
        return monailabel_apps.app_instance(str(app_dir), orthanc.dicomweb, conf)

    return make


def save(app, tmp_path, series, voxels, names=None):
    """As a viewer does: on the voxels of the scan that it got."""
    scan = nib.load(app.datastore().get_image_uri(series))
    path = tmp_path / "sent.nii.gz"
    nib.save(nib.Nifti1Image(voxels, scan.affine), path)
    said = {"label_info": [{"name": name, "idx": number} for number, name in (names or {}).items()]}
    app.datastore().save_label(series, str(path), "final", said)


def propose(app, series):
    found = app.infer({"model": MODEL, "image": series})
    return load_volume(found["file"])[0].numpy(), found["params"]


def refused(do, status, said):
    with pytest.raises(HTTPException) as error:
        do()
    assert error.value.status_code == status and said in error.value.detail, error.value.detail


@pytest.fixture
def foreign(tmp_path, orthanc):
    """``foreign(series, {name: mask}, kind, change, **attributes)``: a segmentation that another program stores.

    Masks are ``(columns, rows, slices)``; several may share voxels. ``change(dataset)`` has the last word on what
    highdicom made.
    """

    def make(series, masks, kind=SegmentationTypeValues.BINARY, change=lambda made: None, **attributes):
        files = [dcmread(BytesIO(file)) for file in orthanc.files(SeriesInstanceUID=series)]
        segments = [
            SegmentDescription(
                number, name, CodedConcept("1", "99OTHER", "x"), CodedConcept("1", "99OTHER", "x"), "MANUAL"
            )
            for number, name in enumerate(masks, 1)
        ]
        pixels = np.stack([mask.T for mask in masks.values()], axis=-1)
        fractional = kind is SegmentationTypeValues.FRACTIONAL
        made = Segmentation(
            stacked(files), pixels.astype(float) if fractional else pixels.astype(np.uint8), kind, segments,
            generate_uid(), 7, generate_uid(), 1, "other", "other", "1", "1",
        )  # fmt: skip
        for name, value in attributes.items():
            setattr(made, name, value)
        change(made)
        path = tmp_path / f"{made.SOPInstanceUID}.dcm"
        made.save_as(path)
        orthanc.send(path)
        return str(made.SOPInstanceUID)

    return make


def test_annotations_survive_the_cache(tmp_path, store, make_app, monkeypatch):
    """Annotate, save, another machine: the same proposal, from the same labels with the same names."""
    app = make_app()
    assert app.datastore().list_images() == sorted(store)
    names = {1: "Anterior", 300: "Hinten \u00fc", 9: "nowhere"}
    for series in list(store)[1:]:
        store[series] = np.where(store[series] == 2, 300, store[series]).astype(np.uint16)
        save(app, tmp_path, series, store[series], names)
    first, said = propose(app, "1.2.3.100")
    assert said["label_names"] == {"Anterior": 1, "Hinten \u00fc": 300} and {1, 300} <= set(np.unique(first))

    again = make_app("other")
    second, said_again = propose(again, "1.2.3.100")
    assert np.array_equal(first, second) and said_again["contexts"] == said["contexts"]
    for series in list(store)[1:]:
        label = nib.load(again.datastore().get_label_uri(series, "final"))
        assert np.array_equal(np.asarray(label.dataobj), store[series])
        scan = nib.load(again.datastore().get_image_uri(series))
        assert np.array_equal(label.affine, scan.affine)
        info = again.datastore().get_label_info(series, "final")["label_info"]
        assert {entry["idx"]: entry["name"] for entry in info} == names

    def converted(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(dicomweb_datastore, "on_series", converted)
    monkeypatch.setattr(again.datastore().server, "instance", converted)
    monkeypatch.setattr(again.datastore().server, "volume", lambda listed: converted() if listed.series in store else 0)
    assert again.info()["datastore"]["completed"] == 3
    third, _ = propose(make_app("other"), "1.2.3.100")  # a restart with the same cache
    assert np.array_equal(first, third)


def test_the_newest_counts_and_what_is_removed_is_gone(tmp_path, store, make_app, orthanc, foreign):
    app, series = make_app(), "1.2.3.101"
    drawn = store[series]
    foreign(series, {"old": drawn == 2}, ContentDate="20200101", ContentTime="101010")
    save(app, tmp_path, series, drawn, {1: "one", 2: "two"})
    foreign(series, {"older": drawn == 2}, ContentDate="20100101", ContentTime="101010")

    def now():
        app.datastore().refresh()
        path = app.datastore().get_label_uri(series, "final")
        return np.asarray(nib.load(path).dataobj) if path else None

    assert np.array_equal(now(), drawn)
    newest = foreign(series, {"two": drawn == 1, "one": drawn == 2}, ContentDate="20400101", ContentTime="101010")
    app.info()
    assert np.array_equal(now(), np.where(drawn == 1, 1, np.where(drawn == 2, 2, 0)))  # numbered as they come
    orthanc.remove("Instance", SOPInstanceUID=newest)
    assert app.info()["datastore"]["completed"] == 1 and np.array_equal(now(), drawn)
    orthanc.remove("Series", Modality="SEG")
    assert now() is None and app.info()["datastore"]["completed"] == 0
    refused(lambda: app.infer({"model": MODEL, "image": "1.2.3.100"}), 409, "no finished annotation")


def test_segments_go_by_their_label(tmp_path, store, make_app, foreign):
    """Other programs number segments as they come; a name is one label in all annotations."""
    app = make_app()
    save(app, tmp_path, "1.2.3.101", store["1.2.3.101"], {1: "Anterior", 2: "Posterior"})
    other = store["1.2.3.102"]
    foreign("1.2.3.102", {"Posterior": other == 2, "Anterior": other == 1})
    some = store["1.2.3.103"]
    foreign("1.2.3.103", {"Cyst": some == 1, "Posterior": some == 2})
    assert app.info()["models"][MODEL]["labels"] == {"Anterior": 1, "Posterior": 2, "Cyst": 3}
    labels = {s: np.asarray(nib.load(app.datastore().get_label_uri(s, "final")).dataobj) for s in list(store)[1:]}
    assert np.array_equal(labels["1.2.3.102"], other)
    assert np.array_equal(labels["1.2.3.103"], np.where(some == 1, 3, some))


def test_what_is_no_annotation_is_passed_over_and_said(tmp_path, store, make_app, orthanc, foreign):
    app = make_app()
    save(app, tmp_path, "1.2.3.101", store["1.2.3.101"])
    mask = store["1.2.3.102"] > 0
    reasons = {
        foreign("1.2.3.102", {"a": mask}, SegmentationTypeValues.FRACTIONAL): "FRACTIONAL, not BINARY",
        foreign("1.2.3.102", {"a": mask, "b": mask}): "segments overlap",
        foreign("1.2.3.103", {"a": mask}, FrameOfReferenceUID="1.2.9"): "another frame of reference",
    }

    def moved(made):
        for frame in made.PerFrameFunctionalGroupsSequence:
            place = frame.PlanePositionSequence[0].ImagePositionPatient
            frame.PlanePositionSequence[0].ImagePositionPatient = [float(v) + 500 for v in place]

    def predicted(made):
        made.SegmentSequence[0].SegmentAlgorithmType = "AUTOMATIC"
        made.SegmentSequence[0].SegmentAlgorithmName = bundle_identity()["name"]  # as the Deploy application writes

    def of_no_series(made):
        made.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3.999"

    reasons[foreign("1.2.3.103", {"a": mask}, change=moved)] = "outside of its series"
    reasons[foreign("1.2.3.103", {"a": mask}, change=predicted)] = "a prediction, not an annotation"
    of_none = foreign("1.2.3.103", {"a": mask}, change=of_no_series)

    found = app.info()
    assert found["datastore"]["completed"] == 1 and found["models"][MODEL]["labels"] == {"label 1": 1, "label 2": 2}
    lines = found["datastore"]["passed_over"]
    assert len(lines) == len(reasons) + 1
    for uid, reason in (reasons | {of_none: "of no series that is listed"}).items():
        assert [reason in line for line in lines if uid in line] == [True]
    _, said = propose(app, "1.2.3.100")
    assert set(lines) & set(said["warnings"]) == {line for line in lines if of_none not in line}
    foreign("1.2.3.102", {"label 1": mask}, ContentDate="20000101")  # older than those that are passed over
    assert app.info()["datastore"]["completed"] == 2


def test_series_that_are_no_volume(tmp_path, store, make_app, orthanc):
    """As in a folder of studies: refused by their name, and left out of what is proposed next."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 99, (8, 9, 7)).astype(np.int16)

    def enhanced(number, data):
        complete(number, data)
        data.NumberOfFrames, data.PixelData = 2, 2 * data.PixelData
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"

    write_dicom(tmp_path / "gap", voxels, series="1.2.4.1", missing=(3,), change=complete)
    for axes in (np.eye(3), rotation(90, 0, 0)):
        write_dicom(tmp_path / "scout", voxels, axes=axes, series="1.2.4.2", prefix=f"{axes[1, 1]}", change=complete)
    write_dicom(tmp_path / "enhanced", voxels[..., :1], series="1.2.4.3", change=enhanced)
    for folder in ("gap", "scout", "enhanced"):
        orthanc.send(*(tmp_path / folder).iterdir())
    app = make_app()
    reasons = {"1.2.4.1": "lacks slices", "1.2.4.2": "as a localizer has", "1.2.4.3": "enhanced"}
    for series, reason in reasons.items():
        refused(lambda series=series: app.infer({"model": MODEL, "image": series}), 422, reason)
    refused(lambda: app.infer({"model": MODEL, "image": "1.2.4.9"}), 404, "no image")
    fresh = make_app("fresh")
    proposed = {fresh.next_sample({"strategy": "random"})["id"] for _ in range(12)}
    assert proposed <= set(store)
    save(fresh, tmp_path, "1.2.3.101", store["1.2.3.101"])
    fresh = make_app("fresh again")
    assert fresh.next_sample({"strategy": "least_confident", "candidates": 10})["looked_at"] == 3
    lines = fresh.info()["datastore"]["passed_over"]
    assert all(any(series in line and reason in line for line in lines) for series, reason in reasons.items())


def test_what_is_saved_is_checked(tmp_path, store, make_app, orthanc):
    app, series = make_app(), "1.2.3.101"
    drawn = store[series]
    refused(lambda: save(app, tmp_path, series, drawn[:, :, 1:]), 422, "differ in shape")
    refused(lambda: save(app, tmp_path, series, np.zeros_like(drawn)), 422, "nothing is drawn")
    refused(lambda: save(app, tmp_path, series, drawn, {1: "a" * 65}), 422, "up to 64 letters")
    refused(lambda: app.datastore().save_label("1.2.9", "x.nii.gz", "final", {}), 404, "no image")
    assert not orthanc.find("Series", Modality="SEG")
    save(app, tmp_path, series, drawn, {1: "a", 2: "b"})
    refused(lambda: save(app, tmp_path, "1.2.3.102", drawn, {1: "b", 2: "a"}), 422, "label 1 is called")
    for do in (
        lambda: app.datastore().remove_label(series, "final"),
        lambda: app.datastore().remove_image(series),
        lambda: app.datastore().add_image("x", str(tmp_path / "sent.nii.gz"), {}),
    ):
        refused(do, 422, "DICOM server")
    assert app.info()["datastore"]["completed"] == 1
    bare = tmp_path / "label.bin"
    bare.write_bytes(drawn.astype(np.uint8).tobytes(order="F"))
    app.datastore().save_label("1.2.3.103", str(bare), "final", {})
    label = nib.load(app.datastore().get_label_uri("1.2.3.103", "final"))
    assert np.array_equal(np.asarray(label.dataobj), drawn)


def test_a_series_that_is_still_arriving(tmp_path, store, make_app, orthanc):
    voxels = np.random.default_rng(0).integers(0, 99, (8, 9, 7)).astype(np.int16)
    write_dicom(tmp_path / "late", voxels, series="1.2.4.1", change=complete)
    files = sorted((tmp_path / "late").iterdir(), key=lambda path: dcmread(path).InstanceNumber)
    orthanc.send(*files[:4])
    app = make_app()
    assert nib.load(app.datastore().get_image_uri("1.2.4.1")).shape == (8, 9, 4)
    orthanc.send(*files[4:])
    app.datastore().refresh()
    assert nib.load(app.datastore().get_image_uri("1.2.4.1")).shape == (8, 9, 7)


def test_other_programs_read_annotations(tmp_path, store, make_app, orthanc):
    """dciodvfy finds no error, and dcmqi the same voxels, with gaps between the slices that have any."""
    app, series = make_app(), "1.2.3.101"
    drawn = store[series].copy()
    drawn[:, :, ::2] = 0
    drawn[3, 4, 1] = 1
    save(app, tmp_path, series, drawn, {1: "Anterior", 2: "Posterior"})
    (file,) = orthanc.files(Modality="SEG")
    (tmp_path / "seg.dcm").write_bytes(file)
    check = subprocess.run(["dciodvfy", "-new", tmp_path / "seg.dcm"], capture_output=True, text=True)
    assert not [line for line in (check.stdout + check.stderr).splitlines() if line.startswith("Error")]
    (tmp_path / "read").mkdir()
    command = ["segimage2itkimage", "--inputDICOM", "seg.dcm", "--outputDirectory", "read", "--mergeSegments"]
    subprocess.run([*command, "-t", "nifti"], cwd=tmp_path, check=True, capture_output=True)
    (path,) = (tmp_path / "read").glob("*.nii.gz")
    scan = sitk.ReadImage(app.datastore().get_image_uri(series))
    read = sitk.Resample(sitk.ReadImage(str(path)), scan, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    assert np.array_equal(sitk.GetArrayFromImage(read).T, drawn)
    again = make_app("other")
    label = nib.load(again.datastore().get_label_uri(series, "final"))
    assert np.array_equal(np.asarray(label.dataobj), drawn)


def test_an_annotation_by_dcmqi(tmp_path, store, make_app, orthanc):
    """As 3D Slicer stores it: on the scan's voxels, with standard codes."""
    app, series = make_app(), "1.2.3.102"
    drawn = store[series]
    scan = nib.load(app.datastore().get_image_uri(series))
    nib.save(nib.Nifti1Image(drawn, scan.affine), tmp_path / "drawn.nii.gz")
    code = {"CodeValue": "123037004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Anatomical Structure"}
    entries = [
        {"labelID": value, "SegmentLabel": name, "SegmentAlgorithmType": "MANUAL",
         "SegmentedPropertyCategoryCodeSequence": code, "SegmentedPropertyTypeCodeSequence": code}
        for value, name in ((1, "Posterior"), (2, "Anterior"))
    ]  # fmt: skip
    described = {"segmentAttributes": [entries], "SeriesDescription": "drawn", "SeriesNumber": "7",
                 "InstanceNumber": "1", "ContentCreatorName": "x", "BodyPartExamined": ""}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(described))
    command = ["itkimage2segimage", "--inputImageList", "drawn.nii.gz", "--inputDICOMDirectory", "dicom/2",
               "--outputDICOM", "seg.dcm", "--inputMetadata", "meta.json", "--skip", "1"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    orthanc.send(tmp_path / "seg.dcm")
    assert app.info()["models"][MODEL]["labels"] == {"Posterior": 1, "Anterior": 2}
    label = nib.load(app.datastore().get_label_uri(series, "final"))
    assert np.array_equal(np.asarray(label.dataobj), drawn)


def test_a_server_of_its_own(tmp_path, store, weights, make_app_dir, orthanc, monkeypatch):
    """Over HTTP, as viewers ask: lists, annotations, a proposal, and a training, which looks from another process."""
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", '{"Modality": "MR"}')
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / "cache"))
    conf = {"weights": weights, "device": "cpu", "align": "off"}
    server = Server(make_app_dir(tmp_path), orthanc.dicomweb, tmp_path, **conf)
    try:
        server.wait()
        everything = server.client.get("/datastore/", params={"output": "all"}).json()["objects"]
        assert sorted(everything) == sorted(store) and not list((tmp_path / "cache").glob("*/*.nii.gz"))
        for series in list(store)[1:]:
            scan = server.client.get("/datastore/image", params={"image": series})
            (tmp_path / "scan.nii.gz").write_bytes(scan.content)
            label = nib.Nifti1Image(store[series], nib.load(tmp_path / "scan.nii.gz").affine)
            nib.save(label, tmp_path / "drawn.nii.gz")
            assert server.save(series, tmp_path / "drawn.nii.gz").status_code == 200
        assert len(orthanc.find("Series", Modality="SEG")) == 3
        assert server.info()["models"][MODEL]["labels"] == {"first": 1, "second": 2}
        answer = server.answer("1.2.3.100", tmp_path)
        assert answer.shape == (16, 18, 14) and np.asarray(answer.dataobj).any()
        assert server.next_sample().json()["id"] == "1.2.3.100"
        assert server.train(max_epochs=1, groups_per_epoch=1).status_code == 200
        server.training_begins()
        assert server.training_ends()["status"] == "DONE", server.log.read_text()
        assert (tmp_path / "app" / "model" / "weights_0001.pt").is_file()
        orthanc.stop()
        gone = server.client.get("/info/")
        assert gone.status_code == 503 and str(tmp_path) not in gone.text
    finally:
        server.stop()
