"""The app's parts in this process: what is kept, what is refused, which weights are in use."""

import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

from fastapi import HTTPException  # noqa: E402
from monailabel.interfaces.utils.app import app_instance  # noqa: E402

from scripts.apps.monailabel.annotations import given_names  # noqa: E402
from scripts.apps.monailabel.model_folder import ModelFolder  # noqa: E402
from scripts.apps.monailabel.prediction_files import write_prediction  # noqa: E402
from scripts.apps.monailabel.predictors import DEFAULTS, app_options  # noqa: E402
from scripts.apps.monailabel.statuses import NotFoundError, clear_statuses  # noqa: E402
from scripts.data.volumes import load_volume  # noqa: E402
from scripts.inference.context_pairs import ContextPairs  # noqa: E402
from scripts.inferer import as_volume  # noqa: E402
from scripts.networks import Neuroverse3D  # noqa: E402
from tests.apps.monailabel.conftest import save_random_weights  # noqa: E402
from tests.tuning.judgement import winning  # noqa: E402

MODEL = "neuroverse3d"


@pytest.fixture
def make_app(tmp_path, weights, make_app_dir, monkeypatch):
    """``make_app(studies, **conf)``: the app as a server makes it, but here; contexts are not aligned unless asked."""
    monkeypatch.setattr("monailabel.config.settings.MONAI_LABEL_SESSION_PATH", str(tmp_path / "sessions"))
    monkeypatch.setattr("monailabel.config.settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)

    def make(studies, **conf):
        conf = {"weights": str(weights), "device": "cpu", "align": "off"} | conf
        return app_instance(str(make_app_dir(tmp_path)), str(studies.folder), conf)

    return make


@pytest.fixture
def counted(monkeypatch):
    """How many context pairs were encoded, and how many were read and brought to the grid."""
    counts = {"encoded": 0, "read": 0}
    encode, read = Neuroverse3D.encode_stems, ContextPairs.read

    def counting_encode(self, pairs):
        counts["encoded"] += pairs.shape[1]
        return encode(self, pairs)

    def counting_read(self, number):
        counts["read"] += 1
        return read(self, number)

    monkeypatch.setattr(Neuroverse3D, "encode_stems", counting_encode)
    monkeypatch.setattr(ContextPairs, "read", counting_read)

    def since_last():
        found = dict(counts)
        counts.update(encoded=0, read=0)
        return found["encoded"], found["read"]

    return since_last


def save(app, studies, *cases):
    for case in cases:
        app.datastore().save_label(case, str(studies.label(case)), "final", {})


def propose(app, case, **params):
    """Voxels of the prediction, and what is said of it."""
    found = app.infer({"model": MODEL, "image": case} | params)
    voxels = load_volume(found["file"])[0].numpy()
    Path(found["file"]).unlink()
    return voxels, found["params"]


def test_contexts_are_encoded_once_until_an_annotation_is_saved_again(
    tmp_path, make_app, make_studies, counted, rewrite
):
    studies = make_studies(tmp_path, cases=6)
    app = make_app(studies)
    save(app, studies, "case_03", "case_04", "case_05")
    first, _ = propose(app, "case_00")
    assert counted() == (3 * 2, 3)  # three pairs, two labels
    propose(app, "case_01")
    propose(app, "case_02")
    again, _ = propose(app, "case_00")
    assert counted() == (0, 0) and np.array_equal(first, again)

    # an annotated scan has other contexts, all of them known, and does not drive out those of new scans
    propose(app, "case_05")
    propose(app, "case_02")
    assert counted() == (0, 0)

    # a further annotation, and one that is saved again: only that pair is read and encoded
    save(app, studies, "case_01")
    propose(app, "case_00")
    assert counted() == (2, 1)
    rewrite(studies.label("case_04"), lambda label: np.where(label > 0, 3 - label, 0).astype(np.uint8))
    save(app, studies, "case_04")
    changed, _ = propose(app, "case_00")
    assert counted() == (2, 1) and not np.array_equal(changed, first)

    # what is taken over is what would be made anew
    app.predictors._kept.clear()
    anew, _ = propose(app, "case_00")
    assert counted() == (4 * 2, 4) and np.array_equal(changed, anew)

    # a file that was written by hand, of the same size: its time tells
    label = studies.folder / "labels" / "final" / "case_04.nii"
    label.with_suffix(".nii.gz").unlink()
    swapped = load_volume(studies.label("case_04"))
    voxels = swapped[0].numpy().astype(np.uint8)
    nib.save(nib.Nifti1Image(voxels, swapped.affine.numpy()), label)
    app.datastore().refresh()
    propose(app, "case_00")
    assert counted() == (0, 0)  # another file, but the same voxels
    size = label.stat().st_size
    nib.save(nib.Nifti1Image(np.where(voxels > 0, 3 - voxels, 0).astype(np.uint8), swapped.affine.numpy()), label)
    assert label.stat().st_size == size
    back, _ = propose(app, "case_00")
    assert counted() == (2, 1) and not np.array_equal(back, changed)

    app.datastore().remove_label("case_04", "final")
    left = ["case_01", "case_03", "case_05"]
    assert propose(app, "case_00")[1]["contexts"] == {"1": left, "2": left}
    assert counted() == (0, 0)


def test_what_is_kept_is_bounded(tmp_path, make_app, make_studies, counted):
    studies = make_studies(tmp_path, cases=6)
    app = make_app(studies, cache_mb="0.2")  # one pair's stem of 4 x 16³ floats is 0.07 MB
    save(app, studies, *studies.cases[1:])
    with_room, _ = propose(app, "case_00")
    counted()
    for case in studies.cases:
        propose(app, case)
    kept = app.predictors._kept.values()
    assert len(kept) == 2
    for predictor in kept:
        stems = predictor.predictor._passes._stems
        assert 0 < stems.used_bytes <= stems.budget_bytes == int(0.2 * 2**20)
    assert np.array_equal(propose(app, "case_00")[0], with_room)


def test_as_many_contexts_as_asked_for_and_the_most_similar(tmp_path, make_app, make_studies):
    studies = make_studies(tmp_path, cases=6)
    shutil.copy(studies.image("case_00"), studies.image("case_06"))  # the same scan under another name
    app = make_app(studies, context_size="2")
    save(app, studies, *studies.cases[1:])
    _, said = propose(app, "case_00")
    used = said["contexts"]["1"]
    assert len(used) == 2 and used == said["contexts"]["2"] and "case_00" not in used
    app.datastore().refresh()
    shutil.copy(studies.label("case_00"), studies.folder / "labels" / "final" / "case_00.nii.gz")
    app.datastore().refresh()
    assert "case_00" not in propose(app, "case_06")[1]["contexts"]["1"]  # known by its voxels


def test_the_same_scan_under_another_name_is_nothing_to_go_by(tmp_path, make_app, make_studies, rewrite):
    studies = make_studies(tmp_path, cases=3)
    shutil.copy(studies.image("case_00"), studies.image("case_06"))
    app = make_app(studies)
    save(app, studies, "case_00")
    with pytest.raises(HTTPException) as refused:
        propose(app, "case_06")
    assert refused.value.status_code == 409 and "this very scan" in refused.value.detail
    proposed = {app.next_sample({"strategy": "least_confident"})["id"] for _ in range(4)}
    assert proposed <= {"case_01", "case_02"}
    rewrite(studies.label("case_01"), lambda label: (label == 1).astype(np.uint8))
    save(app, studies, "case_01")
    _, said = propose(app, "case_06")
    assert said["contexts"] == {"1": ["case_01"], "2": []}
    assert "no other scan has label 2: left empty" in said["warnings"]


def test_labels_follow_the_annotations(tmp_path, make_app, make_studies, rewrite):
    studies = make_studies(tmp_path, cases=4)
    app = make_app(studies)
    assert app.info()["labels"] == []
    save(app, studies, "case_01")
    assert app.info()["models"][MODEL]["labels"] == {"label 1": 1, "label 2": 2}
    rewrite(studies.label("case_02"), lambda label: (300 * (label == 2)).astype(np.int16))
    app.datastore().save_label(
        "case_02", str(studies.label("case_02")), "final", {"label_info": [{"name": "many", "idx": 300}]}
    )
    assert app.info()["models"][MODEL]["labels"] == {"label 1": 1, "label 2": 2, "many": 300}
    voxels, said = propose(app, "case_00", result_extension=".nrrd", result_dtype="uint8")
    assert said["contexts"] == {"1": ["case_01"], "2": ["case_01"], "300": ["case_02"]}
    assert set(np.unique(voxels)) <= {0, 1, 2, 300} and 300 in voxels  # 8 bits would have made 44 of it


@pytest.mark.parametrize("ending", [".nrrd", ".nii", ".nii.gz"])
def test_answers_lie_on_their_scan_in_every_format(ending):
    sheared = np.array([[1.5, 0.4, 0, 9], [0, 0.9, 0.2, -4], [0.1, 0, 2, 1], [0, 0, 0, 1]])
    prediction = as_volume((np.arange(60, dtype=np.int16).reshape(3, 4, 5), sheared))
    file = write_prediction(prediction, "scan.mgz", ending)
    try:
        found = load_volume(file)
    finally:
        os.unlink(file)
    assert np.array_equal(found.numpy(), prediction.numpy()) and np.allclose(found.affine, sheared, atol=1e-5)


def test_names_of_labels_as_viewers_give_them():
    slicer = {"label_info": [{"name": "a", "idx": 1}, {"name": "b", "idx": 2}]}
    assert given_names(slicer) == {1: "a", 2: "b"}
    assert given_names({"label_info": [{"name": "a", "id": 4}, {"name": "", "idx": 1}, "x", {"idx": 3}]}) == {4: "a"}
    assert given_names({}) == given_names({"label_info": None}) == {}


def test_versions_of_weights(tmp_path):
    shipped = save_random_weights(tmp_path / "model.pt")
    folder = ModelFolder(tmp_path / "model", shipped)
    assert folder.names() == ["current", "shipped"] and folder.named() == folder.named("shipped") == shipped
    made = [folder.publish(shipped).name for _ in range(2)]
    assert made == ["weights_0001.pt", "weights_0002.pt"] and folder.named().name == "weights_0002.pt"
    folder.named().rename(folder.folder / "weights_0002.pt.20260101.deleted")
    assert folder.named().name == "weights_0001.pt" and folder.publish(shipped).name == "weights_0003.pt"
    for name in ("weights_0002.pt", "../model.pt", "model.pt", ""):
        with pytest.raises(NotFoundError, match="there are current, shipped, weights_0003.pt, weights_0001.pt"):
            folder.named(name)
    with pytest.raises(FileNotFoundError, match="--conf weights"):
        ModelFolder(tmp_path / "model", tmp_path / "none.pt")


def test_weights_that_cannot_be_used_are_not_the_clients_fault(tmp_path, make_app, make_studies):
    studies = make_studies(tmp_path, cases=3)
    app = make_app(studies)
    save(app, studies, "case_01", "case_02")
    good, _ = propose(app, "case_00")
    (tmp_path / "app" / "model" / "weights_0001.pt").write_bytes(b"cut short")
    with pytest.raises(HTTPException) as refused:
        propose(app, "case_00")
    assert refused.value.status_code == 503 and "weights_0001.pt" in refused.value.detail
    assert np.array_equal(propose(app, "case_00", weights="shipped")[0], good)


def test_options_of_inference_json():
    conf = {"weights": "x", "context_size": "4", "spatial_size": "16,16,16", "refine": "true", "models": "y"}
    assert app_options(conf) == DEFAULTS | {"context_size": 4, "spatial_size": [16, 16, 16], "refine": True}
    with pytest.raises(ValueError, match="context_dir cannot be set"):
        app_options({"context_dir": "/data"})
    with pytest.raises(ValueError, match="context_size"):
        app_options({"context_size": "0"})


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(KeyError), clear_statuses():
        raise KeyError("a mistake")
    with pytest.raises(HTTPException) as full, clear_statuses():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert full.value.status_code == 503


def test_a_tuning_that_wins_publishes_its_weights(tmp_path, make_app, make_studies, monkeypatch):
    winning(monkeypatch, 0.1)
    studies = make_studies(tmp_path, cases=4)
    app = make_app(studies)
    save(app, studies, *studies.cases)
    result = app.train({"model": MODEL, "seconds": 5})
    assert result["kept"] and result["weights"] == "weights_0001.pt" and result["started_from"] == "model.pt"
    assert [path.name for path in app.model_folder.versions()] == ["weights_0001.pt"]


def test_a_tuning_that_fails_publishes_nothing(tmp_path, make_app, make_studies):
    studies = make_studies(tmp_path, cases=5)
    app = make_app(studies)
    with pytest.raises(HTTPException) as refused:
        app.train({"model": MODEL})
    assert refused.value.status_code == 409 and "there is none" in refused.value.detail
    save(app, studies, *studies.cases)
    wrong = [
        ({"seconds": 0}, 422, "seconds"),
        ({"start_from": "weights_0007.pt"}, 404, "weights_0007"),
        ({"learning_rate": "fast"}, 422, "fast"),
        ({"seconds": "$1"}, 422, "$1"),
    ]
    for settings, status, said in wrong:
        with pytest.raises(HTTPException) as refused:
            app.train({"model": MODEL} | settings)
        assert refused.value.status_code == status and said in refused.value.detail, refused.value.detail
    assert app.model_folder.versions() == []
