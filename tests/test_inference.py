"""The predictor and the inference workflow, with networks whose answer is known."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from PIL import Image

from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.inferer import ICLInferer, as_volume
from scripts.networks import Neuroverse3D
from tests.workflows import run_workflow


class LabelAverage(torch.nn.Module):
    """Answers the mean of the context labels, and counts its calls."""

    def __init__(self, grid=(16, 16, 16)):
        super().__init__()
        self.register_buffer("grid", torch.tensor(grid))
        self.calls = []

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.calls.append((tuple(target_in.shape), context_in.shape[1]))
        return context_out.mean(1)


class Copy(LabelAverage):
    """Answers the target's image."""

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.calls.append((tuple(target_in.shape), context_in.shape[1]))
        return target_in


def ball(shape=(16, 16, 16), centre=None, radius=4.0):
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    centre = np.array(shape) / 2 - 0.5 if centre is None else centre
    return (np.linalg.norm(grid - centre, axis=-1) <= radius).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cohorts(folder, cohorts=1, subjects=8, spatial_size=16, num_labels=2, progress=False)
    return folder / "Dataset900_Synthetic000"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network with random weights whose output is above the threshold in about half of the volume."""
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(4, 8), spatial_size=16).eval()
    images, labels, _ = synthesize_cohort(0, subjects=4, spatial_size=16, num_labels=1)
    with torch.no_grad():
        network.target_decoder.output.weight.mul_(50)
        output = network(images[:1], images[None, 1:], labels[None, 1:].float())
        network.target_decoder.output.bias.add_(0.5 - output.median())
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def infer(output_dir, data, weights, **options):
    options = {"dataset_dir": str(data), "context_dir": str(data), "context_size": 3, "device": "cpu"} | options
    run_workflow("inference", output_dir=str(output_dir), checkpoint=str(weights), **options)
    return json.loads((output_dir / "report.json").read_text())


def test_answers_lie_on_the_source_and_are_reported(data, weights, tmp_path):
    report = infer(tmp_path, data, weights)
    assert len(report["cases"]) == 8 and not report["failed"] and len(report["contexts"]) == 3
    for name, case in report["cases"].items():
        source = nib.load(data / "imagesTr" / f"{name}_0000.nii.gz")
        answer = nib.load(tmp_path / f"{name}.nii.gz")
        assert answer.shape == source.shape and np.allclose(answer.affine, source.affine)
        assert answer.get_data_dtype() == np.uint8
        voxels = np.asarray(answer.dataobj)
        assert set(np.unique(voxels)) <= {0, 1, 2}
        for value in (1, 2):
            assert case["volumes_mm3"][str(value)] == pytest.approx((voxels == value).sum())
        assert case["seconds"] > 0 and case["peak_memory_mb"] > 0
        assert Image.open(tmp_path / f"{name}.png").size[0] > 100
        used = {context for contexts in case["contexts"].values() for context in contexts}
        assert name not in used  # the target is never its own context
        assert bool(case["warnings"]) or name not in report["contexts"]
    assert sum(sum(c["volumes_mm3"].values()) for c in report["cases"].values()) > 0
    assert {p.name for p in tmp_path.glob(".*")} <= {".integrity.json", ".neuroverse3d"}


def test_done_cases_are_skipped_only_when_nothing_changed(data, weights, tmp_path):
    infer(tmp_path, data, weights, overlays="false")
    assert not list(tmp_path.glob("*.png"))
    first = sorted(tmp_path.glob("*.nii.gz"))
    first[0].unlink()
    stamps = {p: p.stat().st_mtime_ns for p in first[1:]}
    report = infer(tmp_path, data, weights, overlays="FALSE")
    assert first[0].is_file() and all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    assert len(report["cases"]) == 8
    with pytest.raises(FileExistsError, match="--overwrite true"):
        infer(tmp_path, data, weights, context_size=4)
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())
    infer(tmp_path, data, weights, context_size=4, overwrite=True)
    assert all(p.stat().st_mtime_ns > t for p, t in stamps.items())


def test_properties_may_be_checked_before_the_run(data, weights, tmp_path):
    workflow = ConfigWorkflow(
        "configs/inference.json",
        workflow_type="infer",
        dataset_dir=str(data),
        context_dir=str(data),
        output_dir=str(tmp_path),
        checkpoint=str(weights),
        overlays=False,
        device="cpu",
        align="off",
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    assert len(list(tmp_path.glob("*.nii.gz"))) == 8


def test_a_faulty_target_does_not_stop_the_others(data, weights, tmp_path):
    shutil.copytree(data / "imagesTr", tmp_path / "scans of günther")
    bad = sorted((tmp_path / "scans of günther").iterdir())[0]
    bad.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=f"1 targets were left out: {bad.name.removesuffix('.nii.gz')}"):
        infer(tmp_path / "out", data, weights, dataset_dir=str(tmp_path / "scans of günther"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["cases"]) == 7 and list(report["failed"]) == [bad.name.removesuffix(".nii.gz")]
    assert all(name.endswith("_0000") for name in report["cases"])  # a plain folder: names are kept whole


def test_split_file_separates_targets_from_contexts(data, weights, tmp_path):
    names = sorted(p.name.removesuffix(".nii.gz") for p in (data / "labelsTr").iterdir())
    split = {"train": {data.name: names[:5]}, "val": {data.name: [names[5]]}, "test": {data.name: names[6:]}}
    (tmp_path / "splits.json").write_text(json.dumps(split))
    report = infer(tmp_path / "out", data, weights, split_file=str(tmp_path / "splits.json"), context_size=8)
    assert sorted(report["cases"]) == names[6:] and report["contexts"] == names[:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [1, 9]}, r"labels \[9\] are in none of the 3 contexts, which have \[1, 2\]"),
        ({"context_dir": None}, "--context_dir"),
        ({"dataset_dir": None}, "--dataset_dir"),
        ({"context_size": [2, 3]}, "--context_size must be one number"),
        ({"context_selection": "best"}, "--context_selection must be random, first or similar"),
        ({"task": "detection"}, "--task must be segmentation or generation"),
        ({"channels": [8, 8]}, r"--channels \(8, 8\) contradicts"),
        ({"channel": 3}, "channel 0003"),
    ],
)
def test_bad_input_is_answered_clearly(data, weights, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        infer(tmp_path, data, weights, **options)


def test_weights_missing(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        infer(tmp_path, data, tmp_path / "nowhere.pt")


def test_labels_picks_and_orders(data, weights, tmp_path):
    report = infer(tmp_path, data, weights, labels="[2]", overlays=False)
    assert report["labels"] == [2]
    assert {int(v) for p in tmp_path.glob("*.nii.gz") for v in np.unique(np.asarray(nib.load(p).dataobj))} <= {0, 2}


def test_python_and_workflow_agree(data, weights, tmp_path):
    report = infer(tmp_path, data, weights, context_selection="first", overlays=False)
    predictor = ICLInferer(str(weights), device="cpu", spacing=report["spacing_mm"], align="off")
    images = [data / "imagesTr" / f"{name}_0000.nii.gz" for name in report["contexts"]]
    predictor.set_context(images, [data / "labelsTr" / f"{name}.nii.gz" for name in report["contexts"]])
    name = next(n for n in report["cases"] if n not in report["contexts"])
    answer = predictor.predict(data / "imagesTr" / f"{name}_0000.nii.gz")
    written = nib.load(tmp_path / f"{name}.nii.gz")
    assert np.array_equal(answer[0].numpy(), np.asarray(written.dataobj))
    assert np.allclose(answer.affine, written.affine)


def test_generation_answers_in_the_units_of_the_contexts(tmp_path, weights):
    folder = tmp_path / "Dataset001_Pairs"
    (folder / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        volume = (ball(centre=rng.uniform(6, 10, 3)) + 0.1 * rng.random((16, 16, 16))).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "imagesTr" / f"c{i}_0000.nii.gz")
        nib.save(nib.Nifti1Image(500 + 300 * volume, np.eye(4)), folder / "imagesTr" / f"c{i}_0001.nii.gz")
    report = infer(tmp_path / "out", folder, weights, task="generation", context_label_channel=1)
    assert len(report["cases"]) == 4
    answer = nib.load(tmp_path / "out" / "c0.nii.gz")
    assert answer.get_data_dtype() == np.float32

    predictor = ICLInferer(Copy(), device="cpu", task="generation")
    images = [folder / "imagesTr" / f"c{i}_0000.nii.gz" for i in range(3)]
    predictor.set_context(images, [str(p).replace("_0000", "_0001") for p in images])
    answer = predictor.predict(folder / "imagesTr" / "c3_0000.nii.gz")[0].numpy()
    truth = nib.load(folder / "imagesTr" / "c3_0001.nii.gz").get_fdata()
    assert answer.dtype == np.float32
    assert np.abs(answer - truth).mean() < 10  # of a range of 330


def contexts(count=3, shape=(16, 16, 16)):
    images = [MetaTensor(torch.tensor(10 * ball(shape) + i)[None], affine=torch.eye(4)) for i in range(count)]
    return images, [MetaTensor(torch.tensor(ball(shape))[None], affine=torch.eye(4)) for _ in range(count)]


def test_answer_of_a_known_network_is_the_average_label():
    network = LabelAverage()
    predictor = ICLInferer(network, device="cpu", align="off")
    images, labels = contexts()
    labels[0] = labels[0] * 300  # numbers above 255 need a wider type
    predictor.set_context(images, labels)
    assert predictor.label_values == [1, 300]
    answer = predictor.predict(images[1] + 0.5)
    assert answer.dtype == torch.int16 and answer.shape == (1, 16, 16, 16)
    assert {n for _, n in network.calls} == {1, 2}  # each label uses only the contexts that have it
    assert set(answer.unique().tolist()) == {0, 1}  # ties go to the first label


def test_below_the_threshold_is_background():
    class Faint(LabelAverage):
        def forward(self, *args, **kwargs):
            return 0.49 * super().forward(*args, **kwargs)

    predictor = ICLInferer(Faint(), device="cpu", align="off")
    predictor.set_context(*contexts())
    assert not predictor.predict(contexts()[0][0]).any()


def test_larger_target_is_tiled_and_smaller_one_padded():
    network = Copy()
    predictor = ICLInferer(network, device="cpu", spacing=1.0, align="off")
    predictor.set_context(*contexts())
    large = torch.zeros(1, 40, 20, 9)
    large[:, 25:35, 5:15, 2:7] = 1
    large[:, 0, 0, 0] = 0.3
    answer = predictor.predict(MetaTensor(large, affine=torch.eye(4)))
    assert torch.equal(answer.as_tensor(), (large > 0.5).to(torch.uint8))
    assert {shape for shape, _ in network.calls} == {(1, 1, 16, 16, 16)} and len(network.calls) > 1


def test_target_that_is_a_context_by_content(tmp_path, data):
    images = sorted((data / "imagesTr").iterdir())[:3]
    labels = [data / "labelsTr" / p.name.replace("_0000", "") for p in images]
    nib.save(nib.load(images[0]), tmp_path / "renamed.nii.gz")  # compressed anew, under another name
    network = LabelAverage()
    predictor = ICLInferer(network, device="cpu", align="off")
    predictor.set_context(images, labels)
    predictor.predict(tmp_path / "renamed.nii.gz")
    assert {n for _, n in network.calls} == {2}
    predictor.set_context(images[:1], labels[:1])
    assert not predictor.predict(tmp_path / "renamed.nii.gz").any()  # nothing to learn from


def test_bad_contexts():
    predictor = ICLInferer(LabelAverage(), device="cpu", align="off")
    images, labels = contexts()
    with pytest.raises(ValueError, match="no contexts"):
        predictor.predict(images[0])
    with pytest.raises(ValueError, match="at least one"):
        predictor.set_context([], [])
    with pytest.raises(ValueError, match="got 3 and 2"):
        predictor.set_context(images, labels[:2])
    with pytest.raises(ValueError, match="context 2: image and label differ"):
        predictor.set_context(images, [labels[0], labels[1][:, :-1], labels[2]])
    predictor.set_context(images, [label * 0 for label in labels])
    with pytest.raises(ValueError, match="no label other than background"):
        predictor.predict(images[0])


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((2, 4, 4, 4)), np.zeros((1, 4, 4, 4, 1))])
def test_volumes_of_other_shapes(bad):
    with pytest.raises(ValueError, match="one 3D volume"):
        as_volume(bad)
