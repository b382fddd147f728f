"""Training on several processes: real ones, started by torchrun, exchanging gradients through gloo."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from scripts.checkpoint import load_network
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.runtime.processes import join_processes
from tests.workflows import SMALL, run_workflow

OPTIONS = SMALL | {"groups_per_epoch": 4, "val_groups": 3, "image_interval": 0}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cohorts(folder, cohorts=1, subjects=10, spatial_size=16, num_labels=2, progress=False)
    return folder


def start(*arguments, env=ENVIRONMENT, **options):
    return subprocess.Popen(
        [*TORCHRUN, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def command(stage, output_dir, data, **options):
    """The documented command line."""
    values = {"dataset_dir": data, "output_dir": output_dir} | OPTIONS | options
    flags = [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]
    configs = f"['configs/train_{stage}.json','configs/multi_gpu_train.json']"
    return ["-m", "monai.bundle", "run", "--config_file", configs, *flags]


STAGE2 = {"channels": None, "context_size": [1, 4]}


def stage2(folder, data, **environment):
    """Output and return code of the second stage on two ranks, and what each of them saw."""
    options = {name: value for name, value in (OPTIONS | STAGE2).items() if value is not None}
    options |= {"dataset_dir": str(data), "output_dir": str(folder)}
    process = start("tests/training_process.py", str(folder), json.dumps(options), env=ENVIRONMENT | environment)
    output, _ = process.communicate(timeout=300)
    return output, process.returncode, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def first_stage(data, tmp_path_factory):
    """Folder of a first stage, trained by one process."""
    folder = tmp_path_factory.mktemp("first")
    run_workflow("train_stage1", dataset_dir=str(data), output_dir=str(folder), **OPTIONS | {"epochs": 1})
    return folder


@pytest.fixture(scope="module")
def reports(first_stage, data, tmp_path_factory):
    """What each of the two ranks saw in the second stage, and the folder of the run."""
    folder = shutil.copytree(first_stage, tmp_path_factory.mktemp("run") / "out")
    output, status, found = stage2(folder, data)
    assert status == 0, output
    return found, folder


def test_ranks_hold_the_same_weights_at_every_step(reports):
    for report in reports[0]:
        assert report["steps"] == sum(len(cases.split()) for cases in report["cases"]), "a step for every member"
        assert report["weights_differ"] == 0


def test_ranks_train_on_different_groups(reports):
    first, second = (report["cases"] for report in reports[0])
    assert len(first) == len(second) == 4 and all(a != b for a, b in zip(first, second, strict=True))


def test_metrics_are_those_of_all_ranks(reports):
    first, second = reports[0]
    assert first["metrics"] == second["metrics"]
    for epoch, metrics in enumerate(first["metrics"]):
        losses = [loss for report in (first, second) for loss in report["losses"][2 * epoch : 2 * epoch + 2]]
        assert metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_validation_is_that_of_one_process(reports, data, tmp_path):
    folder = reports[1] / "stage2"
    best = min(metrics["val_loss"] for metrics in reports[0][0]["metrics"])
    options = OPTIONS | {"channels": None, "epochs": 1, "groups_per_epoch": 1, "learning_rate": 0.0}
    workflow = run_workflow(
        "train_stage1",
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        init_checkpoint=str(folder / "model.pt"),
        split_file=str(folder / "splits.json"),
        **options,
    )
    alone = workflow.parser.get_parsed_content("validate#evaluator").state.metrics["val_loss"]
    assert alone == pytest.approx(best, rel=1e-4), "three groups, dealt out to two ranks without repetition"


def test_one_rank_writes_and_its_weights_have_plain_names(reports):
    folder = reports[1] / "stage2"
    assert load_network(folder / "model.pt").channels == (4, 8)
    assert len(list((folder / "tensorboard").glob("events*"))) == 1
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + 2


def test_what_cannot_join_is_told_why(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="multi_gpu_train.json needs torchrun"):
        join_processes("cpu", 3)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--val_groups 1 is less than one for each of 2 processes"):
        join_processes("cpu", 1)


def test_sigterm_to_one_rank_stops_all_at_the_same_step(reports, first_stage, data, tmp_path):
    folder = shutil.copytree(first_stage, tmp_path / "out")
    output, status, seen = stage2(folder, data, STOPPED_RANK="1")
    assert status != 0 and "in epoch 2 after 1 of 2 steps" in output, output
    assert len(seen[0]["cases"]) == len(seen[1]["cases"]) == 3
    alone = shutil.copytree(folder, tmp_path / "alone")

    resumed = start(*command("stage2", folder, data, resume="true", **STAGE2))
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    ended, uninterrupted = (load_network(f / "stage2" / "last.pt").state_dict() for f in (folder, reports[1]))
    assert all(torch.equal(ended[name], uninterrupted[name]) for name in ended)
    rows = [(f / "stage2" / "metrics.csv").read_text().splitlines()[-1].split(",") for f in (folder, reports[1])]
    assert rows[0][:-1] == rows[1][:-1], "metrics of the whole epoch; the seconds are its last column"

    options = {name: value for name, value in (OPTIONS | STAGE2).items() if value is not None}
    workflow = run_workflow("train_stage2", dataset_dir=str(data), output_dir=str(alone), resume=True, **options)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 8 and trainer.state.epoch == 2, "two groups of four were done"
