"""Weights & Biases, in the place of which a stand-in takes notes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

from scripts.training.handlers import WandbMetrics, require_wandb


class NotedRun:
    def __init__(self, **options):
        self.options, self.defined, self.logged, self.finished = options, [], [], False

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that were started, in a module that stands for wandb."""
    started = []
    module = ModuleType("wandb")
    module.init = lambda **options: started.append(NotedRun(**options)) or started[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    return started


@pytest.fixture
def train(tmp_path):
    """Two epochs of nothing, validated in the second one."""

    def trained(stop=False):
        trainer, evaluator = (Engine(lambda engine, batch: None) for _ in range(2))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

        @trainer.on(Events.EPOCH_COMPLETED)
        def _(engine):
            engine.state.metrics["train_loss"] = torch.tensor(float(engine.state.epoch))
            optimizer.param_groups[0]["lr"] /= 2
            if engine.state.epoch == 2:
                evaluator.state.epoch, evaluator.state.metrics = 2, {"val_loss": 7.0}
            if stop:
                engine.terminate()

        config = {"epochs": 2, "seed": 3, "train": {"trainer": "..."}, "dataset_dir": "DATA"}
        handler = WandbMetrics(tmp_path / "OUT" / "stage1", evaluator, optimizer, config)
        handler.attach(trainer)
        trainer.run([0], max_epochs=2)
        return trainer

    return trained


def test_every_epoch_is_logged(runs, train):
    train()
    (run,) = runs
    assert run.logged == [
        {"epoch": 1, "train_loss": 1.0, "learning_rate": 0.05},
        {"epoch": 2, "train_loss": 2.0, "val_loss": 7.0, "learning_rate": 0.025},
    ]
    assert all(type(value) in (int, float) for values in run.logged for value in values.values())
    assert run.defined == [("*", "epoch")] and run.finished


def test_what_the_run_is_called(runs, train, tmp_path, monkeypatch):
    train()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    train()
    first, second = (run.options for run in runs)
    assert first["config"] == {"epochs": 2, "seed": 3, "dataset_dir": "DATA"}, "options only"
    assert (first["project"], first["group"], first["job_type"]) == ("neuroverse3d", "OUT", "stage1")
    assert (second["project"], second["group"]) == ("mine", "ours")
    assert first["dir"] == str(tmp_path / "OUT" / "stage1") and (tmp_path / "OUT" / "stage1").is_dir()


def test_a_run_that_stops_early_is_closed(runs, train):
    train(stop=True)
    assert len(runs[0].logged) == 1 and runs[0].finished


def test_nothing_is_started_before_the_training(runs):
    WandbMetrics("run", SimpleNamespace(), None, {})
    assert not runs


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb") as error:
        require_wandb()
    assert "\n" not in str(error.value)
    with pytest.raises(ImportError, match="pip install wandb"):
        WandbMetrics("run", SimpleNamespace(), None, {})
