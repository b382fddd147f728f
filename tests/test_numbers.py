"""Numbers are exact, and damaged data are noticed: through the workflows that people use."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from scripts.data import volumes
from scripts.data.collection import Collection
from scripts.data.conversion import dataset_writer as conversion
from scripts.data.episodes import IGNORED, EpisodeDataset, collate_groups
from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import DatasetError, NnunetDataset
from scripts.data.prepared import PreparedCases
from scripts.data.volumes import VolumeError, load_labels, load_volume
from scripts.inferer import ICLInferer
from scripts.losses import MaskImageLoss, SmoothL3L1Loss
from scripts.networks import Neuroverse3D
from scripts.prepare_data import prepare_data
from scripts.training.engine import leave_out_ignored, prepare_episode
from tests.workflows import SMALL, run_workflow

BIG = (312782546, 312782550)
"""Neighbours in the Allen brain atlas; as float32 both are 312782560."""


@pytest.fixture
def change_labels():
    """``change_labels(root, change)``: replace every label file of a dataset by ``change(voxels, image)``."""

    def change_all(root, change):
        for path in sorted((root / "labelsTr").iterdir()):
            image = nib.load(path)
            nib.save(change(np.asanyarray(image.dataobj), image), path)

    return change_all


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network that answers 1 everywhere."""
    network = Neuroverse3D(channels=(4, 8), spatial_size=16)
    state = network.state_dict()
    state["target_decoder.output.weight"].zero_()
    state["target_decoder.output.bias"].fill_(1)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def infer(weights, tmp_path):
    """``infer(targets, contexts, **options) -> report``."""

    def run(targets, contexts, **options):
        fixed = {"context_size": 2, "device": "cpu", "overlays": False}
        paths = {"dataset_dir": str(targets), "context_dir": str(contexts), "checkpoint": str(weights)}
        run_workflow("inference", output_dir=str(tmp_path / "out"), **fixed | paths | options)
        return json.loads((tmp_path / "out" / "report.json").read_text())

    return run


@pytest.fixture
def evaluate(tmp_path):
    """``evaluate(predictions, references, **options) -> rows``."""

    def run(predictions, references, **options):
        paths = {"prediction_dir": str(predictions), "reference_dir": str(references)}
        run_workflow("evaluate", output_dir=str(tmp_path / "scores"), **paths | options)
        with (tmp_path / "scores" / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def labelled(values, image):
    return nib.Nifti1Image(values, image.affine)


def values_of(path):
    return set(np.unique(np.asanyarray(nib.load(path).dataobj)).tolist())


# --- label values


def big(values, image):
    return labelled(np.select([values == 1, values == 2], BIG).astype(np.uint32), image)


def test_large_label_values_keep_their_integers(make_dataset, change_labels, infer, tmp_path):
    root = make_dataset(tmp_path / "data", labels={"background": 0, "first": BIG[0], "second": BIG[1]})
    change_labels(root, big)
    report = infer(root / "imagesTr" / "case_00_0000.nii.gz", root, overlays=True, refine=True)
    (case,) = report["cases"].values()
    assert {int(label) for label in case["volumes_mm3"]} == set(BIG)
    assert values_of(next((tmp_path / "out").glob("*.nii.gz"))) - {0} == {BIG[0]}  # of equals the first wins

    run_workflow("train_stage1", dataset_dir=str(root), output_dir=str(tmp_path / "run"), **SMALL)
    assert (tmp_path / "run" / "stage1" / "model.pt").is_file()


def test_a_training_mask_holds_one_of_two_large_values(make_dataset, change_labels, tmp_path):
    root = make_dataset(tmp_path / "data", labels={"background": 0, "first": BIG[0], "second": BIG[1]})
    small = make_dataset(tmp_path / "small")
    change_labels(root, big)
    parts = [
        EpisodeDataset.from_folder(
            str(folder), "train", spatial_size=16, cache_dir=str(folder / "cache"), max_classes=1
        )
        for folder in (root, small)
    ]
    for number in range(4):
        assert torch.equal(*(part.make(number)["label"] for part in parts))


def test_large_label_values_are_evaluated_apart(write_nifti, evaluate, tmp_path):
    voxels = np.zeros((8, 8, 8), np.int32)
    voxels[:3], voxels[5:] = 16777217, 16777216
    write_nifti(tmp_path / "r" / "a.nii.gz", voxels)
    write_nifti(
        tmp_path / "p" / "a.nii.gz",
        np.select([voxels == 16777217, voxels == 16777216], [16777216, 16777217]).astype(np.int32),
    )
    assert [row["dice"] for row in evaluate(tmp_path / "p", tmp_path / "r")] == ["0.0", "0.0"]
    write_nifti(tmp_path / "r" / "a.nii.gz", np.where(voxels, np.uint32(4294967295), np.uint32(0)))
    write_nifti(tmp_path / "p" / "a.nii.gz", np.where(voxels, 4294967295.0, 0.0))
    rows = evaluate(tmp_path / "p", tmp_path / "r", overwrite=True)  # would not fit into memory as a list of labels
    assert [(row["label"], row["dice"]) for row in rows] == [("4294967295", "1.0")]


def test_what_is_too_large_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), 2**32, np.int64), np.eye(4), dtype=np.int64), tmp_path / "a.nii.gz")
    with pytest.raises(VolumeError, match=r"a\.nii\.gz holds the label number 4294967296, above 4294967295: renumber"):
        load_labels(tmp_path / "a.nii.gz")


def test_large_label_values_are_converted(write_nifti, tmp_path):
    rng = np.random.default_rng(0)
    for kind, name in ((np.uint32, "a"), (np.float64, "b")):
        voxels = np.zeros((8, 8, 8), kind)
        voxels[:3], voxels[5:] = BIG
        write_nifti(tmp_path / "raw" / f"{name}_img.nii.gz", rng.integers(0, 99, (8, 8, 8)).astype(np.int16))
        write_nifti(tmp_path / "raw" / f"{name}_gt.nii.gz", voxels)
    prepare_data(
        str(tmp_path / "raw"), str(tmp_path / "data"), "Big", image_pattern="*_img.nii.gz", mask_pattern="*_gt.nii.gz"
    )
    (root,) = (tmp_path / "data").glob("Dataset*")
    assert set(json.loads((root / "dataset.json").read_text())["labels"].values()) == {0, *BIG}
    for path in (root / "labelsTr").iterdir():
        assert values_of(path) == {0, *BIG}


@pytest.mark.parametrize(("off", "accepted"), [(1.5e-5, True), (9e-4, True), (2e-3, False), (0.5, False)])
def test_nearly_whole_label_values_are_rounded_everywhere(
    make_dataset, change_labels, evaluate, tmp_path, off, accepted
):
    root = make_dataset(tmp_path / "data")
    shutil.copytree(root / "labelsTr", tmp_path / "whole")
    change_labels(root, lambda values, image: labelled(np.where(values, values + off, 0).astype(np.float64), image))
    faults = [case["problems"] for case in inspect_cases(NnunetDataset.read(root).cases())]
    assert all(not found if accepted else "no label numbers" in found[0] for found in faults)
    icl = ICLInferer(Neuroverse3D(channels=(4, 8), spatial_size=16), device="cpu", align="off")
    pair = [[str(root / "imagesTr" / "case_00_0000.nii.gz")], [str(root / "labelsTr" / "case_00.nii.gz")]]
    if accepted:
        assert {row["dice"] for row in evaluate(root / "labelsTr", tmp_path / "whole")} == {"1.0"}
        icl.set_context(*pair)
        assert icl.label_values == [1, 2]
    else:
        with pytest.raises(ValueError, match="no label numbers"):
            evaluate(root / "labelsTr", tmp_path / "whole")
        with pytest.raises(ValueError, match="no label numbers"):
            icl.set_context(*pair)


def test_a_scaling_factor_leaves_labels_what_they_are(make_dataset, change_labels, tmp_path):
    def scaled(values, image):
        header = image.header.copy()
        header.set_data_dtype(np.uint16)
        return nib.Nifti1Image(values.astype(np.float64), image.affine, header)

    root = make_dataset(tmp_path / "data")
    before = [case["values"] for case in inspect_cases(NnunetDataset.read(root).cases())]
    change_labels(root, scaled)
    assert not float(nib.load(root / "labelsTr" / "case_00.nii.gz").get_fdata().max()).is_integer()
    after = inspect_cases(NnunetDataset.read(root).cases())
    assert [case["values"] for case in after] == before and not any(case["problems"] for case in after)


# --- nnU-Net's ignore label


@pytest.fixture
def partly_ignored(make_dataset, change_labels, tmp_path):
    """A dataset of which every second slice is to be ignored, and the labels without that."""
    root = make_dataset(tmp_path / "data", labels={"background": 0, "first": 1, "second": 2, "ignore": 3})
    shutil.copytree(root / "labelsTr", tmp_path / "whole")

    def ignore(values, image):
        values[:, :, ::2] = 3
        return labelled(values, image)

    change_labels(root, ignore)
    return root, tmp_path / "whole"


def test_ignored_voxels_are_not_evaluated(partly_ignored, evaluate, tmp_path):
    root, whole = partly_ignored
    rows = evaluate(whole, root / "labelsTr")
    assert {row["label"] for row in rows} == {"1", "2"}
    assert {(row["dice"], row["hd95_mm"], row["nsd_1mm"]) for row in rows} == {("1.0", "0.0", "1.0")}
    assert all(row["reference_volume_mm3"] == row["predicted_volume_mm3"] for row in rows)
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["ignored_labels"] == [3]
    with pytest.raises(ValueError, match="to be ignored"):
        evaluate(whole, root / "labelsTr", labels=[3], overwrite=True)
    shutil.copytree(root / "labelsTr", tmp_path / "elsewhere")
    rows = evaluate(whole, tmp_path / "elsewhere", ignore_label=3, overwrite=True)
    assert {row["dice"] for row in rows} == {"1.0"}


def test_ignored_voxels_are_in_no_training_loss(partly_ignored, tmp_path):
    root, _ = partly_ignored
    data = EpisodeDataset.from_folder(
        str(root), "train", spatial_size=16, cache_dir=str(tmp_path / "cache"), context_size=2, augment=True
    )
    for number in range(6):
        group = collate_groups([data[number]])
        assert set(group["label"].unique().tolist()) <= {0, 1, IGNORED} and (group["label"] == IGNORED).any()
        _, label, _, contexts = prepare_episode(group)
        assert contexts["context_out"].max() <= 1
        pred = torch.rand_like(label, requires_grad=True)
        for loss in (SmoothL3L1Loss(), MaskImageLoss()):
            (gradient,) = torch.autograd.grad(loss(*leave_out_ignored(group, pred, label)), pred)
            assert not gradient[label == IGNORED].any() and gradient[label != IGNORED].any()
        perfect = torch.where(label == IGNORED, 1 - label.clamp(0, 1), label)
        assert SmoothL3L1Loss()(*leave_out_ignored(group, perfect, label)) == 0
    run_workflow("train_stage1", dataset_dir=str(root), output_dir=str(tmp_path / "run"), **SMALL)
    rows = list(csv.DictReader((tmp_path / "run" / "stage1" / "metrics.csv").open()))
    assert all(np.isfinite(float(row["train_loss"])) for row in rows if row.get("train_loss"))


def test_the_self_test_leaves_ignored_voxels_out(partly_ignored, infer):
    root, _ = partly_ignored
    report = infer(root / "imagesTr" / "case_00_0000.nii.gz", root, self_test=True, context_size=3)
    # the network answers 1 everywhere, so the first label wins everywhere: its Dice goes by the voxels that count
    (case,) = report["cases"].values()
    assert "3" not in case["volumes_mm3"]
    found = report["self_test"]["contexts"]
    for name, dice in found.items():
        values = np.asanyarray(nib.load(root / "labelsTr" / f"{name}.nii.gz").dataobj)
        image = np.asanyarray(nib.load(root / "imagesTr" / f"{name}_0000.nii.gz").dataobj)
        assert image.shape == values.shape == (16, 16, 16)  # as the grid
        truth, counted = values == 1, values != 3
        assert dice["1"] == pytest.approx(2 * truth.sum() / (truth.sum() + counted.sum()), abs=2e-3)


# --- where voxels are


@pytest.mark.parametrize(("degrees", "size", "same"), [(0.57, 200, False), (0.02, 200, True), (0.4, 8, True)])
def test_grids_are_the_same_by_their_corners(write_nifti, evaluate, tmp_path, degrees, size, same):
    angle = np.deg2rad(degrees)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    voxels = np.zeros((size, size, 4), np.uint8)
    voxels[-3:, -3:] = 1
    write_nifti(tmp_path / "r" / "a.nii.gz", voxels)
    write_nifti(tmp_path / "p" / "a.nii.gz", voxels, turned)
    if same:
        assert evaluate(tmp_path / "p", tmp_path / "r")[0]["dice"] == "1.0"
        return
    with pytest.raises(
        ValueError, match=r"affine differs from the reference's: their corners lie up to 2\.\d+ mm apart"
    ):
        evaluate(tmp_path / "p", tmp_path / "r")


def test_a_voxel_size_one_percent_off_is_another_grid(make_dataset, change_labels, tmp_path):
    root = make_dataset(tmp_path / "data", size=(32, 32, 32))
    change_labels(root, lambda v, image: nib.Nifti1Image(v, np.diag([1.01, 1.01, 1.01, 1]) @ image.affine))
    for case in inspect_cases(NnunetDataset.read(root).cases()):
        assert "image and label differ in affine: their corners lie up to 0.5" in case["problems"][0]


def test_one_slice_is_measured_in_its_plane(write_nifti, evaluate, tmp_path):
    y, x = np.mgrid[:140, :140]
    for axis in range(3):
        for folder, radius in (("r", 60), ("p", 54)):
            disc = (np.hypot(x - 70, y - 70) <= radius).astype(np.uint8)
            write_nifti(tmp_path / folder / f"{axis}.nii.gz", np.expand_dims(disc, axis))
    rows = evaluate(tmp_path / "p", tmp_path / "r")
    assert len(rows) == 3
    for row in rows:
        assert float(row["nsd_1mm"]) == 0 and 6 <= float(row["hd95_mm"]) < 6.5


@pytest.mark.parametrize(("units", "factor"), [("micron", 1000.0), ("meter", 0.001)])
def test_units_of_length_are_applied_and_kept(make_dataset, infer, tmp_path, units, factor):
    in_mm = make_dataset(tmp_path / "mm", affine=np.diag([0.5, 0.5, 0.5, 1]))
    other = shutil.copytree(in_mm, tmp_path / "other")
    for path in other.glob("*Tr/*.nii.gz"):
        image = nib.load(path)
        changed = nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([factor, factor, factor, 1]) @ image.affine)
        changed.header.set_xyzt_units(units)
        nib.save(changed, path)
    scan = other / "imagesTr" / "case_00_0000.nii.gz"
    (here,) = infer(scan, other)["cases"].values()  # contexts and target in this unit
    answer = nib.load(next((tmp_path / "out").glob("*.nii.gz")))
    assert answer.header.get_xyzt_units()[0] == units and np.allclose(answer.affine, nib.load(scan).affine)
    assert np.allclose(load_volume(scan).affine, np.diag([0.5, 0.5, 0.5, 1]))
    shutil.rmtree(tmp_path / "out")
    (there,) = infer(scan, in_mm)["cases"].values()  # contexts in mm
    assert here["volumes_mm3"] == there["volumes_mm3"] and max(here["volumes_mm3"].values()) == 16**3 / 8


def test_labels_along_other_axes_are_reordered_and_that_is_said(make_dataset, change_labels, infer, tmp_path, capfd):
    root = make_dataset(tmp_path / "data", size=(16, 12, 10), affine=np.diag([1.0, 1.1, 1.2, 1]))
    plain = shutil.copytree(root, tmp_path / "plain" / root.name)
    lps = axcodes2ornt("SPL")
    change_labels(root, lambda v, image: image.as_reoriented(ornt_transform(io_orientation(image.affine), lps)))
    assert np.asanyarray(nib.load(root / "labelsTr" / "case_00.nii.gz").dataobj).shape == (10, 12, 16)
    infer(plain / "imagesTr" / "case_00_0000.nii.gz", root)
    said = [line for line in "".join(capfd.readouterr()).splitlines() if "other axes" in line]
    assert len(said) == 1 and "6 of 6 cases" in said[0] and "without loss" in said[0]
    parts = [
        EpisodeDataset.from_folder(str(folder), "train", spatial_size=16, cache_dir=str(folder / "cache"))
        for folder in (root, plain)
    ]
    for number in range(3):
        assert torch.equal(*(part.make(number)["label"] for part in parts))


def test_prepare_data_writes_labels_on_their_images_axes(make_dataset, change_labels, tmp_path):
    root = make_dataset(tmp_path / "raw", size=(16, 12, 10))
    expected = {p.name: np.asanyarray(nib.load(p).dataobj) for p in (root / "labelsTr").iterdir()}
    lps = axcodes2ornt("LPS")
    change_labels(root, lambda v, image: image.as_reoriented(ornt_transform(io_orientation(image.affine), lps)))
    patterns = {"image_pattern": "imagesTr/*_0000.nii.gz", "mask_pattern": "labelsTr/*.nii.gz"}
    prepare_data(str(root), str(tmp_path / "data"), "Turned", **patterns)
    (made,) = (tmp_path / "data").glob("Dataset*")
    for path in (made / "labelsTr").iterdir():
        assert np.array_equal(np.asanyarray(nib.load(path).dataobj), expected[path.name])
        assert np.allclose(nib.load(path).affine, np.eye(4))


def test_answers_given_as_arrays_may_lie_along_other_axes_too(make_dataset, tmp_path):
    root = make_dataset(tmp_path / "data", size=(16, 12, 10))
    image, label = (load_volume(next((root / part).iterdir())) for part in ("imagesTr", "labelsTr"))
    turned = MetaTensor(label.as_tensor().flip(1), affine=torch.as_tensor(np.diag([-1.0, 1, 1, 1])))
    turned.affine[0, 3] = 15
    icl = ICLInferer(Neuroverse3D(channels=(4, 8), spatial_size=16), device="cpu", align="off")
    icl.set_context([image], [turned])
    assert torch.equal(icl.context.native(0)[1].as_tensor().float(), label.as_tensor())


# --- damage


def test_flipped_bits_of_compressed_files_are_noticed(make_dataset, tmp_path, record_property):
    root = make_dataset(tmp_path / "data")
    path = root / "labelsTr" / "case_00.nii.gz"
    rng = np.random.default_rng(0)
    counts = {"noticed": 0, "voxels as they were": 0}
    for source in (path, root / "imagesTr" / "case_00_0000.nii.gz"):
        whole, content = load_volume(source), source.read_bytes()
        for place in rng.integers(0, 8 * len(content), 300):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << (place % 8)
            source.write_bytes(bytes(damaged))
            try:
                read = load_volume(source)
            except VolumeError as error:
                assert str(source) in str(error) and "\n" not in str(error)
                counts["noticed"] += 1
            else:  # a flip in the gzip header's own fields, such as the time
                assert torch.equal(read.as_tensor(), whole.as_tensor()) and torch.equal(read.affine, whole.affine)
                counts["voxels as they were"] += 1
        source.write_bytes(content)
    record_property("flips", counts)
    assert counts["noticed"] > 500


def test_a_damaged_context_ends_the_run_and_a_damaged_reference_the_evaluation(make_dataset, infer, evaluate, tmp_path):
    root = make_dataset(tmp_path / "data")
    shutil.copytree(root / "labelsTr", tmp_path / "whole")
    path = root / "labelsTr" / "case_00.nii.gz"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum, which nibabel does not look at
    path.write_bytes(bytes(content))
    assert nib.load(path).get_fdata().any()
    with pytest.raises(
        DatasetError, match=r"case_00: label case_00\.nii\.gz cannot be read \(damaged: CRC check failed"
    ):
        infer(root / "imagesTr" / "case_01_0000.nii.gz", root)
    with pytest.raises(ValueError, match=r"case_00: case_00\.nii\.gz cannot be read \(damaged"):
        evaluate(tmp_path / "whole", root / "labelsTr")
    with pytest.raises(DatasetError, match=r"case_00: label .* cannot be read \(damaged"):
        run_workflow("train_stage1", dataset_dir=str(root), output_dir=str(tmp_path / "run"), **SMALL)


def test_damaged_4d_files_are_not_split(write_nifti, tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (8, 8, 8, 2)).astype(np.int16)
    path = write_nifti(tmp_path / "raw" / "a_img.nii.gz", voxels)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(VolumeError, match=r"a_img\.nii\.gz cannot be read \(damaged: CRC check failed"):
        conversion._split(path, [tmp_path / "0.nii.gz", tmp_path / "1.nii.gz"])


@pytest.mark.parametrize(("tail", "accepted"), [("member", True), ("zeros", True), ("garbage", False), ("bad", False)])
def test_what_is_behind_the_first_member_is_looked_at(write_nifti, tmp_path, tail, accepted):
    path = write_nifti(tmp_path / "a.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    member = bytearray(gzip.compress(b"x" * 100))
    if tail == "bad":
        member[-5] ^= 4
    more = {"zeros": bytes(64), "garbage": b"no gzip member"}.get(tail, bytes(member))
    path.write_bytes(path.read_bytes() + more)
    if accepted:
        assert load_volume(path).sum() == 2016
        return
    with pytest.raises(VolumeError, match=r"a\.nii\.gz cannot be read"):
        load_volume(path)


def test_voxels_of_several_members_are_read(write_nifti, tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    content = path.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    assert torch.equal(load_volume(tmp_path / "b.nii.gz").as_tensor(), load_volume(path).as_tensor())


def test_more_than_the_memory_holds_is_set_aside_before_it_is_read(make_dataset, infer, tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "data")
    targets = tmp_path / "targets"
    targets.mkdir()
    shutil.copy(root / "imagesTr" / "case_00_0000.nii.gz", targets / "a.nii.gz")
    header = nib.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((300, 300, 300))
    header["vox_offset"] = 352
    (targets / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4 + 300**3)))
    monkeypatch.setattr(volumes, "free_host_memory", lambda: 100 * 2**20)
    with pytest.raises(Exception, match=r"b\.nii\.gz needs 0\.1 GiB of memory for its 300 x 300 x 300 voxels"):
        infer(targets, root)
    assert (tmp_path / "out" / "a.nii.gz").is_file(), "the others are answered"
    (targets / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(100)))
    with pytest.raises(VolumeError, match=r"b\.nii\.gz cannot be read \(it ended early: its header promises 27000000"):
        load_volume(targets / "b.nii.gz")


# --- the cache


@pytest.fixture
def prepared(make_dataset, tmp_path):
    """``prepared(root=None) -> PreparedCases`` of a dataset, checked."""
    made = make_dataset(tmp_path / "data")

    def prepare_cases():
        cases = NnunetDataset.read(made).cases()
        found = PreparedCases({"train": cases}, (16, 16, 16), str(tmp_path / "cache"))
        found.prepare()
        return found, [case for group in found.cases["train"].values() for case in group]

    return prepare_cases


def test_a_case_replaced_after_the_check_never_gets_into_the_cache(prepared, rewrite, tmp_path):
    found, cases = prepared()
    kept = shutil.copy(cases[0]["image"], tmp_path / "kept.nii.gz")
    rewrite(cases[0]["image"], lambda voxels: voxels + np.int16(1))
    with pytest.raises(DatasetError, match=r"Dataset001_Blobs/case_00: .*case_00_0000\.nii\.gz.* replaced since"):
        found.load(cases[0])
    assert not list((tmp_path / "cache").glob("*.pt"))
    shutil.copy(kept, cases[0]["image"])
    assert found.load(cases[0])[0].shape == (1, 16, 16, 16)


def test_a_context_replaced_after_the_check_is_refused(make_dataset, rewrite, weights, tmp_path):
    root = make_dataset(tmp_path / "data")
    image, label = str(root / "imagesTr" / "case_00_0000.nii.gz"), str(root / "labelsTr" / "case_00.nii.gz")
    icl = ICLInferer(str(weights), device="cpu", align="off")
    icl.set_context([image], [label])
    rewrite(label, lambda voxels: np.roll(voxels, 1, 0))
    with pytest.raises(VolumeError, match="replaced since it was checked"):
        icl.context.native(0)


def test_a_case_deleted_during_training_is_named(prepared):
    found, cases = prepared()
    os.remove(cases[2]["label"])
    with pytest.raises(DatasetError, match=r"Dataset001_Blobs/case_02: .*case_02\.nii\.gz is missing") as caught:
        found.load(cases[2])
    assert "\n" not in str(caught.value)


def test_damaged_cache_files_are_made_again(prepared, tmp_path, record_property):
    found, cases = prepared()
    whole, entries = [], []
    for case in cases:
        whole.append(found.load(case))
        entries += [path for path in (tmp_path / "cache").glob("*.pt") if path not in entries]
    assert len(entries) == len(cases)
    rng = np.random.default_rng(0)
    counts = {"remade": 0, "harmless": 0}
    for turn in range(60):
        path, case, (image, label) = (of[turn % len(cases)] for of in (entries, cases, whole))
        content = path.read_bytes()
        damaged = bytearray(content)
        kind = turn % 5
        places = rng.integers(0, len(content), 40 if kind == 1 else 1)
        if kind == 2:
            damaged = damaged[: places[0]]
        elif kind == 3:
            damaged[places[0] : places[0] + 64] = bytes(64)
        elif kind == 4:  # of the description at the front, which pickle reads
            damaged[rng.integers(0, 900)] ^= 1 << int(rng.integers(8))
        else:
            for place in places:
                damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        again = found.load(case)
        assert torch.equal(again[0], image) and torch.equal(again[1], label)
        counts["harmless" if path.read_bytes() == bytes(damaged) else "remade"] += 1
        path.write_bytes(content)
    record_property("entries", counts)
    assert counts["remade"] > 40


def test_a_damaged_record_is_never_believed(prepared, tmp_path, record_property):
    prepared()
    record = tmp_path / "cache" / "integrity.json"
    content, rng = record.read_bytes(), np.random.default_rng(0)
    cases = Collection(str(tmp_path / "data"), str(tmp_path / "cache"), seed=0).part("train")
    expected = inspect_cases(list(cases), None)
    for turn in range(24):
        damaged = bytearray(content)
        if turn % 3 == 2:
            damaged = damaged[: rng.integers(0, len(content))]
        else:
            damaged[rng.integers(0, len(content))] ^= 1 << int(rng.integers(8))
        record.write_bytes(bytes(damaged))
        assert inspect_cases(list(cases), record) == expected
    record_property("records", 24)
