"""Series that are selected, decoded or refused, each with one line."""

import json
import shutil
from datetime import UTC, datetime, timedelta

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai.deploy", reason="the MONAI Deploy App SDK is not installed: make deploy-test has it")

import SimpleITK as sitk
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.uid import JPEGLSLossless, RLELossless

from scripts.apps.deploy.app import RECORD
from tests.data.dicom_series import rotation

OBLIQUE = nib.affines.from_matvec(rotation(20, -35, 15) @ np.diag([0.9, 1.3, 2.2]), (-31.2, 47.8, 12.5))


@pytest.fixture
def scan(tmp_path, make_scan):
    return make_scan(tmp_path / "scan.nii.gz", OBLIQUE, size=(14, 16, 8))


@pytest.fixture
def refused(tmp_path, model, run_app):
    """``refused(dicom, message)``: the run ends with one line, and leaves nothing behind."""

    def check(dicom, message, model=model):
        with pytest.raises((ValueError, OSError), match=message) as found:
            run_app(dicom, model)
        assert "\n" not in str(found.value)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    return check


# --- which series


def test_the_mr_series_is_taken_and_others_are_left_out_aloud(
    tmp_path, model, scan, to_dicom, run_app, read_segmentation, capfd
):
    dicom = to_dicom(scan, tmp_path / "dicom")
    to_dicom(scan, tmp_path / "dicom" / "ct", "CT head", attributes={"Modality": "CT"})
    (dicom / "readme.txt").write_text("no DICOM")
    first = run_app(dicom, model)
    log = capfd.readouterr().err
    assert "series left out: 'CT head' (CT, 8 instances" in log and "series segmented: 'T1' (MR, 8 instances" in log
    (segmentation,) = first.glob("*.dcm")
    shutil.copy(segmentation, dicom)  # as a PACS has it afterwards
    again = run_app(dicom, model, tmp_path / "again")
    assert "RESEARCH ONLY" in capfd.readouterr().err
    assert read_segmentation(again).PixelData == dcmread(segmentation).PixelData


def test_no_mr_series(tmp_path, scan, to_dicom, refused):
    dicom = to_dicom(scan, tmp_path / "dicom", "CT head", attributes={"Modality": "CT"})
    refused(dicom, r"no series matches .*Modality.*there are 'CT head' \(CT, 8 instances")


def test_several_mr_series_are_named_and_chosen_by_rules(tmp_path, make_model, scan, to_dicom, refused, run_app):
    dicom = to_dicom(scan, tmp_path / "dicom", "Sag T1")
    to_dicom(scan, dicom, "Ax FLAIR", prefix="F")
    refused(
        dicom, r"2 series match .*'Sag T1' \(MR.*; .*'Ax FLAIR'.*series\.json|2 series match .*'Ax FLAIR'.*'Sag T1'"
    )
    rules = {"selections": [{"name": "T1", "conditions": {"Modality": "^MR$", "SeriesDescription": "T1"}}]}
    output = run_app(dicom, make_model(tmp_path / "rules", series=rules))
    t1 = next(dcmread(path).SeriesInstanceUID for path in dicom.glob("IM*"))
    assert json.loads((output / RECORD).read_text())["series"]["SeriesInstanceUID"] == t1


def test_the_same_instances_twice_are_one_series(tmp_path, model, scan, to_dicom, run_app):
    dicom = to_dicom(scan, tmp_path / "dicom")
    shutil.copytree(dicom, tmp_path / "copy")
    shutil.move(tmp_path / "copy", dicom / "again")
    assert json.loads((run_app(dicom, model) / RECORD).read_text())["series"]["slices"] == 8


def test_an_empty_folder(tmp_path, refused):
    (tmp_path / "dicom").mkdir()
    refused(tmp_path / "dicom", "no DICOM series in the input folder")


# --- series that are no volume


def test_a_missing_slice(tmp_path, scan, to_dicom, refused):
    refused(to_dicom(scan, tmp_path / "dicom", missing=(3,)), "'T1'.*lacks slices or has them unevenly spaced")


def test_missing_slices_at_the_ends_cannot_be_seen(tmp_path, model, scan, to_dicom, run_app):
    dicom = to_dicom(scan, tmp_path / "dicom", missing=(0, 7))
    assert json.loads((run_app(dicom, model) / RECORD).read_text())["series"]["slices"] == 6


def test_two_volumes_in_one_series(tmp_path, scan, make_scan, to_dicom, refused):
    """Two echoes, say: the SDK's loader would make one volume of both."""
    dicom = to_dicom(scan, tmp_path / "dicom", series="1.2.34")
    other = make_scan(tmp_path / "other.nii.gz", OBLIQUE, size=(14, 16, 8), seed=1)
    to_dicom(other, dicom, prefix="E", series="1.2.34")
    refused(dicom, "'T1'.*has several slices at one position: 2 volumes of 8")


def test_slices_of_several_orientations(tmp_path, make_scan, to_dicom, refused):
    dicom = tmp_path / "dicom"
    for prefix, turned in (("A", np.eye(3)), ("B", rotation(90, 0, 0))):
        affine = nib.affines.from_matvec(turned)
        to_dicom(make_scan(tmp_path / f"{prefix}.nii.gz", affine, (9, 9, 9)), dicom, prefix=prefix, series="1.2.34")
    refused(dicom, "slices of several orientations")


def test_gantry_tilt(tmp_path, scan, to_dicom, refused):
    dicom = to_dicom(scan, tmp_path / "dicom", position=lambda number, place: place + [0, 0.6 * number, 0])
    refused(dicom, r"gantry tilt|unevenly spaced")


def test_a_single_slice(tmp_path, make_scan, to_dicom, refused):
    scan = make_scan(tmp_path / "one.nii.gz", size=(12, 12, 8))
    refused(to_dicom(scan, tmp_path / "dicom", missing=range(1, 8)), "is a single slice$")


@pytest.mark.parametrize("name, value, said", [
    ("ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "is made of mosaics.*dcm2niix"),
    ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.4.1", "is enhanced DICOM.*dcm2niix"),
])  # fmt: skip
def test_files_that_hold_a_volume_each(tmp_path, scan, to_dicom, refused, name, value, said):
    def change(number, data):
        setattr(data, name, value)
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID

    refused(to_dicom(scan, tmp_path / "dicom", change=change), said)


def test_a_colour_series(tmp_path, scan, to_dicom, refused):
    dicom = to_dicom(scan, tmp_path / "dicom")
    for path in dicom.iterdir():
        data = dcmread(path)
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "RGB", 0
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
        data.PixelData = bytes(3 * data.Rows * data.Columns)
        data.save_as(path)
    refused(dicom, "is a colour image")


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"])
def test_a_series_that_is_not_placed_in_space(tmp_path, scan, to_dicom, refused, missing):
    dicom = to_dicom(scan, tmp_path / "dicom", change=lambda number, data: delattr(data, missing))
    refused(dicom, "'T1'.*(without position or orientation|no FrameOfReferenceUID)")


def test_a_constant_series(tmp_path, write_nifti, to_dicom, refused):
    flat = write_nifti(tmp_path / "flat.nii.gz", np.full((8, 8, 8), 7, np.int16))
    refused(to_dicom(flat, tmp_path / "dicom"), r"series 'T1' is constant \(every voxel is 7\)")


def test_a_truncated_file(tmp_path, scan, to_dicom, refused):
    dicom = to_dicom(scan, tmp_path / "dicom")
    path = dicom / "IM0003"
    whole = path.read_bytes()
    for part in (len(whole) - 100, 600):
        path.write_bytes(whole[:part])
        refused(dicom, "cannot be read|lacks slices|has no")


def test_directions_that_scanners_round(tmp_path, model, scan, to_dicom, run_app, read_segmentation):
    """A tilted series of GE: the seventh decimal changes from slice to slice; highdicom wants none to."""
    rng = np.random.default_rng(0)

    def noise(number, data):
        data.ImageOrientationPatient = [f"{float(v) + rng.normal(0, 3e-7):.9f}" for v in data.ImageOrientationPatient]

    plain, noisy = to_dicom(scan, tmp_path / "plain"), to_dicom(scan, tmp_path / "noisy", change=noise)
    answers = [read_segmentation(run_app(d, model, tmp_path / f"out {d.name}")) for d in (plain, noisy)]
    assert answers[0].PixelData == answers[1].PixelData and answers[0].pixel_array.any()
    volumes = [answer.get_volume(combine_segments=True) for answer in answers]
    assert np.allclose(volumes[0].affine, volumes[1].affine, atol=1e-4)


# --- how it is encoded


def stored_as_jpeg(path, compressor):
    """Pixel data of a file, encoded by SimpleITK."""
    image = sitk.ReadImage(str(path))
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path.parent.parent / "encoded.dcm"))
    writer.SetCompressor(compressor)
    writer.UseCompressionOn()
    writer.Execute(image)
    return dcmread(path.parent.parent / "encoded.dcm")


def compress(path, how):
    data = dcmread(path)
    if how in (RLELossless, JPEGLSLossless):
        data.compress(how, generate_instance_uid=False)
    else:
        encoded = stored_as_jpeg(path, how)
        assert encoded.file_meta.TransferSyntaxUID.is_compressed
        data.file_meta.TransferSyntaxUID = encoded.file_meta.TransferSyntaxUID
        data.PixelData = encoded.PixelData
        data["PixelData"].is_undefined_length = True
    data.save_as(path)


@pytest.mark.parametrize(
    "how", [RLELossless, JPEGLSLossless, "JPEG", "JPEG2000"], ids=["RLE", "JPEG-LS", "JPEG lossless", "JPEG 2000"]
)
def test_compressed_series_are_decoded(tmp_path, model, scan, to_dicom, run_app, read_segmentation, how):
    plain, compressed = (to_dicom(scan, tmp_path / name) for name in ("plain", "compressed"))
    for path in compressed.iterdir():
        compress(path, how)
    answers = [read_segmentation(run_app(d, model, tmp_path / f"out {d.name}")) for d in (plain, compressed)]
    assert answers[0].PixelData == answers[1].PixelData and answers[0].pixel_array.any()


def test_a_codec_that_is_not_known(tmp_path, scan, to_dicom, refused):
    dicom = to_dicom(scan, tmp_path / "dicom")
    for path in dicom.iterdir():
        data = dcmread(path)
        data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"  # high-throughput JPEG 2000
        data.PixelData = encapsulate([b"\xff\x4f\xff\x51 no image"])
        data["PixelData"].is_undefined_length = True
        data.save_as(path)
    refused(dicom, "'T1'.*cannot be read.*encoded as High-Throughput JPEG 2000")


def test_files_without_a_header_of_their_own(tmp_path, model, scan, to_dicom, run_app, read_segmentation):
    """A bare data set, without preamble and file meta information; beside it what only begins like one."""
    plain, bare = (to_dicom(scan, tmp_path / name) for name in ("plain", "bare"))
    for path in bare.iterdir():
        data = dcmread(path)
        data.preamble = None
        del data.file_meta
        data.save_as(path, enforce_file_format=False, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\x00"
    (bare / "other").write_bytes(b"\x08\x00" + bytes(range(256)))
    answers = [read_segmentation(run_app(d, model, tmp_path / f"out {d.name}")) for d in (plain, bare)]
    assert answers[0].PixelData == answers[1].PixelData and answers[0].pixel_array.any()


# --- what else is in the files


def test_values_that_de_identification_removed(tmp_path, model, scan, to_dicom, run_app, read_segmentation):
    def remove(number, data):
        for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                     "StudyDate", "StudyTime", "SeriesDescription"):  # fmt: skip
            delattr(data, name)

    found = read_segmentation(run_app(to_dicom(scan, tmp_path / "dicom", change=remove), model))
    assert not found.PatientID and "RESEARCH" in found.SeriesDescription


def test_every_slice_has_its_own_rescale(tmp_path, model, scan, to_dicom, run_app, read_segmentation):
    """Stored values differ from slice to slice, the intensities do not: the answer is that of plain storage."""
    plain = to_dicom(scan, tmp_path / "plain")

    def halve_some(number, data):
        if number % 2:
            stored = np.frombuffer(data.PixelData, "<i2") * 2 + 6
            data.RescaleSlope, data.RescaleIntercept, data.PixelData = "0.5", "-3", stored.astype("<i2").tobytes()

    rescaled = to_dicom(scan, tmp_path / "rescaled", change=halve_some)
    answers = [read_segmentation(run_app(d, model, tmp_path / f"out {d.name}")) for d in (plain, rescaled)]
    assert answers[0].PixelData == answers[1].PixelData and answers[0].pixel_array.any()


@pytest.mark.parametrize("character_set", ["ISO_IR 192", ["", "ISO 2022 IR 87"], ["ISO 2022 IR 6", "ISO 2022 IR 87"]])
def test_patient_names_of_other_scripts(tmp_path, model, scan, to_dicom, run_app, read_segmentation, character_set):
    names = {"SpecificCharacterSet": character_set, "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"}
    found = read_segmentation(run_app(to_dicom(scan, tmp_path / "dicom", attributes=names), model))
    assert str(found.PatientName) == names["PatientName"] and found.SpecificCharacterSet == "ISO_IR 192"


@pytest.mark.filterwarnings("ignore")
def test_values_that_are_not_as_dicom_has_them_are_left_empty(
    tmp_path, model, scan, to_dicom, run_app, read_segmentation
):
    wrong = {"PatientSex": "U", "PatientBirthDate": "000000", "StudyTime": "25", "PatientName": "ANON0001"}
    wrong |= {"SpecificCharacterSet": "ISO_IR 6"}
    found = read_segmentation(run_app(to_dicom(scan, tmp_path / "dicom", attributes=wrong), model))
    assert not any((found.PatientSex, found.PatientBirthDate, found.StudyTime))
    assert found.PatientName == "ANON0001" and found.StudyDate == "20240102"


@pytest.mark.parametrize("zone", ["+1345", None])
def test_the_time_zone_is_the_series_own(tmp_path, model, scan, to_dicom, run_app, read_segmentation, zone):
    attributes = {"TimezoneOffsetFromUTC": zone} if zone else {}
    before = datetime.now(UTC)
    found = read_segmentation(run_app(to_dicom(scan, tmp_path / "dicom", attributes=attributes), model))
    assert found.get("TimezoneOffsetFromUTC") == zone
    if zone:
        for name in ("Series", "Content", "InstanceCreation"):
            said = f"{found[name + 'Date'].value}{found[name + 'Time'].value} {zone}"
            assert before - timedelta(seconds=1) < datetime.strptime(said, "%Y%m%d%H%M%S %z") <= datetime.now(UTC)


def test_a_medium_with_its_directory(tmp_path, model, scan, to_dicom, run_app):
    medium = FileSet()
    for path in to_dicom(scan, tmp_path / "dicom", attributes={"SeriesNumber": 1}).iterdir():
        medium.add(path)
    medium.write(tmp_path / "medium")
    assert (tmp_path / "medium" / "DICOMDIR").is_file()
    assert json.loads((run_app(tmp_path / "medium", model) / RECORD).read_text())["series"]["slices"] == 8


def test_an_output_folder_that_holds_a_run(tmp_path, model, scan, to_dicom, run_app):
    dicom = to_dicom(scan, tmp_path / "dicom")
    before = {p.name: p.read_bytes() for p in run_app(dicom, model).iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_app(dicom, model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
