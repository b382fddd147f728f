"""Raw cases -> dataset: what is kept, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from scripts.data.conversion import dataset_writer as conversion
from scripts.data.conversion.dataset_writer import write_dataset
from scripts.data.conversion.pairing import ImageFile, RawCase, RawDataset, pair_files
from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import DatasetError, NnunetDataset, find_datasets
from scripts.data.volumes import VolumeError, load_volume

AFFINE = nib.affines.from_matvec(
    np.array([[0.0, -1.2, 0.1], [0.9, 0.1, 0.0], [0.0, 0.1, 2.0]]), np.array([-3.0, 14.0, 7.5])
)
SIZE = (9, 10, 11)


def scan(seed, dtype=np.int16):
    return np.random.default_rng(seed).integers(0, 2000, SIZE).astype(dtype)


def mask(values=(1, 2), dtype=np.uint8):
    voxels = np.zeros(SIZE, dtype)
    for i, value in enumerate(values):
        voxels[2 + i, 3:6, 4:8] = value
    return voxels


@pytest.fixture
def raw(tmp_path, write_nifti):
    """Three cases of ``NAME_img.nii.gz`` and ``NAME_gt.nii.gz``."""
    for i, name in enumerate("abc"):
        write_nifti(tmp_path / "raw" / f"{name}_img.nii.gz", scan(i), AFFINE)
        write_nifti(tmp_path / "raw" / f"{name}_gt.nii.gz", mask(), AFFINE)
    return tmp_path / "raw"


def pairs(root, images=("*_img.nii.gz",), labels="*_gt.nii.gz"):
    return pair_files(root, images, labels)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "data" / "Dataset001_My"


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".neuroverse3d" not in p.parts)


# --- the result


def test_layout_and_description(raw, out):
    made = write_dataset(pairs(raw), out, {1: "anterior"})
    assert everything(out.parent) == [
        "Dataset001_My",
        "Dataset001_My/dataset.json",
        "Dataset001_My/imagesTr",
        *(f"Dataset001_My/imagesTr/{name}_0000.nii.gz" for name in "abc"),
        "Dataset001_My/labelsTr",
        *(f"Dataset001_My/labelsTr/{name}.nii.gz" for name in "abc"),
    ]
    assert json.loads((out / "dataset.json").read_text()) == {
        "name": "My",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "label2": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    assert (made.training, made.test, made.labels) == (3, 0, {"anterior": 1, "label2": 2})
    assert made.cases_with == {1: 3, 2: 3}


def test_the_dataset_is_found_and_inspects_clean(raw, out):
    write_dataset(pairs(raw), out)
    (dataset,) = find_datasets(out.parent)
    assert dataset.classes == {"label1": (1,), "label2": (2,)}
    assert [c["case"] for c in sound_cases(inspect_cases(NnunetDataset.read(out).cases()))] == ["a", "b", "c"]


def test_compressed_files_are_copied_byte_for_byte(raw, out):
    write_dataset(pairs(raw), out)
    assert (out / "imagesTr" / "a_0000.nii.gz").read_bytes() == (raw / "a_img.nii.gz").read_bytes()
    assert (out / "labelsTr" / "a.nii.gz").read_bytes() == (raw / "a_gt.nii.gz").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_plain_nifti_keeps_voxels_affine_type_and_header(tmp_path, out, dtype):
    image = nib.Nifti1Image(scan(0, dtype), AFFINE)
    image.header["descrip"] = b"from the scanner"
    image.set_sform(AFFINE, code="mni")
    (tmp_path / "raw").mkdir()
    nib.save(image, tmp_path / "raw" / "a.nii")
    write_dataset(pairs(tmp_path / "raw", ["*.nii"], None), out)
    found = nib.load(out / "imagesTr" / "a_0000.nii.gz")
    assert np.array_equal(np.asanyarray(found.dataobj), scan(0, dtype)) and found.get_data_dtype() == dtype
    assert found.header["descrip"].item() == b"from the scanner" and found.header["sform_code"] == 4
    assert np.allclose(found.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_mgz_keeps_voxels_affine_and_type(tmp_path, out, dtype):
    (tmp_path / "raw").mkdir()
    nib.save(nib.MGHImage(scan(0, dtype), AFFINE.astype(np.float32)), tmp_path / "raw" / "a.mgz")
    nib.save(nib.MGHImage(mask((1, 2035), np.int32), AFFINE.astype(np.float32)), tmp_path / "raw" / "a_seg.mgz")
    write_dataset(pairs(tmp_path / "raw", ["*.mgz"], "*_seg.mgz"), out)
    found, label = nib.load(out / "imagesTr" / "a_0000.nii.gz"), nib.load(out / "labelsTr" / "a.nii.gz")
    assert np.array_equal(np.asanyarray(found.dataobj), scan(0, dtype)) and found.get_data_dtype() == dtype
    assert np.array_equal(np.asanyarray(label.dataobj), mask((1, 2035), np.int32))
    assert label.get_data_dtype() == np.uint16
    for image in (found, label):
        assert np.allclose(image.affine, AFFINE, atol=1e-4) and np.allclose(image.get_sform(), image.affine)


@pytest.mark.parametrize("value, fits", [(2**31 - 1, True), (2**31, False)])
def test_long_integers_become_what_nifti_readers_know(tmp_path, out, value, fits):
    nrrd = pytest.importorskip("nrrd")
    (tmp_path / "raw").mkdir()
    voxels = scan(0, np.int64)
    voxels[0, 0, 0] = value
    header = {"space": "RAS", "space directions": np.eye(3), "space origin": [0, 0, 0], "kinds": ["domain"] * 3}
    nrrd.write(str(tmp_path / "raw" / "a.nrrd"), voxels, header)
    if fits:
        write_dataset(pairs(tmp_path / "raw", ["*.nrrd"], None), out)
        found = nib.load(out / "imagesTr" / "a_0000.nii.gz")
        assert found.get_data_dtype() == np.int32 and np.array_equal(np.asanyarray(found.dataobj), voxels)
    else:
        with pytest.raises(VolumeError, match=r"a\.nrrd holds integers of more than 32 bits"):
            write_dataset(pairs(tmp_path / "raw", ["*.nrrd"], None), out)
        assert not out.exists()


def test_nrrd_keeps_voxels_affine_and_type(tmp_path, out):
    nrrd = pytest.importorskip("nrrd")
    (tmp_path / "raw").mkdir()
    lps = np.diag([-1, -1, 1, 1]) @ AFFINE
    header = {
        "space": "left-posterior-superior",
        "space directions": lps[:3, :3].T,
        "space origin": lps[:3, 3],
        "kinds": ["domain"] * 3,
    }
    nrrd.write(str(tmp_path / "raw" / "a.nrrd"), scan(0, np.int32) + 2**24, header)
    write_dataset(pairs(tmp_path / "raw", ["*.nrrd"], None), out)
    found = nib.load(out / "imagesTr" / "a_0000.nii.gz")
    assert np.array_equal(np.asanyarray(found.dataobj), scan(0, np.int32) + 2**24)  # float32 would round these
    assert found.get_data_dtype() == np.int32 and np.allclose(found.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_masks_stored_as_fractions_become_integers(tmp_path, out, write_nifti, ending):
    write_nifti(tmp_path / "raw" / "a.nii.gz", scan(0), AFFINE)
    write_nifti(tmp_path / "raw" / f"a_seg{ending}", mask((1, 300), np.float64), AFFINE)
    write_dataset(pairs(tmp_path / "raw", ["*.nii.gz"], f"*_seg{ending}"), out)
    label = nib.load(out / "labelsTr" / "a.nii.gz")
    assert label.get_data_dtype() == np.uint16 and np.allclose(label.affine, AFFINE, atol=1e-5)
    assert np.array_equal(np.asanyarray(label.dataobj), mask((1, 300), np.uint16))


def test_a_scaled_integer_mask_is_written_as_the_values_it_means(tmp_path, out, write_nifti):
    write_nifti(tmp_path / "raw" / "a.nii.gz", scan(0), AFFINE)
    image = nib.Nifti1Image(mask((1, 2)), AFFINE)
    image.header.set_slope_inter(2, 0)  # nibabel stores the numbers as given
    nib.save(image, tmp_path / "raw" / "a_seg.nii.gz")
    assert nib.load(tmp_path / "raw" / "a_seg.nii.gz").dataobj.slope == 2
    write_dataset(pairs(tmp_path / "raw", ["*.nii.gz"], "*_seg.nii.gz"), out)
    label = nib.load(out / "labelsTr" / "a.nii.gz")
    assert label.dataobj.slope == 1 and set(np.unique(np.asanyarray(label.dataobj))) == {0, 2, 4}


def test_a_fourth_axis_of_one_is_dropped(tmp_path, out, write_nifti):
    write_nifti(tmp_path / "raw" / "a.nii.gz", scan(0)[..., None], AFFINE)
    write_nifti(tmp_path / "raw" / "a_seg.nii.gz", mask()[..., None], AFFINE)
    write_dataset(pairs(tmp_path / "raw", ["*.nii.gz"], "*_seg.nii.gz"), out)
    image, label = nib.load(out / "imagesTr" / "a_0000.nii.gz"), nib.load(out / "labelsTr" / "a.nii.gz")
    assert image.shape == label.shape == SIZE
    assert np.array_equal(np.asanyarray(image.dataobj), scan(0)) and image.get_data_dtype() == np.int16


def test_channels_of_one_file_are_split_exactly(tmp_path, out):
    voxels = np.stack([scan(0), scan(1)], axis=-1)
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_slope_inter(0.5, 3)  # nibabel stores the numbers as given
    (tmp_path / "raw").mkdir()
    nib.save(image, tmp_path / "raw" / "a.nii.gz")
    cases = [RawCase("a", (ImageFile(tmp_path / "raw" / "a.nii.gz", 2),))]
    write_dataset(RawDataset(tmp_path / "raw", cases, ("T1", "T2")), out)
    assert json.loads((out / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "T2"}
    for channel in range(2):
        found = nib.load(out / "imagesTr" / f"a_{channel:04d}.nii.gz")
        assert found.shape == SIZE and found.get_data_dtype() == np.int16 and np.allclose(found.affine, AFFINE)
        assert np.array_equal(found.dataobj.get_unscaled(), voxels[..., channel])
        assert np.array_equal(found.get_fdata(), voxels[..., channel] * 0.5 + 3)


def test_without_masks_there_is_no_label_folder(raw, out):
    made = write_dataset(pairs(raw, labels=None), out)
    assert made.labels is None and not (out / "labelsTr").exists()
    assert json.loads((out / "dataset.json").read_text())["labels"] == {"background": 0}
    assert len(NnunetDataset.read(out).cases()) == 3


# --- labels


def test_two_labels_of_one_name_are_refused(raw, out):
    for names in ({1: "x", 2: "x"}, {1: "label2"}, {1: "Background"}):
        with pytest.raises(ValueError, match="a name of its own"):
            write_dataset(pairs(raw), out, names)
    assert not out.exists()


def test_values_that_the_source_does_not_name_are_faults(raw, out):
    found = pairs(raw)
    with pytest.raises(DatasetError, match=r"label values \[2\] are not in dataset.json"):
        write_dataset(RawDataset(found.root, found.cases, found.channel_names, {1: "one"}), out)
    made = write_dataset(RawDataset(found.root, found.cases, found.channel_names, {1: "one"}), out, {2: "two"})
    assert made.labels == {"one": 1, "two": 2}


# --- faults


def spoil(raw, write_nifti):
    """One fault of content each in a and b, one of pairing in d."""
    write_nifti(raw / "a_gt.nii.gz", mask()[:-1], AFFINE)
    write_nifti(raw / "b_gt.nii.gz", mask((1.5,), np.float32), AFFINE)
    write_nifti(raw / "d_img.nii.gz", scan(9), AFFINE)


def test_faults_of_pairing_come_before_any_file_is_read(raw, out, write_nifti, monkeypatch):
    spoil(raw, write_nifti)
    monkeypatch.setattr(conversion, "inspect_cases", None)
    with pytest.raises(DatasetError, match=r"1 of 4 cases.*\n  Dataset001_My/d: no mask .* for d_img.nii.gz$"):
        write_dataset(pairs(raw), out)
    assert not out.parent.parent.exists()


def test_all_faults_of_content_are_named_and_nothing_is_written(raw, out, write_nifti):
    spoil(raw, write_nifti)
    (raw / "d_img.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        write_dataset(pairs(raw), out)
    assert "Dataset001_My/a: image and label differ in shape" in str(caught.value)
    assert "Dataset001_My/b: label holds values that are no label numbers: [1.5]" in str(caught.value)
    assert not out.parent.parent.exists()


def test_faulty_cases_are_left_out_on_request(raw, out, write_nifti, caplog):
    spoil(raw, write_nifti)
    made = write_dataset(pairs(raw), out, skip_bad_cases=True)
    assert made.training == 1 and everything(out / "imagesTr") == ["c_0000.nii.gz"]
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1
    for name in "abd":
        assert f"Dataset001_My/{name}: " in caplog.text


def test_channels_that_disagree_are_named(tmp_path, out, write_nifti):
    for name in "abcd":
        write_nifti(tmp_path / "raw" / f"{name}_t1.nii.gz", scan(ord(name)), AFFINE)
        write_nifti(tmp_path / "raw" / f"{name}_t2.nii.gz", scan(ord(name) + 50), AFFINE)
    write_nifti(tmp_path / "raw" / "a_t2.nii.gz", scan(1)[1:], AFFINE)
    write_nifti(tmp_path / "raw" / "b_t2.nii.gz", scan(2), AFFINE + np.eye(4) * [0.1, 0, 0, 0])
    write_nifti(tmp_path / "raw" / "c_t2.nii.gz", np.full(SIZE, np.nan, np.float32), AFFINE)
    write_nifti(tmp_path / "raw" / "d_t1.nii.gz", np.full(SIZE, np.nan, np.float32), AFFINE)
    with pytest.raises(DatasetError) as caught:
        write_dataset(pairs(tmp_path / "raw", ["*_t1.nii.gz", "*_t2.nii.gz"], None), out)
    a, b, c, d = str(caught.value).splitlines()[1:]
    assert a.strip() == (
        "Dataset001_My/a: channel 0001: image and channel 0000 differ in shape: (8, 10, 11) and (9, 10, 11)"
    )
    assert "/b: channel 0001: image and channel 0000 differ in affine" in b
    assert "/c: channel 0001: image holds NaN or infinite voxels: replace them" in c
    assert "/d: image holds NaN or infinite voxels: replace them" in d


def test_the_same_image_twice_is_a_fault(raw, out):
    (raw / "b_img.nii.gz").write_bytes((raw / "a_img.nii.gz").read_bytes())
    with pytest.raises(DatasetError, match="b: duplicate: same image as Dataset001_My/a"):
        write_dataset(pairs(raw), out)


def test_a_damaged_4d_file_is_a_fault_of_its_case(tmp_path, out, write_nifti):
    path = write_nifti(tmp_path / "raw" / "a.nii.gz", np.stack([scan(0), scan(1)], -1), AFFINE)
    path.write_bytes(path.read_bytes()[:3000])
    write_nifti(tmp_path / "raw" / "b.nii.gz", np.stack([scan(2), scan(3)], -1), AFFINE)
    cases = [RawCase(name, (ImageFile(tmp_path / "raw" / f"{name}.nii.gz", 2),)) for name in "ab"]
    raw = RawDataset(tmp_path / "raw", cases, ("T1", "T2"))
    with pytest.raises(DatasetError, match="Dataset001_My/a: .*a.nii.gz cannot be read"):
        write_dataset(raw, out)
    assert write_dataset(raw, out, skip_bad_cases=True).training == 1
    assert everything(out / "imagesTr") == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_nothing_but_test_cases_is_refused(raw, out):
    cases = [RawCase("a", (ImageFile(raw / "a_img.nii.gz"),), test=True)]
    with pytest.raises(DatasetError, match="left for training"):
        write_dataset(RawDataset(raw, cases, ("MRI",)), out)


# --- whole or not at all


def test_an_existing_dataset_is_kept_unless_overwriting(raw, out, write_nifti):
    write_dataset(pairs(raw), out)
    before = (out / "imagesTr" / "a_0000.nii.gz").read_bytes()
    write_nifti(raw / "a_img.nii.gz", scan(77), AFFINE)
    (raw / "c_img.nii.gz").unlink()
    (raw / "c_gt.nii.gz").unlink()
    with pytest.raises(FileExistsError, match="--overwrite true"):
        write_dataset(pairs(raw), out)
    assert (out / "imagesTr" / "a_0000.nii.gz").read_bytes() == before
    write_dataset(pairs(raw), out, overwrite=True)
    assert everything(out / "imagesTr") == ["a_0000.nii.gz", "b_0000.nii.gz"]
    assert np.array_equal(load_volume(out / "imagesTr" / "a_0000.nii.gz")[0].numpy(), scan(77))
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_overwriting_deletes_nothing_that_is_not_a_dataset_s(raw, out):
    write_dataset(pairs(raw), out)
    (out / "splits_final.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"also holds splits_final\.json"):
        write_dataset(pairs(raw), out, overwrite=True)
    assert (out / "splits_final.json").is_file() and (out / "imagesTr").is_dir()


def test_another_dataset_of_the_number_is_refused(raw, out):
    write_dataset(pairs(raw), out)
    with pytest.raises(FileExistsError, match="has the number of Dataset001_Other"):
        write_dataset(pairs(raw), out.with_name("Dataset001_Other"), overwrite=True)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("step", ["_write_label", "write_json", "put_folder_in_place"])
def test_a_failure_midway_leaves_nothing_behind(raw, out, monkeypatch, existing, step):
    if existing:
        write_dataset(pairs(raw), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(pairs(raw), out, overwrite=existing)
    assert calls
    if existing:
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        assert list(out.parent.iterdir()) == [out]
    else:
        assert not out.parent.parent.exists()


def test_raw_files_are_not_touched_and_not_replaced(raw, tmp_path):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in raw.rglob("*")}
    inside = tmp_path / "Dataset001_My"
    (raw / "sub").mkdir()
    write_dataset(pairs(raw), inside)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in raw.rglob("*") if p.is_file()} == before
    own = pair_files(inside, ["imagesTr/*_0000.nii.gz"], "labelsTr/*.nii.gz")
    with pytest.raises(ValueError, match="holds raw files"):
        write_dataset(own, inside, overwrite=True)
    linked = tmp_path / "links"
    linked.mkdir()
    (linked / "a.nii.gz").symlink_to(inside / "imagesTr" / "a_0000.nii.gz")
    with pytest.raises(ValueError, match="holds raw files"):
        write_dataset(pair_files(linked, ["*.nii.gz"], None), inside, overwrite=True)
    assert len(everything(inside)) == 9


def test_links_to_files_are_followed(raw, tmp_path, out):
    linked = tmp_path / "links"
    linked.mkdir()
    for path in raw.iterdir():
        (linked / path.name).symlink_to(path)
    write_dataset(pairs(linked), out)
    assert not any(p.is_symlink() for p in out.rglob("*"))
    assert (out / "imagesTr" / "a_0000.nii.gz").read_bytes() == (raw / "a_img.nii.gz").read_bytes()
