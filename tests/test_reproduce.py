"""Manifests of runs, and runs repeated from them."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.reproduce import compare, differences, reproduce
from scripts.runtime.manifest import MANIFEST
from scripts.runtime.output_folder import file_sha256
from tests.workflows import SMALL, run_workflow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Data, a training run that was resumed, and an inference run with its weights."""
    folder = tmp_path_factory.mktemp("runs")
    write_cohorts(folder / "data", cohorts=1, subjects=8, spatial_size=16, num_labels=2, progress=False)
    options = SMALL | {"dataset_dir": str(folder / "data"), "output_dir": str(folder / "out"), "val_fraction": 0.3}
    run_workflow("train_stage1", **options | {"epochs": 1})
    run_workflow("train_stage1", **options, resume=True)
    dataset = folder / "data" / "Dataset900_Synthetic000"
    shutil.copytree(dataset / "imagesTr", folder / "targets")
    for extra in sorted((folder / "targets").iterdir())[2:]:
        extra.unlink()
    run_workflow(
        "inference",
        dataset_dir=str(folder / "targets"),
        context_dir=str(dataset),
        checkpoint=str(folder / "out" / "stage1" / "model.pt"),
        output_dir=str(folder / "answers"),
        context_size=2,
        device="cpu",
    )
    return folder


def manifest_of(run):
    return json.loads((run / MANIFEST).read_text())


def test_the_manifest_says_what_a_run_was_made_from_and_with(runs):
    found = manifest_of(runs / "out" / "stage1")
    assert found["bundle"]["version"] == json.loads(open("configs/metadata.json").read())["version"]
    assert found["seed"] == 0 and found["weights"] is None and found["data"]["cases"] == 8
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == torch.get_num_threads() and found["environment"]["device"] == "cpu"
    assert found["options"]["spatial_size"] == [16, 16, 16] and found["options"]["epochs"] == 2
    (earlier,) = found["earlier"]
    assert earlier["options"]["epochs"] == 1 and "earlier" not in earlier


def test_the_manifest_of_inference_names_its_weights(runs):
    weights = manifest_of(runs / "answers")["weights"]
    assert weights["sha256"] == file_sha256(runs / "out" / "stage1" / "model.pt")


def test_the_listing_follows_the_data(runs, tmp_path):
    shutil.copytree(runs / "data", tmp_path / "data")
    image = sorted((tmp_path / "data" / "Dataset900_Synthetic000" / "imagesTr").iterdir())[0]
    loaded = nib.load(image)
    nib.save(nib.Nifti1Image(np.asanyarray(loaded.dataobj) * 2, loaded.affine), image)
    options = SMALL | {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path), "val_fraction": 0.3}
    run_workflow("train_stage1", **options | {"epochs": 1})
    changed, before = (manifest_of(run)["data"] for run in (tmp_path / "stage1", runs / "out" / "stage1"))
    assert changed["cases"] == before["cases"] and changed["listing_sha256"] != before["listing_sha256"]


def test_a_training_run_is_repeated_bit_by_bit(runs, tmp_path, capfd):
    reproduce(str(runs / "out" / "stage1"), str(tmp_path / "again"))
    assert "3 results are identical" in capfd.readouterr().out
    with pytest.raises(FileExistsError, match="--output_dir"):
        reproduce(str(runs / "out" / "stage1"), str(tmp_path / "again"))


def test_an_inference_run_is_repeated_bit_by_bit_and_a_change_is_seen(runs, tmp_path, capfd):
    shutil.copytree(runs / "answers", tmp_path / "answers")
    answer = sorted((tmp_path / "answers").glob("*.nii.gz"))[0]
    loaded = nib.load(answer)
    voxels = np.asanyarray(loaded.dataobj).copy()
    voxels[0, 0, 0] += 1
    nib.save(nib.Nifti1Image(voxels, loaded.affine, loaded.header), answer)
    with pytest.raises(ValueError, match=f"1 of 2 results differ .{answer.name}"):
        reproduce(str(tmp_path / "answers"), str(tmp_path / "again"))
    assert f"{answer.name}: differs by" in capfd.readouterr().out


def test_runs_that_cannot_be_repeated(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*manifest\.json"):
        reproduce(str(tmp_path), str(tmp_path / "new"))
    shutil.copytree(runs / "answers", tmp_path / "answers")

    def change(**parts):
        content = manifest_of(runs / "answers") | parts
        (tmp_path / "answers" / MANIFEST).write_text(json.dumps(content))

    def refuse(error, match):
        with pytest.raises(error, match=match):
            reproduce(str(tmp_path / "answers"), str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()

    weights = manifest_of(runs / "answers")["weights"]
    change(weights=weights | {"sha256": "0"})
    refuse(ValueError, "SHA-256 differs")
    change(weights=weights | {"file": str(tmp_path / "gone.pt")})
    refuse(FileNotFoundError, "gone.pt")
    change(environment=manifest_of(runs / "answers")["environment"] | {"processes": 2})
    refuse(ValueError, "torchrun")
    config = manifest_of(runs / "answers")["config"]
    bundle = {"name": "Neuroverse3D", "version": "0.2.0", "revision": "abc"}
    moved = {"run": {"_target_": "scripts.inference_run.InferenceRun"}}
    change(bundle=bundle, config=config | moved)
    refuse(ValueError, r"version 0\.2\.0 \(revision abc\) and names scripts\.inference_run\.InferenceRun, .*revision$")
    change(bundle=bundle, config=config | {"imports": ["$from scripts.inferer import SavedAnswers"]})
    refuse(ValueError, r"names scripts\.inferer\.SavedAnswers, which is not in version ")
    change()
    content = manifest_of(runs / "out" / "stage1")
    content["earlier"][0]["options"]["learning_rate"] = 1.0
    shutil.copytree(runs / "out" / "stage1", tmp_path / "stage1")
    (tmp_path / "stage1" / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other values of learning_rate"):
        reproduce(str(tmp_path / "stage1"), str(tmp_path / "new"))


def test_weights_are_compared_by_distance_and_missing_results_are_named(runs, tmp_path):
    run = runs / "out" / "stage1"
    shutil.copytree(run, tmp_path / "other")
    state = torch.load(run / "model.pt", weights_only=True)
    key = "target_encoder.embedding.weight"
    torch.save(state | {key: state[key] * 1.5}, tmp_path / "other" / "model.pt")
    distances = {name: distance for name, distance, _ in compare(run, tmp_path / "other", training=True)}
    assert 0 < distances["model.pt"] < 1 and distances["last.pt"] == distances["metrics.csv"] == 0
    (tmp_path / "other" / "last.pt").unlink()
    with pytest.raises(ValueError, match=r"last\.pt is missing"):
        list(compare(run, tmp_path / "other", training=True))


def test_differences_name_packages_and_device(runs, monkeypatch):
    found = manifest_of(runs / "answers")
    monkeypatch.setattr("scripts.reproduce.revision", lambda: found["bundle"]["revision"])
    assert differences(found) == []
    found["environment"]["packages"]["monai"] = "0.1"
    found["environment"]["processor"] = "abacus"
    assert len(differences(found)) == 2 and any("monai 0.1 then" in line for line in differences(found))
