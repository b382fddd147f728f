"""The configurations as documents: what stage 2 changes, MONAI's own checks, option names."""

import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.bundle.reference_resolver import ReferenceResolver

from scripts.checkpoint import network_options
from scripts.losses import MaskImageLoss
from scripts.networks import Neuroverse3D
from scripts.runtime.options import OPTIONS
from scripts.runtime.stage_config import CHANGES, STAGE1, STAGE2, changed_text

CONFIGS = Path("configs")
WORKFLOWS = ("train_stage1", "train_stage2", "inference", "tune", "evaluate")


def read(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_stage_two_is_stage_one_with_the_changes_that_it_states():
    assert STAGE2.read_text() == changed_text(STAGE1.read_text(), CHANGES.read_text()), "run `make configs`"
    first, changes, second = read("train_stage1"), read("stage2_changes"), read("train_stage2")
    assert list(first) == list(second) and second == ConfigParser.load_config_files([str(STAGE1), str(CHANGES)])
    assert {key for key in first if first[key] != second[key]} == set(changes)
    assert set(changes) == {
        "description",
        "stage",
        "init_checkpoint",
        "split_file",
        "epochs",
        "context_size",
        "learning_rate",
    }
    assert (second["epochs"], second["context_size"], second["learning_rate"]) == (100, [2, 9], 2e-6)
    assert (first["epochs"], first["context_size"], first["learning_rate"]) == (50, 3, 1e-5)


@pytest.mark.parametrize("changes", ['{\n    "b": 1\n}', '{\n    "list": 1\n}', '{\n    "a": [\n        1\n    ]\n}'])
def test_a_change_that_cannot_be_made_line_by_line_is_refused(changes):
    with pytest.raises(ValueError, match="one line"):
        changed_text('{\n    "a": 1,\n    "list": [\n        1\n    ]\n}', changes)


def references_of(parser, name):
    """Ids that an id's components and expressions refer to."""
    config = parser.get(name)
    return {found.partition("::")[0] for found in ReferenceResolver.find_refs_in_config(config, name)} - {name}


@pytest.mark.parametrize("name", ["train_stage1", "train_stage2"])
def test_a_stage_is_read_from_top_to_bottom(name):
    parser = ConfigParser(read(name))
    order = list(read(name))
    later = {
        (name, used)
        for name in order
        if name not in ("initialize", "run", "finalize")
        for used in references_of(parser, name)
        if order.index(used) > order.index(name)
    }
    assert later == {("train", "validate")}, "the trainer runs the validation; what else is used stands above"
    within = ReferenceResolver.find_refs_in_config(parser.get("validate"), "validate")
    assert {found for found in within if found.startswith("train")} == {"train::dataset", "train::inferer"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("stage1", {"spatial_size": [16, 24, 16], "task": "segmentation", "cohort_spread": [0.0, 0.6]}),
        ("stage2", {"spatial_size": [24, 32, 24], "task": None, "cohort_spread": [0.0, 0.7]}),
    ],
)
def test_the_overlay_for_pretraining_suits_both_stages(stage, expected):
    workflow = ConfigWorkflow(
        [f"configs/train_{stage}.json", "configs/pretrain.json"], workflow_type="train", logging_file=False
    )
    assert not set(read("pretrain")) - set(read(f"train_{stage}")), "only what a stage has"
    for name, value in expected.items():
        assert workflow.parser.get_parsed_content(name) == value
    cohorts = workflow.parser.get_parsed_content("cohorts")
    assert cohorts.spread == expected["cohort_spread"] and cohorts.spatial_size == expected["spatial_size"]
    loss = workflow.parser.get_parsed_content("loss")
    assert isinstance(loss, MaskImageLoss) and loss.weight == 10


def test_published_recipe_is_the_default():
    config = read("train_stage1")
    assert (config["loss_weight"], config["grad_clip"], config["lr_patience"]) == (50.0, 0.25, 10)
    assert (config["groups_per_epoch"], config["val_groups"], config["batch_size"]) == (1000, 50, 1)
    assert read("inference")["context_size"] == 8
    with torch.device("meta"):
        network = Neuroverse3D(**network_options(None))
    assert network.channels == (32, 64, 128, 256, 512)
    assert Neuroverse3D(channels=(2, 4)).grid.tolist() == [128, 128, 128]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_plain_value_at_the_top_is_an_explained_option(name):
    internal = {"description", "bundle_root", "stage", "initialize", "run", "finalize", "imports"}
    plain = {
        key
        for key, value in read(name).items()
        if not isinstance(value, dict) and not (isinstance(value, str) and value.startswith(("$", "@")))
    }
    assert plain - internal - set(OPTIONS) == {"handlers"} - (set() if name == "inference" else {"handlers"})


@pytest.mark.parametrize("name", ["train_stage1", "train_stage2", "inference"])
def test_monai_finds_every_property_without_data_or_weights(name, tmp_path):
    workflow = ConfigWorkflow(
        str(CONFIGS / f"{name}.json"),
        workflow_type="infer" if name == "inference" else "train",
        output_dir=str(tmp_path),
        checkpoint=str(tmp_path / "none.pt") if name == "inference" else None,
        channels=[2, 4],
        spatial_size=8,
        device="cpu",
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_network_accepts_what_the_metadata_promise():
    contexts = torch.rand(1, 3, 1, 16, 16, 16)
    verify_net_in_out(
        "network_def",
        "configs/metadata.json",
        "configs/inference.json",
        extra_forward_args={"context_in": contexts, "context_out": contexts},
    )


def test_metadata_and_the_rest_agree_on_versions():
    metadata = read("metadata")
    pinned = dict(
        line.strip().split("==") for line in Path("requirements.txt").read_text().splitlines() if "==" in line
    )
    assert metadata["version"] in metadata["changelog"]
    assert f"[{metadata['version']}]" in Path("CHANGELOG.md").read_text()
    assert metadata["monai_version"] == pinned.pop("monai")
    assert metadata["pytorch_version"] == pinned.pop("torch")
    assert metadata["numpy_version"] == pinned.pop("numpy")
    assert metadata["required_packages_version"] == pinned


def test_metadata_follow_the_specification():
    metadata = read("metadata")
    for key in ("task", "description", "authors", "copyright", "intended_use", "data_source", "data_type"):
        assert isinstance(metadata[key], str) and metadata[key]
    for key in ("changelog", "required_packages_version", "eval_metrics", "supported_apps"):
        assert isinstance(metadata[key], dict)
    assert isinstance(metadata["references"], list)
    inputs, outputs = metadata["network_data_format"]["inputs"], metadata["network_data_format"]["outputs"]
    assert list(inputs) == ["image", "context_in", "context_out"] and list(outputs) == ["pred"]
    for tensor in (*inputs.values(), *outputs.values()):
        assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(tensor)


def test_the_zoo_s_files_are_there():
    for name in ("LICENSE", "configs/metadata.json", "configs/logging.conf", "docs/README.md", "docs/data_license.txt"):
        assert Path(name).is_file(), name
