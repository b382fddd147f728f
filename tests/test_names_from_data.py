"""Names and values that come from data are data: no door evaluates, resolves or splits them.

In MONAI's configurations ``$`` begins code, ``@`` a reference, ``%`` a macro, and ``#`` or ``::`` separates ids. The
doors of MONAI Label and MONAI Deploy have their tests in ``tests/apps``.
"""

import csv
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from scripts.apps.deploy.model_folder import make_predictor
from scripts.networks import Neuroverse3D
from scripts.prepare_data import prepare_data
from scripts.reproduce import reproduce
from scripts.runtime.manifest import MANIFEST
from scripts.runtime.output_folder import write_csv
from scripts.runtime.workflow import give, run_given, start_workflow
from tests.workflows import SMALL, run_workflow

CODE = '$__import__("os").environ.__setitem__("CODE_RAN", "1")'
NAMES = (CODE, "@dataset_dir", "%seed", "a#b", "x@##y", "a::b", "=1+1", "@missing", "$@seed")


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch):
    """The sentinel: set by the code in the names, if anything runs it."""
    monkeypatch.delenv("CODE_RAN", raising=False)
    yield
    assert "CODE_RAN" not in os.environ


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset):
    """A dataset whose own name, cases and labels are such names, and its images and labels in folders of their own."""
    folder = tmp_path_factory.mktemp("data")
    labels = {"background": 0, CODE: 1, "@dataset_dir": 2}
    dataset = make_dataset(folder / "in", name="Dataset001_a#$b", cases=NAMES, labels=labels)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
        for path in (dataset / part).iterdir():
            shutil.copy(path, folder / part / path.name.replace("_0000", ""))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), path)
    return path


@pytest.fixture
def infer(data, weights, tmp_path):
    def run(**options):
        plain = {"dataset_dir": str(data / "imagesTr"), "output_dir": str(tmp_path / "answers"), "device": "cpu"}
        run_workflow("inference", **plain | {"checkpoint": str(weights), "context_size": 2} | options)
        return json.loads((tmp_path / "answers" / "report.json").read_text())

    return run


@pytest.fixture
def repeated_here(monkeypatch):
    """``reproduce`` repeats runs in this process."""
    run = subprocess.run

    def in_this_process(command, **options):
        if "--config_file" not in command:
            return run(command, **options)
        config, given = command[command.index("--config_file") + 1], command[command.index("--given_file") + 1]
        run_given(config, given)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("scripts.reproduce.subprocess.run", in_this_process)


def test_inference_and_evaluation(data, infer, tmp_path):
    report = infer(context_dir=str(data / "in"), context_size=3)
    assert sorted(report["cases"]) == sorted(NAMES) and not report["failed"]
    assert set(report["contexts"]) <= set(NAMES)
    assert all((tmp_path / "answers" / f"{name}.{kind}").is_file() for name in NAMES for kind in ("nii.gz", "png"))
    run_workflow(
        "evaluate",
        prediction_dir=str(tmp_path / "answers"),
        reference_dir=str(data / "labelsTr"),
        output_dir=str(tmp_path / "scores"),
    )
    for table in (tmp_path / "scores" / "metrics.csv", tmp_path / "answers" / "volumes.csv"):
        with table.open(newline="") as file:
            cases = {row["case"] for row in csv.DictReader(file)}
        assert cases == {f"'{name}" if name[0] in "=@" else name for name in NAMES}


def test_contexts_by_file_and_by_folders(data, infer):
    pairs = [
        {"image": str(data / "imagesTr" / f"{name}.nii.gz"), "label": str(data / "labelsTr" / f"{name}.nii.gz")}
        for name in NAMES
    ]
    listed = data / "pairs.json"
    listed.write_text(json.dumps(pairs))
    assert not infer(context_file=str(listed), overlays=False)["failed"]
    folders = {"context_images": str(data / "imagesTr"), "context_labels": str(data / "labelsTr")}
    assert len(infer(**folders, overlays=False, overwrite=True)["cases"]) == len(NAMES)


def test_training_and_its_repetition(data, tmp_path, repeated_here, capsys):
    options = SMALL | {"dataset_dir": str(data / "in"), "output_dir": str(tmp_path / "out"), "val_fraction": 0.35}
    run_workflow("train_stage1", **options | {"epochs": 1})
    split = json.loads((tmp_path / "out" / "stage1" / "splits.json").read_text())
    assert CODE in json.dumps(split).replace('\\"', '"')

    reproduce(str(tmp_path / "out" / "stage1"), str(tmp_path / "a#b"))  # a new folder is no id either
    assert "3 results are identical" in capsys.readouterr().out

    # values in a manifest are values: a path that would be code is a path of nothing
    manifest = tmp_path / "out" / "stage1" / MANIFEST
    content = json.loads(manifest.read_text())
    for name in ("dataset_dir", "task"):
        manifest.write_text(json.dumps(content | {"options": content["options"] | {name: CODE}}))
        with pytest.raises((OSError, ValueError)):
            reproduce(str(manifest.parent), str(tmp_path / name))


def test_cases_that_an_application_gives_train(data, tmp_path, repeated_here, capsys):
    cases = [
        {
            "image": str(data / "imagesTr" / f"{name}.nii.gz"),
            "label": str(data / "labelsTr" / f"{name}.nii.gz"),
            "case": name,
            "dataset": CODE,
        }
        for name in NAMES
    ]
    given = SMALL | {"train#dataset#data": cases[:5], "validate#dataset#data": cases[5:], "epochs": 1}
    given |= {"spatial_size": [16, 16, 16], "output_dir": str(tmp_path / CODE / "a#b")}
    workflow = start_workflow("train_stage1.json", given)
    workflow.run()
    workflow.finalize()
    manifest = json.loads((tmp_path / CODE / "a#b" / "stage1" / MANIFEST).read_text())
    assert manifest["options"]["train::dataset::data"] == cases[:5] and manifest["data"]["cases"] == len(NAMES)
    reproduce(str(tmp_path / CODE / "a#b" / "stage1"), str(tmp_path / "again"))
    assert "3 results are identical" in capsys.readouterr().out


def test_prepare_data(data, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    names = set(NAMES) - {"a::b", "$@seed"}  # would get the names of others, which is refused
    for name in names:
        shutil.copy(data / "imagesTr" / f"{name}.nii.gz", raw / f"{name}_img.nii.gz")
        shutil.copy(data / "labelsTr" / f"{name}.nii.gz", raw / f"{name}_gt.nii.gz")
    (tmp_path / "names.json").write_text(json.dumps({"1": CODE, "2": "@x#y"}))
    prepare_data(str(raw), str(tmp_path / "out"), "Names", label_names=str(tmp_path / "names.json"))
    made = tmp_path / "out" / "Dataset001_Names"
    assert len(list((made / "labelsTr").iterdir())) == len(names)
    assert json.loads((made / "dataset.json").read_text())["labels"] == {"background": 0, CODE: 1, "@x#y": 2}


def test_deploys_model_folder(data, weights, tmp_path):
    contexts = tmp_path / "a#b" / CODE
    shutil.copytree(data / "in" / "Dataset001_a#$b", contexts)
    predictor = make_predictor(weights, contexts, {"context_size": 3, "device": "cpu"})
    assert set(predictor.context.names) <= set(NAMES) and predictor.label_values == [1, 2]
    for options in ({"labels": [CODE]}, {"labels": {"a": CODE}}, {"context_selection": CODE}, {"seed": CODE}):
        with pytest.raises(ValueError):
            make_predictor(weights, contexts, {"device": "cpu"} | options)


def test_given_values_are_not_read(tmp_path):
    workflow = start_workflow("inference.json", {"dataset_dir": CODE, "context_images": [CODE, {"x": "@seed"}]})
    parser = workflow.parser
    assert parser.get_parsed_content("dataset_dir") == CODE
    assert parser.get_parsed_content("context_images") == [CODE, {"x": "@seed"}]
    give(parser, {"dataset_dir": "%seed", "context#selection": "$1/0"})
    assert parser.get_parsed_content("dataset_dir") == "%seed"
    assert parser.get_parsed_content("context_images") == [CODE, {"x": "@seed"}]
    parser["seed"] = "$1 + 1"  # what is not given is read as ever
    assert parser.get_parsed_content("seed") == 2 and parser.get_parsed_content("dataset_dir") == "%seed"
    with pytest.raises(ValueError, match="no datasett_dir"):
        give(parser, {"datasett_dir": ""})


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    begun = ["=1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "＝1", "a=1", "plain", "", "'x"]
    write_csv(("=case", "number"), [(text, -1.5) for text in begun] + [(None, 2)], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=case", "number"] and [row[1] for row in rows] == [*["-1.5"] * len(begun), "2"]
    assert [row[0] for row in rows] == [*(f"'{text}".replace("\r", " ") for text in begun[:8]), *begun[8:], ""]
