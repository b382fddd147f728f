"""Option values, misspelt overrides, help, one-line errors; a few through a real command line."""

import logging
import subprocess
import sys

import pytest
from monai.bundle import ConfigWorkflow

from scripts.runtime.commandline import _without_debug, install_one_line_errors, refuse_unknown, root_cause
from scripts.runtime.options import OPTIONS, flag, normalise

CONFIG = {"epochs": 1, "train": {"trainer": {"_target_": "x", "max_epochs": 3}, "handlers": [{"_target_": "y"}]}}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("text", ["true", "TRUE", "True", True, 1, "1"])
def test_true(text):
    assert flag(text) is True


@pytest.mark.parametrize("text", ["false", "FALSE", "False", False, 0, "none", None])
def test_false(text):
    assert flag(text) is False


@pytest.mark.parametrize("name", [n for n, option in OPTIONS.items() if option.kind == "flag"])
def test_every_flag_takes_false_from_a_command_line(name):
    assert normalise(name, "false") is False


@pytest.mark.parametrize("config", ["train_stage1", "train_stage2", "inference", "evaluate"])
@pytest.mark.parametrize("typed", ["false", "False", "FALSE"])
def test_flags_of_a_workflow_become_booleans(config, typed):
    workflow = ConfigWorkflow(f"configs/{config}.json", workflow_type=None)
    flags = [name for name in workflow.parser.config if name in OPTIONS and OPTIONS[name].kind == "flag"]
    workflow = ConfigWorkflow(f"configs/{config}.json", workflow_type=None, **dict.fromkeys(flags, typed))
    workflow.initialize()
    assert len(flags) >= 3 and all(workflow.parser.get_parsed_content(name) is False for name in flags)


@pytest.mark.parametrize(
    ("arguments", "debug", "rest"),
    [
        ("--source a --debug", True, "--source a"),
        ("--debug true --source a", True, "--source a"),
        ("--debug --source a", True, "--source a"),
        ("--debug=false convert a", False, "convert a"),
        ("convert true", False, "convert true"),
    ],
)
def test_debug_takes_its_value_along(arguments, debug, rest):
    assert _without_debug(arguments.split()) == (debug, rest.split())


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("spatial_size", 32, [32, 32, 32]),
        ("spatial_size", (32, 48, 32), [32, 48, 32]),
        ("spatial_size", "32,48,32", [32, 48, 32]),
        ("channels", "[16, 32]", [16, 32]),
        ("channels", "None", None),
        ("context_size", 3, 3),
        ("context_size", "[2,9]", [2, 9]),
        ("labels", 2, [2]),
        ("datasets", "Dataset001", ["Dataset001"]),
        ("datasets", "['A','B']", ["A", "B"]),
        ("learning_rate", "1e-5", 1e-5),
        ("channel", "0001", 1),
        ("dataset_dir", 4, "4"),
    ],
)
def test_values_get_their_type(name, value, expected):
    assert normalise(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spatial_size", "32,48"),
        ("context_size", "[9,2]"),
        ("context_size", 0),
        ("epochs", 1.5),
        ("epochs", "many"),
        ("amp", "perhaps"),
        ("dataset_dir", "/data/run#3"),
        ("dataset_dir", "/data/run::3"),
        ("output_dir", ("run", 1)),
        ("epochs", 0),
        ("val_interval", -1),
    ],
)
def test_values_that_make_no_sense_name_the_option(name, value):
    with pytest.raises(ValueError, match=f"--{name}"):
        normalise(name, value)


@pytest.mark.parametrize(
    "key", ["epochs", "train#trainer#max_epochs", "train::trainer::new_argument", "train#handlers#0"]
)
def test_known_overrides(key):
    refuse_unknown([key], CONFIG)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("epoch", "did you mean --epochs"),
        ("train#trainr#max_epochs", "did you mean --trainer"),
        ("train#handlers#4", "unknown option"),
        ("epochs#x", "has no part x"),
        ("zzz", "--help true lists them"),
    ],
)
def test_unknown_overrides(key, hint):
    with pytest.raises(ValueError, match=hint):
        refuse_unknown([key], CONFIG)


def test_root_cause_strips_only_monai_s_wrappers():
    inner = ValueError("inner")
    inner.__cause__ = KeyError("low level")
    outer = RuntimeError("Failed to evaluate x")
    outer.__cause__ = inner
    assert root_cause(outer) is inner


def test_misspelt_override_ends_a_real_run(tmp_path):
    result = run("monai.bundle", "run", "--config_file", "configs/train_stage1.json", "--epoch", "3")
    assert result.returncode == 1
    assert "error: unknown option --epoch: did you mean --epochs?" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_key_over_several_files(tmp_path):
    (tmp_path / "more.json").write_text('{"extra": 1}')
    files = f"['configs/inference.json','{tmp_path}/more.json']"
    result = run("monai.bundle", "run", "--config_file", files, "--extra", "2", "--overlay", "false")
    assert result.returncode == 1 and "--overlay: did you mean --overlays?" in result.stderr


def test_help_lists_the_options_and_starts_nothing(tmp_path):
    result = run(
        "monai.bundle",
        "run",
        "--config_file",
        "configs/inference.json",
        "--help",
        "true",
        "--output_dir",
        str(tmp_path / "o"),
    )
    assert result.returncode == 0
    assert "--context_size" in result.stdout and "default: 8" in result.stdout
    assert not (tmp_path / "o").exists()


def test_bad_data_is_one_line_and_debug_shows_more(tmp_path):
    arguments = ("run", "--config_file", "configs/train_stage1.json", "--dataset_dir", str(tmp_path / "no where"))
    arguments = (*arguments, "--output_dir", str(tmp_path / "out"), "--channels", "[2,4]", "--spatial_size", "8")
    result = run("monai.bundle", *arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "no where" in errors[0] and "--dataset_dir" in errors[0]
    assert "Traceback" in run("monai.bundle", *arguments, "--debug", "true").stderr


def test_function_command_lines_check_their_flags_first(tmp_path):
    result = run("scripts.synthesize", "--output_dir", str(tmp_path / "x"), "--cohrts", "1")
    assert result.returncode == 1 and "did you mean --cohorts?" in result.stderr and not (tmp_path / "x").exists()
    result = run(
        "scripts.checkpoint", "convert", "--source", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "b.pt")
    )
    assert result.returncode == 1 and "error: no checkpoint at" in result.stderr and "Traceback" not in result.stderr
    assert run("scripts.checkpoint", "--help").returncode == 0


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)\n",
    ],
)
def test_too_little_shared_memory_comes_with_its_remedies(message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    ignite = logging.getLogger("ignite")
    monkeypatch.setattr(ignite, "level", ignite.level)
    install_one_line_errors(debug=False)
    for text, hint in ((message, True), ("something else", False)):
        sys.excepthook(RuntimeError, RuntimeError(text), None)
        said = capsys.readouterr().err
        assert said.startswith("error: RuntimeError: ") and ("--ipc=host" in said) == hint
        assert said.count("RuntimeError") == said.count("\n") == 1
