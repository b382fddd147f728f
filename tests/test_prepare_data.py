"""The command line of the conversion, one source after the other, up to a dataset that inspects clean."""

from __future__ import annotations

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import DatasetError, find_datasets, find_targets
from scripts.prepare_data import prepare_data
from tests.data.dicom_series import rotation, write_dicom

SIZE = (8, 9, 10)


def scan(seed):
    return np.random.default_rng(seed).integers(0, 900, SIZE).astype(np.int16)


def mask():
    voxels = np.zeros(SIZE, np.uint8)
    voxels[2:4, 3:6, 4:8], voxels[5, 3:6, 4:8] = 1, 2
    return voxels


@pytest.fixture
def raw(tmp_path, write_nifti):
    for i, name in enumerate(("s1", "s2")):
        write_nifti(tmp_path / "raw" / f"{name}_img.nii.gz", scan(i))
        write_nifti(tmp_path / "raw" / f"{name}_gt.nii.gz", mask())
    return tmp_path / "raw"


def clean_cases(data, channel=0):
    (dataset,) = find_datasets(data)
    return dataset, sound_cases(inspect_cases(dataset.cases(channel)))


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "scripts.prepare_data", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- typed


def test_typed_in_full(raw, tmp_path, write_nifti):
    for i, name in enumerate(("s1", "s2")):
        write_nifti(raw / f"{name}_t2.nii.gz", scan(10 + i))
    (tmp_path / "names.json").write_text('{"1": "anterior", "2": "posterior"}')
    done = run(
        *("--input_dir", raw, "--output_dir", tmp_path / "data", "--dataset_name", "MyDataset", "--dataset_id", 7),
        *("--image_pattern", "['*_img.nii.gz','*_t2.nii.gz']", "--mask_pattern", "*_gt.nii.gz"),
        *("--modality", "['T1','T2']", "--label_names", tmp_path / "names.json"),
        *("--dry_run", "false", "--overwrite", "FALSE", "--skip_bad_cases", "False"),
    )
    assert done.returncode == 0, done.stderr
    assert "Dataset007_MyDataset: 2 cases, channels 0000 T1, 0001 T2" in done.stdout
    assert "label 2 posterior: in 2 cases" in done.stdout
    dataset, cases = clean_cases(tmp_path / "data", channel=1)
    assert dataset.name == "Dataset007_MyDataset" and dataset.classes == {"anterior": (1,), "posterior": (2,)}
    assert [case["case"] for case in cases] == ["s1", "s2"]
    content = json.loads((dataset.root / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "T1", "1": "T2"} and content["numTraining"] == 2


def test_typed_patterns_with_a_star_in_front_and_none(raw, tmp_path):
    done = run(
        *("--input_dir", raw, "--output_dir", tmp_path / "data", "--dataset_name", "MyDataset"),
        *("--image_pattern", "*_img.nii.gz", "--mask_pattern", "None", "--modality", "MRI"),
    )
    assert done.returncode == 0, done.stderr
    assert "labelsTr is left out" in done.stdout
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["Dataset001_MyDataset"]


def test_typed_faults_end_with_a_message_and_no_output(raw, tmp_path):
    (raw / "s1_gt.nii.gz").rename(raw / "s3_gt.nii.gz")
    done = run("--input_dir", raw, "--output_dir", tmp_path / "data", "--dataset_name", "MyDataset")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: 2 of 3 cases are faulty")
    assert "s1_img.nii.gz" in done.stderr and "s3_gt.nii.gz" in done.stderr
    assert not (tmp_path / "data").exists()


# --- arguments


def prepare(raw, tmp_path, **options):
    prepare_data(str(raw), str(tmp_path / "data"), "My", **options)
    return tmp_path / "data" / "Dataset001_My"


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "-x", "Dataset003_Foo", "a b", "x\n"])
def test_names_that_are_no_folder_name(raw, tmp_path, name):
    with pytest.raises(ValueError, match="--dataset_name"):
        prepare_data(str(raw), str(tmp_path / "data"), name)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_id": 0}, "--dataset_id"),
        ({"dataset_id": "x"}, "--dataset_id"),
        ({"dataset_id": True}, "--dataset_id"),
        ({"source": "nifti"}, "--source 'nifti' is none of files, decathlon, bids, dicom"),
        ({"series": "T1"}, "--series goes with --source dicom"),
        ({"modality": ["T1", "T2"]}, r"--modality names 2 channels \(T1, T2\), but there are 1"),
        ({"source": "decathlon", "image_pattern": "*.nii.gz"}, "takes no patterns"),
        ({"source": "decathlon", "mask_pattern": "*.nii.gz"}, "takes no patterns"),
        ({"image_pattern": None}, "--image_pattern is empty"),
        ({"dry_run": "perhaps"}, "true or false"),
    ],
)
def test_arguments_that_make_no_sense(raw, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(raw, tmp_path, **options)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"anterior": 1}'])
def test_label_names_that_are_none(raw, tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match="names.json.*: --label_names"):
        prepare(raw, tmp_path, label_names=str(tmp_path / "names.json"))
    with pytest.raises(FileNotFoundError, match="--label_names"):
        prepare(raw, tmp_path, label_names=str(tmp_path / "none.json"))


# --- dry run and re-run


def test_dry_run_prints_the_pairs_and_writes_nothing(raw, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    prepare(raw, tmp_path, dry_run="true")
    assert sorted(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["s1", "s1_img.nii.gz", "s1_gt.nii.gz"] and len(lines) == 3


def test_dry_run_tells_the_faults_as_well(raw, tmp_path, capsys):
    (raw / "s2_gt.nii.gz").unlink()
    with pytest.raises(DatasetError, match="Dataset001_My/s2: no mask"):
        prepare(raw, tmp_path, dry_run=True)
    assert "s1_img.nii.gz" in capsys.readouterr().out and not (tmp_path / "data").exists()
    prepare(raw, tmp_path, dry_run=True, skip_bad_cases="true")


def test_a_second_run_needs_overwrite(raw, tmp_path):
    root = prepare(raw, tmp_path)
    with pytest.raises(FileExistsError, match="--overwrite true"):
        prepare(raw, tmp_path)
    (raw / "s2_gt.nii.gz").unlink()
    (raw / "s2_img.nii.gz").unlink()
    prepare(raw, tmp_path, overwrite="true")
    assert [p.name for p in (root / "imagesTr").iterdir()] == ["s1_0000.nii.gz"]


# --- sources


def test_decathlon(tmp_path, write_nifti, capsys):
    task = tmp_path / "Task01"
    images = {name: np.stack([scan(i), scan(i + 50)], -1) for i, name in enumerate(("tr1", "tr2", "ts1"))}
    for name, voxels in images.items():
        write_nifti(task / f"imagesT{name[1]}" / f"{name}.nii.gz", voxels, np.diag([1, 2, 3, 1]))
    for name in ("tr1", "tr2"):
        write_nifti(task / "labelsTr" / f"{name}.nii.gz", mask(), np.diag([1, 2, 3, 1]))
    (task / "imagesTr" / "._tr1.nii.gz").write_bytes(b"\x00")
    content = {
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "edema", "2": "core", "3": "absent"},
    }
    (task / "dataset.json").write_text(json.dumps(content))
    root = prepare(task, tmp_path, source="decathlon")
    assert "2 cases and 1 test cases, channels 0000 FLAIR, 0001 T1w" in capsys.readouterr().out
    for name, voxels in images.items():
        for channel in range(2):
            found = nib.load(root / f"imagesT{name[1]}" / f"{name}_{channel:04d}.nii.gz")
            assert np.array_equal(np.asanyarray(found.dataobj), voxels[..., channel])
            assert np.array_equal(found.affine, np.diag([1, 2, 3, 1])) and found.get_data_dtype() == np.int16
    assert len(list(root.rglob("*.nii.gz"))) == 8
    dataset, cases = clean_cases(tmp_path / "data")
    assert dataset.classes == {"edema": (1,), "core": (2,)} and len(cases) == 2
    assert json.loads((root / "dataset.json").read_text())["channel_names"] == {"0": "FLAIR", "1": "T1w"}
    assert [target["case"] for target in find_targets(root, channel=1)] == ["ts1"]


def test_decathlon_dry_run_has_both_parts(tmp_path, write_nifti, capsys):
    task = tmp_path / "Task01"
    write_nifti(task / "imagesTr" / "a.nii.gz", scan(0))
    write_nifti(task / "imagesTs" / "b.nii.gz", scan(1))
    (task / "dataset.json").write_text('{"modality": {"0": "MRI"}, "labels": {"0": "background"}}')
    prepare(task, tmp_path, source="decathlon", mask_pattern="None", dry_run=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["a", "imagesTr", "imagesTr/a.nii.gz"], ["b", "imagesTs", "imagesTs/b.nii.gz"]]


def test_bids_with_sessions(tmp_path, write_nifti):
    bids = tmp_path / "bids"
    for i, (subject, session) in enumerate([("01", "a"), ("01", "b"), ("02", "a")]):
        anat, stem = f"sub-{subject}/ses-{session}/anat", f"sub-{subject}_ses-{session}"
        write_nifti(bids / anat / f"{stem}_T1w.nii.gz", scan(i))
        write_nifti(bids / "derivatives" / "manual" / anat / f"{stem}_desc-x_dseg.nii.gz", mask().astype(np.float32))
    root = prepare(bids, tmp_path, source="bids")
    names = ["sub-01_ses-a", "sub-01_ses-b", "sub-02_ses-a"]
    assert [case["case"] for case in clean_cases(tmp_path / "data")[1]] == names
    assert json.loads((root / "dataset.json").read_text())["channel_names"] == {"0": "T1w"}
    assert nib.load(root / "labelsTr" / "sub-01_ses-a.nii.gz").get_data_dtype() == np.uint8


@pytest.mark.parametrize("flipped", [False, True])
def test_oblique_dicom_with_a_mask_of_either_row_order(tmp_path, flipped):
    """The mask marks one voxel whose place in the world is known; converters may number the rows either way."""
    axes, spacing, origin = rotation(12, -25, 40), np.array([0.8, 0.9, 2.5]), np.array([-20.0, 31.0, 5.0])
    marked = np.array([5, 2, 4])
    for i in range(2):
        voxels = scan(i)
        voxels[tuple(marked)] = 3000
        write_dicom(tmp_path / "raw" / f"s{i}", voxels, spacing, axes, origin)
        affine = np.diag([-1, -1, 1, 1]) @ nib.affines.from_matvec(axes * spacing, origin)
        label = np.zeros(SIZE, np.uint8)
        label[tuple(marked)] = 1
        drawn = nib.Nifti1Image(label, affine)
        if flipped:  # the second axis numbered from its other end, and the axes in another order
            drawn = drawn.as_reoriented(np.array([[2, 1], [1, -1], [0, 1]]))
            assert drawn.shape == SIZE[::-1]
        nib.save(drawn, tmp_path / "raw" / f"s{i}.nii.gz")
    root = prepare(tmp_path / "raw", tmp_path, source="dicom", modality="T1")
    dataset, cases = clean_cases(tmp_path / "data")
    world = (origin + axes @ (marked * spacing)) * [-1, -1, 1]
    assert [case["case"] for case in cases] == ["s0", "s1"]
    for case in cases:
        image, label = nib.load(case["image"]), nib.load(case["label"])
        (bright,), (labelled,) = np.argwhere(image.get_fdata() == 3000), np.argwhere(label.get_fdata() == 1)
        for volume, voxel in ((image, bright), (label, labelled)):
            assert np.abs(nib.affines.apply_affine(volume.affine, voxel) - world).max() < 0.01
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
    assert root.is_dir() and dataset.classes == {"label1": (1,)}


def test_dicom_of_another_grid_than_its_mask_is_a_fault(tmp_path, write_nifti):
    write_dicom(tmp_path / "raw" / "s", scan(0))
    write_nifti(tmp_path / "raw" / "s.nii.gz", mask(), np.diag([2, 2, 2, 1]))
    with pytest.raises(DatasetError, match="Dataset001_My/s: image and label differ in affine"):
        prepare(tmp_path / "raw", tmp_path, source="dicom")


def test_dicom_faults_are_named_by_folder_and_series(tmp_path):
    write_dicom(tmp_path / "raw" / "good", scan(0))
    write_dicom(tmp_path / "raw" / "gap", scan(1), missing=(4,), description="Sag T1")
    with pytest.raises(DatasetError, match=r"Dataset001_My/gap: .*raw/gap \('Sag T1'\) lacks slices"):
        prepare(tmp_path / "raw", tmp_path, source="dicom", mask_pattern=None)
    root = prepare(tmp_path / "raw", tmp_path, source="dicom", mask_pattern=None, skip_bad_cases=True)
    assert [p.name for p in (root / "imagesTr").iterdir()] == ["good_0000.nii.gz"]


def test_files_named_to_escape_stay_inside(tmp_path, write_nifti):
    for i, name in enumerate(("x..%2f..%2fevil", "a\\..\\b", "-\u2215up", "$(touch x)", "~root")):
        write_nifti(tmp_path / "raw" / f"{name}_img.nii.gz", scan(i))
    root = prepare(tmp_path / "raw", tmp_path, mask_pattern=None, image_pattern="*_img.nii.gz")
    made = sorted(p.name for p in (root / "imagesTr").iterdir())
    assert len(made) == 5 and not any(name.startswith(("-", ".")) for name in made)
    assert all(p.resolve().parent == (root / "imagesTr").resolve() for p in (root / "imagesTr").iterdir())
    assert not any(set(name) & set("/\\%$()~ \u2215") for name in made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "raw"]
