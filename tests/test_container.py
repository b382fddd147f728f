"""The image's entry point: verbs, what they fill in, and what they refuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import container
from scripts.apps.command import verbs
from scripts.apps.command.verbs import VERBS
from scripts.container import command, help_text


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """``/data``, ``/context`` and ``/out`` in a folder of the test, the first two with nnU-Net's layout in them."""
    for name in ("data", "context", "out"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(container, name.upper(), str(tmp_path / name))
    for name in ("data", "context"):
        (tmp_path / name / "imagesTr").mkdir()
        (tmp_path / name / "imagesTr" / "a_0000.nii.gz").touch()
    moved = {
        name: verb._replace(needs={k: str(tmp_path) + v for k, v in verb.needs.items()}) for name, verb in VERBS.items()
    }
    monkeypatch.setattr(verbs, "VERBS", moved)
    return tmp_path


def test_a_workflow_s_folders_are_filled_in_and_its_arguments_go_on(mounts):
    module, arguments = command(["train_stage1", "--epochs", "5", "--channels", "[4,8]"])
    assert module == "monai.bundle" and arguments[:2] == ["run", "--config_file"]
    assert Path(arguments[2]).name == "train_stage1.json" and Path(arguments[2]).is_file()
    assert arguments[arguments.index("--dataset_dir") :] == [
        "--dataset_dir", f"{mounts}/data", "--output_dir", f"{mounts}/out", "--epochs", "5", "--channels", "[4,8]"
    ]  # fmt: skip


@pytest.mark.parametrize("typed", [["--output_dir", "/x"], ["--output_dir=/x"], ["--output", "/x"]])
def test_what_is_typed_is_not_filled_in(mounts, typed):
    (mounts / "out").rmdir()  # nor looked at
    _, arguments = command(["inference", *typed])
    assert sum("output_dir" in argument for argument in arguments) == 1
    assert arguments[-2:] == ["--output_dir", "/x"]


def test_other_kinds_of_contexts_need_no_context_folder(mounts):
    shutil.rmtree(mounts / "context" / "imagesTr")
    with pytest.raises(FileNotFoundError, match=r"nothing is mounted at .*context: add -v .*--context_dir"):
        command(["inference"])
    for option in ("--context_images", "--context_file"):
        assert "--context_dir" not in command(["inference", option, "x"])[1]


def test_missing_data_and_an_output_that_cannot_be_written(mounts):
    shutil.rmtree(mounts / "data" / "imagesTr")
    with pytest.raises(FileNotFoundError, match=r"nothing is mounted at .*data: add -v YOUR_FOLDER"):
        command(["train_stage1"])
    (mounts / "out").rmdir()
    with pytest.raises(PermissionError, match=r"cannot write into .*out as user \d+ .*--user"):
        command(["demo"])


def test_the_image_lets_others_reach_what_it_serves_and_the_console_command_does_not(mounts):
    assert "0.0.0.0" in command(["tensorboard"])[1]
    assert "0.0.0.0" not in verbs.command(["tensorboard", str(mounts)])[1]


def test_raw_forms(mounts):
    assert command(["run", "--config_file", "a.json", "--x", "1"]) == (
        "monai.bundle", ["run", "--config_file", "a.json", "--x", "1"]
    )  # fmt: skip
    assert command(["python", "-m", "monai.bundle", "run", "--help"]) == ("monai.bundle", ["run", "--help"])
    with pytest.raises(ValueError, match="did you mean train_stage1"):
        command(["trian_stage1"])
    with pytest.raises(ValueError, match="unknown command xyzzy "):
        command(["xyzzy"])


def test_help_needs_no_mounts_and_lists_every_verb():
    assert all(f"  {name} " in help_text() for name in VERBS)
    assert command(["train_stage2", "--help"])[1][-2:] == ["--help", "true"]
    assert command(["prepare_data", "--help"]) == ("scripts.prepare_data", ["--help"])


def test_it_runs_a_module_as_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.container", "inference", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "--context_size" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "-m", "scripts.container", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: unknown command nonsense")
    assert os.linesep not in done.stderr.strip()


def test_the_entry_point_starts_without_torch_and_monai():
    """They take seconds to import, which the command that it starts has to spend anyway."""
    modules = "scripts.container, scripts.apps.command.__main__"
    code = f"import sys, {modules}; print(sorted({{'torch', 'monai'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
