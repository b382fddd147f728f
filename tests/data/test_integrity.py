"""What is found in the files: every fault alone, many at once, and the memory of it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from scripts.data import integrity
from scripts.data.integrity import box_and_voxel, inspect_cases, sound_cases
from scripts.data.nnunet import DatasetError, find_datasets

NAMES = ["p1", "p2", "p3", "p4"]


@pytest.fixture(scope="module")
def sound(make_dataset, tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), cases=NAMES, affine=np.diag([1.0, 2.0, 1.5, 1.0]))


@pytest.fixture
def root(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / sound.name)


def inspect(*roots, record=None):
    return inspect_cases([c for root in roots for c in find_datasets(root)[0].cases()], record, workers=1)


def problems(*roots):
    return {case["case"]: case["problems"] for case in inspect(*roots) if case["problems"]}


def image(root, name):
    return root / "imagesTr" / f"{name}_0000.nii.gz"


def label(root, name):
    return root / "labelsTr" / f"{name}.nii.gz"


def rewrite(path, change):
    """Change the file's voxels and affine."""
    source = nib.load(path)
    voxels, affine = change(np.asanyarray(source.dataobj), source.affine)
    nib.save(nib.Nifti1Image(voxels, affine), path)


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flatten_affine(path):
    """Point two axes the same way; lengths stay, for MONAI mends those by itself."""
    source = nib.load(path)
    affine = source.affine.copy()
    affine[:3, 1] = affine[:3, 0] * 2
    header = source.header.copy()
    header.set_sform(affine, code=1)
    header.set_qform(None, code=0)
    nib.save(nib.Nifti1Image(np.asanyarray(source.dataobj), None, header), path)


def set_voxel(value, dtype):
    def change(voxels, affine):
        voxels = voxels.astype(dtype)
        voxels[0, 0, 0] = value
        return voxels, affine

    return change


def shifted(voxels, affine):
    affine = affine.copy()
    affine[0, 3] += 1
    return voxels, affine


FAULTS = {
    "missing label": (lambda r, n: label(r, n).unlink(), "label file is missing"),
    "shape": (
        lambda r, n: rewrite(label(r, n), lambda v, a: (v[:, :, :-1], a)),
        r"differ in shape: \(16, 16, 16\) and \(16, 16, 15\)",
    ),
    "affine": (lambda r, n: rewrite(label(r, n), shifted), "image and label differ in affine"),
    "non-integer label": (
        lambda r, n: rewrite(label(r, n), set_voxel(0.5, np.float32)),
        r"no label numbers: \[0\.5\]",
    ),
    "NaN label": (lambda r, n: rewrite(label(r, n), set_voxel(np.nan, np.float32)), r"no label numbers: \[nan\]"),
    "negative label": (lambda r, n: rewrite(label(r, n), set_voxel(-1, np.int16)), r"no label numbers: \[-1\.0\]"),
    "truncated image": (lambda r, n: cut_short(image(r, n)), r"image .*_0000\.nii\.gz cannot be read \(.*ended.*\)"),
    "truncated label": (lambda r, n: cut_short(label(r, n)), r"label p\d\.nii\.gz cannot be read \(.+\)"),
    "empty file": (lambda r, n: image(r, n).write_bytes(b""), r"image .* cannot be read \(.+\)"),
    "text file": (
        lambda r, n: image(r, n).write_text("no image\n" * 100),
        r"image .*_0000\.nii\.gz cannot be read \(File p2_0000\.nii\.gz is not a gzip file\)",
    ),
    "4D image": (
        lambda r, n: rewrite(image(r, n), lambda v, a: (np.stack([v, v], -1), a)),
        r"image \S+ must be one 3D volume, got shape \(16, 16, 16, 2\)",
    ),
    "2D image": (lambda r, n: rewrite(image(r, n), lambda v, a: (v[:, :, 0], a)), r"image \S+ must be one 3D volume"),
    "NaN image": (lambda r, n: rewrite(image(r, n), set_voxel(np.nan, np.float32)), "image holds NaN or infinite"),
    "infinite image": (lambda r, n: rewrite(image(r, n), set_voxel(np.inf, np.float32)), "image holds NaN or infinite"),
    "constant image": (
        lambda r, n: rewrite(image(r, n), lambda v, a: (np.full_like(v, 7), a)),
        r"image is constant \(every voxel is 7\): is it the right file\?",
    ),
    "absurd spacing": (
        lambda r, n: rewrite(image(r, n), lambda v, a: (v, np.diag([1e-3, 1e-3, 1e-3, 1]) @ a)),
        r"image \S+ has voxels of 0.001 x 0.002 x 0.0015 mm, not within 0.01 to 50 mm: mend the spacing",
    ),
    "one voxel": (
        lambda r, n: rewrite(image(r, n), lambda v, a: (v[:1, :1, :1], a)),
        r"image \S+ must be one 3D volume, got \(1, 1, 1\) voxels",
    ),
    "unknown value": (
        lambda r, n: rewrite(label(r, n), set_voxel(7, np.uint8)),
        r"label values \[7\] are not in dataset\.json",
    ),
    "flat affine": (lambda r, n: flatten_affine(image(r, n)), r"image \S+ has a singular affine"),
}


def test_a_sound_dataset_has_no_problems(sound):
    inspected = inspect(sound)
    assert all(case["problems"] == [] for case in inspected)
    assert sound_cases(inspected) == inspected


def test_what_is_found(sound):
    for case in inspect(sound):
        voxels = np.asanyarray(nib.load(case["label"]).dataobj)
        assert case["values"] == {v: int((voxels == v).sum()) for v in (1, 2)}
        assert len(case["digest"]) == len(case["image_digest"]) == 64
        assert case["voxel_mm"] == [1.0, 2.0, 1.5]
        assert case["extent_mm"] == [16.0, 32.0, 24.0]


def test_images_without_labels(sound):
    targets = [{"image": case["image"], "case": case["case"]} for case in find_datasets(sound)[0].cases()]
    assert all(case["problems"] == [] and case["values"] == {} for case in inspect_cases(targets, workers=1))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_alone(root, fault):
    make, text = FAULTS[fault]
    make(root, "p2")
    found = problems(root)
    assert list(found) == ["p2"] and len(found["p2"]) == 1
    with pytest.raises(DatasetError, match=f"Dataset001_Blobs/p2: .*{text}") as caught:
        sound_cases(inspect(root))
    first, *listing = str(caught.value).splitlines()
    assert "1 of 4 cases" in first and "--skip_bad_cases true" in first
    assert len(listing) == 1, "one line per faulty case"


def test_missing_image_of_a_plain_item(root):
    items = [{"image": str(root / "nowhere.nii.gz"), "label": str(label(root, "p1"))}]
    with pytest.raises(DatasetError, match=r"nowhere\.nii\.gz: image file is missing"):
        sound_cases(inspect_cases(items, workers=1))


def test_all_faulty_cases_are_named_at_once(root):
    for name, fault in zip(["p1", "p2", "p4"], ["missing label", "text file", "affine"], strict=True):
        FAULTS[fault][0](root, name)
    FAULTS["unknown value"][0](root, "p4")
    with pytest.raises(DatasetError) as caught:
        sound_cases(inspect(root))
    first, *listing = str(caught.value).splitlines()
    assert "3 of 4 cases" in first
    assert [line.split(":")[0].strip() for line in listing] == [f"Dataset001_Blobs/{n}" for n in ("p1", "p2", "p4")]
    assert "affine" in listing[-1] and "[7]" in listing[-1]


def test_skipping_goes_on_and_says_so(root, caplog):
    FAULTS["missing label"][0](root, "p1")
    FAULTS["NaN image"][0](root, "p3")
    with caplog.at_level(logging.WARNING):
        kept = sound_cases(inspect(root), skip_bad_cases=True)
    assert [case["case"] for case in kept] == ["p2", "p4"]
    assert "without 2 of 4 cases" in caplog.text and "p1" in caplog.text and "p3: image holds NaN" in caplog.text


def test_skipping_everything_is_an_error(root):
    for name in NAMES:
        FAULTS["missing label"][0](root, name)
    with pytest.raises(DatasetError, match="no sound case"):
        sound_cases(inspect(root), skip_bad_cases=True)


def test_the_same_image_twice_in_a_dataset(root):
    shutil.copy(image(root, "p1"), image(root, "p3"))
    found = problems(root)
    assert list(found) == ["p3"] and "same image as Dataset001_Blobs/p1" in found["p3"][0]


def test_the_same_image_in_two_datasets_is_fine(root, tmp_path):
    other = shutil.copytree(root, tmp_path / "Dataset002_Other")
    assert problems(root, other) == {}


def test_values_are_free_without_dataset_json(root):
    (root / "dataset.json").unlink()
    FAULTS["unknown value"][0](root, "p1")
    assert problems(root) == {}
    assert 7 in inspect(root)[0]["values"]


def test_ignore_label_and_regions_are_known_values(root):
    labels = {"background": 0, "both": [1, 2], "ignore": 7}
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    FAULTS["unknown value"][0](root, "p1")
    assert problems(root) == {}


def test_small_rounding_of_the_affine_is_fine(root):
    rewrite(label(root, "p1"), lambda v, a: (v, a + 1e-4))
    assert problems(root) == {}


@pytest.fixture
def translations(make_dataset, tmp_path):
    """Image and wanted image, as generation takes them."""
    root = make_dataset(tmp_path, cases=NAMES, channels=(0, 1))
    outputs = {case["case"]: case["image"] for case in find_datasets(root)[0].cases(1)}
    return [
        {"image": case["image"], "output": outputs[case["case"]], "case": case["case"]}
        for case in find_datasets(root)[0].cases()
    ]


def test_pairs_of_images(translations):
    first, *others = inspect_cases(translations, workers=1)
    assert all(case["problems"] == [] and case["values"] == {} for case in (first, *others))
    assert first["extent_mm"] == [16.0, 16.0, 16.0]
    alone = inspect_cases([{"image": first["image"]}], workers=1)[0]
    assert alone["digest"] != first["digest"] and alone["image_digest"] == first["image_digest"]


@pytest.mark.parametrize(
    "change, text",
    [
        (set_voxel(np.nan, np.float32), "output holds NaN"),
        (lambda v, a: (v * 0, a), r"output is constant \(every voxel is 0\)"),
        (lambda v, a: (v[1:], a), "image and output differ in shape"),
        (shifted, "image and output differ in affine"),
        (lambda v, a: (v[..., None].repeat(2, -1), a), r"output \S+ must be one 3D volume"),
    ],
)
def test_faulty_outputs(translations, change, text):
    rewrite(translations[2]["output"], change)
    with pytest.raises(DatasetError, match=f"1 of 4 cases(.|\\n)*p3: {text}"):
        sound_cases(inspect_cases(translations, workers=1))


# --- memory


def refuse_reading(monkeypatch):
    def refuse(path):
        raise AssertionError(f"{path} was read again")

    for name in ("load_volume", "load_exact"):
        monkeypatch.setattr(integrity, name, refuse)


def count_reads(monkeypatch):
    read = []
    for name in ("load_volume", "load_exact"):
        reader = getattr(integrity, name)
        monkeypatch.setattr(integrity, name, lambda path, r=reader: read.append(os.path.basename(path)) or r(path))
    return read


def test_second_look_reads_nothing(root, tmp_path, monkeypatch):
    FAULTS["affine"][0](root, "p4")
    first = inspect(root, record=tmp_path / "cache" / "integrity.json")
    refuse_reading(monkeypatch)
    assert inspect(root, record=tmp_path / "cache" / "integrity.json") == first


def test_only_a_changed_file_is_read_again(root, tmp_path, monkeypatch):
    record = tmp_path / "integrity.json"
    before = inspect(root, record=record)
    rewrite(label(root, "p2"), set_voxel(1, np.uint8))
    read = count_reads(monkeypatch)
    after = inspect(root, record=record)
    assert sorted(read) == ["p2.nii.gz", "p2_0000.nii.gz"]
    changed = [a["digest"] != b["digest"] for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]
    assert before[1]["image_digest"] == after[1]["image_digest"]


def test_a_mended_case_is_seen(root, tmp_path):
    record = tmp_path / "integrity.json"
    shutil.copy(label(root, "p1"), tmp_path / "kept.nii.gz")
    label(root, "p1").unlink()
    assert inspect(root, record=record)[0]["problems"]
    shutil.copy(tmp_path / "kept.nii.gz", label(root, "p1"))
    assert not inspect(root, record=record)[0]["problems"]


def test_a_missing_file_is_not_remembered(root, tmp_path):
    record = tmp_path / "integrity.json"
    item = {"image": str(tmp_path / "late.nii.gz")}
    assert inspect_cases([item], record)[0]["problems"]
    shutil.copy(image(root, "p1"), item["image"])
    assert not inspect_cases([item], record)[0]["problems"]


def test_dataset_json_is_not_part_of_the_memory(root, tmp_path):
    record = tmp_path / "integrity.json"
    inspect(root, record=record)
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "first": 1}}))
    assert [case["problems"] for case in inspect(root, record=record)] == [
        ["label values [2] are not in dataset.json"]
    ] * 4


@pytest.mark.parametrize("damage", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", "entries", "facts"])
def test_damaged_record_is_ignored(sound, tmp_path, damage):
    record = tmp_path / "integrity.json"
    first = inspect(sound, record=record)
    if damage == "entries":
        record.write_text(json.dumps(dict.fromkeys(json.loads(record.read_text()), 3)))
    elif damage == "facts":
        record.write_text(json.dumps(dict.fromkeys(json.loads(record.read_text()), {"problems": []})))
    else:
        record.write_bytes(damage)
    assert inspect(sound, record=record) == first
    assert len(json.loads(record.read_text())) == len(NAMES), "and is replaced"


def test_no_record_writes_nothing(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inspect(sound)
    assert list(tmp_path.iterdir()) == []


# --- box


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_box_is_measured_along_the_body_axes(order, flips):
    # 4, 6, 10 voxels of 1, 2, 0.5 mm along R, A, S, stored in any order and direction
    counts, zooms = np.array([4, 6, 10]), np.array([1.0, 2.0, 0.5])
    mask = np.zeros((16, 16, 16), bool)
    mask[tuple(slice(2, 2 + counts[axis]) for axis in order)] = True
    affine = np.eye(4)
    affine[:3, :3] = 0
    for voxel_axis, body_axis in enumerate(order):
        affine[body_axis, voxel_axis] = flips[voxel_axis] * zooms[body_axis]
    assert box_and_voxel(mask, affine)["extent_mm"] == pytest.approx([4, 12, 5])


def test_box_of_an_oblique_image_goes_by_the_nearest_axes():
    angle = np.deg2rad(30)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    mask = np.zeros((12, 12, 12), bool)
    mask[1:9, 2:5, 3:4] = True
    assert box_and_voxel(mask, affine)["extent_mm"] == pytest.approx([8, 3, 1])


def test_box_of_nothing_is_the_whole_grid():
    assert box_and_voxel(np.zeros((4, 5, 6), bool), np.diag([1, 2, 3, 1.0]))["extent_mm"] == [4, 10, 18]


def test_box_holds_labelled_voxels_too(write_nifti, tmp_path):
    voxels, marked = np.zeros((16, 16, 16), np.float32), np.zeros((16, 16, 16), np.uint8)
    voxels[4:8, 4:8, 4:8], marked[6:12, 4:8, 4:8] = 5, 1
    item = {"image": write_nifti(tmp_path / "i.nii.gz", voxels), "label": write_nifti(tmp_path / "l.nii.gz", marked)}
    assert inspect_cases([item])[0]["extent_mm"] == [8.0, 4.0, 4.0]
