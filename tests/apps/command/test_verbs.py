"""The table of verbs: what a typed command becomes, what is refused, what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.apps.command.verbs import SHORT, VERBS, command, help_text
from scripts.runtime.options import OPTIONS


@pytest.fixture
def data(make_dataset, tmp_path):
    return make_dataset(tmp_path, cases=3)


def options_of(arguments):
    """``--name value ...`` as a dict; a flag without value has none."""
    found, name = {}, None
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:]
            found[name] = []
        elif name:
            found[name].append(argument)
    return found


def test_scans_examples_and_output_become_options_of_the_workflow(data):
    said = []
    module, arguments = command(
        ["segment", str(data), "--examples", str(data), "--output", "out", "--context_size", "2"], say=said.append
    )
    assert module == "monai.bundle" and arguments[:2] == ["run", "--config_file"]
    options = options_of(arguments)
    assert Path(options["config_file"][0]).name == "inference.json" and Path(options["config_file"][0]).is_absolute()
    assert options["dataset_dir"] == options["context_dir"] == [str(data)]
    assert options["output_dir"] == ["out"] and options["context_size"] == ["2"]
    assert Path(options["bundle_root"][0], "models", "model.pt").is_file()
    assert said == ["scans: imagesTr of an nnU-Net dataset; examples: an nnU-Net dataset"]


def test_several_files_and_folders(data):
    scans = sorted(map(str, (data / "imagesTr").iterdir()))
    _, arguments = command(
        ["segment", *scans, "--examples", str(data / "imagesTr"), str(data / "labelsTr"), "--output=out"], say=len
    )
    options = options_of(arguments)
    assert options["target_images"] == [repr(scans)] and "dataset_dir" not in options
    assert options["context_images"] == [repr([str(data / "imagesTr")])]
    assert options["context_labels"] == [repr([str(data / "labelsTr")])]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["segment", "SCANS", "--examples", "E"], "segment needs --output: neuroverse3d segment SCANS --examples"),
        (["segment", "SCANS", "--output", "o"], "segment needs --examples"),
        (["segment", "--output", "o", "--examples", "E"], "segment needs SCANS"),
        (["train", "stage1", "D"], "train stage1 needs --output"),
        (["train"], "which one. train stage1 or train stage2"),
        (["synthesize"], "synthesize needs --output"),
        (["segmnt"], "unknown command segmnt: did you mean segment"),
        (["segment", "a", "--dataset_dir", "b", "--output", "o", "--examples", "E"], "SCANS is given twice"),
        (["segment", "nowhere", "--output", "o", "--examples", "E"], "no file or folder .*nowhere"),
    ],
)
def test_what_is_missing_or_wrong_is_said(typed, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        command(typed)
    assert "\n" not in str(caught.value)


def test_every_verb_that_writes_into_a_folder_needs_it():
    for name, verb in VERBS.items():
        if "output_dir" in verb.needs:
            assert "--output OUT" in verb.usage, name
        elif verb.is_workflow:
            pytest.fail(f"{name} writes, and does not ask where")


def test_needs_and_substitutes_are_options_of_what_they_are_given_to():
    for name, verb in VERBS.items():
        if verb.is_workflow:
            known = json.loads(Path(verb.first[2]).read_text())
            named = {*verb.needs, *(other for others in verb.instead.values() for other in others)}
            assert named <= set(known) & set(OPTIONS), name
    assert set(SHORT.values()) <= {option for verb in VERBS.values() for option in verb.needs}


def test_names_of_earlier_versions_are_the_same_verbs():
    assert command(["train_stage2", "D", "--output", "o"]) == command(["train", "stage2", "D", "--output", "o"])
    names = [*VERBS, *(other for verb in VERBS.values() for other in verb.also)]
    assert len(names) == len(set(names))


def test_what_is_not_the_table_s_goes_on_as_it_is():
    typed = ["--nproc_per_node=2", "-m", "monai.bundle", "run", "--x", "-1"]
    assert command(["torchrun", *typed]) == ("torch.distributed.run", typed)
    typed = ["IN", "OUT", "participant", "--participant_label", "01", "010"]
    assert command(["bids", *typed]) == ("scripts.apps.bids", typed)


def test_the_help_lists_every_verb():
    assert all(f"  {name} " in help_text() for name in VERBS)
    assert command(["segment", "--help"])[1][-2:] == ["--help", "true"]
    assert command(["prepare", "--help"]) == ("scripts.prepare_data", ["--help"])


def test_a_path_that_would_be_read_as_something_else_is_quoted(write_nifti, tmp_path):
    scan = write_nifti(tmp_path / "a,b.nii.gz", np.ones((2, 2, 2), np.uint8))
    _, arguments = command(["segment", str(scan), "--context_file", "x", "--output", "o"], say=len)
    assert options_of(arguments)["dataset_dir"] == [repr(str(scan))]
