"""What is packaged: chosen contexts, settings and hashes; none of it needs the SDK."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.apps.deploy.model_folder import ModelFolder, context_set_sha256, make_predictor
from scripts.apps.deploy.segments import PRIVATE_SCHEME, describe_segments
from scripts.apps.deploy.stage import stage
from scripts.checkpoint import CheckpointError
from scripts.data.nnunet import DatasetError
from scripts.inferer import ICLInferer


@pytest.fixture
def data(tmp_path, make_dataset):
    """Six cases, of which the first is twice as large as the others."""
    data = make_dataset(tmp_path, cases=6)
    for path in (*data.glob("imagesTr/case_00*"), *data.glob("labelsTr/case_00*")):
        large = nib.load(path)
        nib.save(nib.Nifti1Image(np.kron(np.asarray(large.dataobj), np.ones((2, 2, 2), np.int16)), np.eye(4)), path)
    return data


def staged(tmp_path, data, weights, **options):
    stage(str(weights), str(data), str(tmp_path / "staged"), **options)
    return ModelFolder.find(tmp_path / "staged" / "models")


# --- staging


def test_only_the_chosen_contexts_are_packaged_and_make_the_same_set(tmp_path, data, weights, capsys):
    packaged = staged(tmp_path, data, weights, context_size=3, seed=3)
    whole = make_predictor(weights, data, {"context_size": 3, "seed": 3})
    assert "case_00" not in whole.context.names, "the spacing is to hang on a case that is not packaged"
    names = {path.name for path in (packaged.path / "contexts" / "labelsTr").iterdir()}
    assert names == {f"{name}.nii.gz" for name in whole.context.names} and len(names) == 3
    again = packaged.predictor()
    assert again.context.fingerprint == whole.context.fingerprint
    assert packaged.hashes(again)["context_set_sha256"] == context_set_sha256(whole.context)
    assert [segment.name for segment in packaged.segments(again)] == ["first", "second"]
    assert "monai-deploy package" in capsys.readouterr().out


def test_tuned_weights_are_packaged_with_what_to_expect_of_them(tmp_path, data, weights, monkeypatch):
    plain = ICLInferer.tune
    monkeypatch.setattr(ICLInferer, "tune", lambda self, *args: plain(self, *args, steps=1, amp=False))
    packaged = staged(tmp_path, data, weights, align="off", tune=5)
    report = json.loads((packaged.path / "tuning.json").read_text())
    again = packaged.predictor()
    assert report["minutes"] == 5 and again.prepare() == report["self_test"]


def test_contexts_chosen_for_each_target_are_all_packaged(tmp_path, data, weights):
    packaged = staged(tmp_path, data, weights, context_size=2, context_selection="similar")
    context = packaged.predictor().context
    assert len(context) == 6 and context.chooses
    assert [path.name for path in (tmp_path / "staged").rglob(".*")] == [".neuroverse3d"], "its record"


def test_the_application_is_complete_and_says_which_revision_it_is(tmp_path, data, weights):
    staged(tmp_path, data, weights)
    app = tmp_path / "staged" / "app"
    for name in (
        "__main__.py",
        "app.yaml",
        "requirements.txt",
        "configs/inference.json",
        "scripts/inferer.py",
        "LICENSE",
    ):
        assert (app / name).is_file()
    assert (app / "REVISION").read_text().strip()
    assert not list(app.rglob("*.pyc"))
    assert {path.name for path in (app / "scripts" / "apps").iterdir()} == {"__init__.py", "deploy"}


def test_a_folder_is_replaced_only_if_asked_for(tmp_path, data, weights):
    staged(tmp_path, data, weights, context_size=2)
    with pytest.raises(FileExistsError, match="--overwrite true"):
        staged(tmp_path, data, weights)
    packaged = staged(tmp_path, data, weights, context_size=4, overwrite="true")
    assert packaged.options["context_size"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {data.name, "staged"}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"labels": "[9]"}, ValueError, r"labels \[9\] are in none"),
        ({"context_selection": "best"}, ValueError, "--context_selection"),
        ({"context_size": 0}, ValueError, "context_size"),
        ({"segments": "nowhere.json"}, FileNotFoundError, "nowhere.json"),
        ({"series": "nowhere.json"}, FileNotFoundError, "nowhere.json"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_packaged(tmp_path, data, weights, options, error, message):
    with pytest.raises(error, match=message):
        staged(tmp_path, data, weights, **options)
    assert {path.name for path in tmp_path.iterdir()} == {data.name}


def test_what_is_not_there(tmp_path, data, weights):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        staged(tmp_path, data, tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        staged(tmp_path, tmp_path / "nowhere", weights)
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        staged(tmp_path, data, tmp_path / "bad.pt")


# --- the model folder


def test_contexts_that_were_changed_after_packaging_are_refused(tmp_path, data, weights):
    packaged = staged(tmp_path, data, weights, context_size=2)
    path = next((packaged.path / "contexts" / "labelsTr").iterdir())
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    with pytest.raises(ValueError, match=r"not as it was packaged \(context_set_sha256\)"):
        packaged.predictor()


def test_folders_that_are_no_model_folder(tmp_path, data, weights):
    with pytest.raises(FileNotFoundError, match=r"has no model\.pt"):
        ModelFolder.find(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(weights, tmp_path / name / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"but a, b have"):
        ModelFolder.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no contexts"):
        ModelFolder.find(tmp_path / "a")


@pytest.mark.parametrize(
    "options, message",
    [
        ('{"context_sise": 2}', "did you mean --context_size"),
        ('{"output_dir": "/elsewhere"}', "unknown option --output_dir"),
        ("[1]", "must hold one JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"context_size": 0}', "context_size"),
    ],
)
def test_faulty_options(tmp_path, data, weights, options, message):
    packaged = staged(tmp_path, data, weights)
    (packaged.path / "options.json").write_text(options)
    with pytest.raises(ValueError, match=message):
        packaged.predictor()


def test_contexts_without_labels(tmp_path, data, weights):
    packaged = staged(tmp_path, data, weights)
    for path in (packaged.path / "contexts" / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)
    with pytest.raises(DatasetError, match="no label other than background"):
        packaged.predictor()


# --- segments

BRAIN = {"CodeValue": "12738006", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Brain"}
ENTRY = {
    "labelID": 7,
    "SegmentedPropertyCategoryCodeSequence": BRAIN,
    "SegmentedPropertyTypeCodeSequence": BRAIN,
    "AnatomicRegionSequence": BRAIN,
}


def codes(tmp_path, *entries):
    path = tmp_path / "segments.json"
    path.write_text(json.dumps({"segmentAttributes": [list(entries)]}))
    return path


def test_names_and_codes(tmp_path, caplog):
    segments = describe_segments([3, 7], {3: "left \\ right", 7: "of the data set"}, codes(tmp_path, ENTRY))
    assert segments[0].name == "left / right" and segments[0].kind == ("3", PRIVATE_SCHEME, "left / right")
    assert segments[0].region is None and "labels 3" in caplog.text
    assert segments[1].name == "of the data set" and segments[1].kind.value == segments[1].region.value == "12738006"
    named = describe_segments([7], {7: "other"}, codes(tmp_path, ENTRY | {"SegmentLabel": "Brain"}))
    assert named[0].name == "Brain"
    assert describe_segments([5], {})[0].name == "label 5"
    long = describe_segments([5], {5: "x" * 100})[0]
    assert len(long.name) == len(long.kind.meaning) == 64


def test_faulty_codes(tmp_path):
    with pytest.raises(ValueError, match="no SegmentedPropertyTypeCodeSequence; .*dcmqi"):
        describe_segments([7], {}, codes(tmp_path, {k: v for k, v in ENTRY.items() if "Type" not in k}))
    with pytest.raises(ValueError, match="several entries with labelID 7"):
        describe_segments([7], {}, codes(tmp_path, ENTRY, ENTRY))
    with pytest.raises(ValueError, match="no code"):
        describe_segments([7], {}, codes(tmp_path, ENTRY | {"AnatomicRegionSequence": BRAIN | {"CodeValue": ""}}))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="not in dcmqi's form"):
        describe_segments([7], {}, tmp_path / "list.json")


def test_more_segments_than_dicom_numbers():
    with pytest.raises(ValueError, match="at most 65535 segments, the contexts have 65536"):
        describe_segments(range(1, 65537), {})


# --- what the packager reads


def test_the_packager_takes_the_folders(tmp_path, data, weights):
    """As far as it goes without a container engine."""
    pytest.importorskip("holoscan_cli.packager", reason="the MONAI Deploy packager is not installed")
    from holoscan_cli.packager.config_reader import ApplicationConfiguration
    from holoscan_cli.packager.models import Models
    from holoscan_cli.packager.parameters import PackageBuildParameters

    packaged = staged(tmp_path, data, weights)
    app = tmp_path / "staged" / "app"
    parameters = PackageBuildParameters()
    parameters.application = app
    parameters.models = Models().build(tmp_path / "staged" / "models")
    assert parameters.application_type.value == "Python Module" and parameters.models == {"neuroverse3d": packaged.path}
    assert parameters.requirements_file_path == app / "requirements.txt"
    configuration = ApplicationConfiguration()
    configuration.read(app / "app.yaml")
    manifest = configuration.populate_app_manifest(parameters).data
    metadata = json.loads((app / "configs" / "metadata.json").read_text())
    assert "Research use only" in configuration.title() and manifest["version"] == metadata["version"]
    assert manifest["input"]["formats"] == manifest["output"]["formats"] == ["dicom"]


def test_the_application_has_the_version_and_the_pins_of_the_bundle():
    version = json.loads(Path("configs/metadata.json").read_text())["version"]
    assert f"  version: {version}\n" in Path("scripts/apps/deploy/app.yaml").read_text()
    of_the_bundle = pins("requirements.txt") | pins("requirements-dev.txt")
    of_the_application = pins("scripts/apps/deploy/requirements.txt")
    shared = of_the_bundle.keys() & of_the_application
    assert {"torch", "monai", "numpy", "SimpleITK", "pydicom"} <= shared
    assert {name: of_the_application[name] for name in shared} == {name: of_the_bundle[name] for name in shared}


def pins(file):
    return dict(line.split("==") for line in Path(file).read_text().splitlines() if "==" in line)
