"""Experiment tracking through the configurations: MONAI's ``--tracking mlflow``, and ``--wandb true``."""

import csv
import sys
from types import ModuleType

import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.runtime.commandline import _tracking_ids
from tests.workflows import SMALL, run_workflow

OPTIONS = SMALL | {"val_groups": 1, "val_interval": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cohorts(folder, cohorts=1, subjects=8, spatial_size=16, num_labels=2, progress=False)
    return folder


def train(data, output_dir, tracking=None, stage="stage1", **options):
    options = OPTIONS | {"dataset_dir": str(data), "output_dir": str(output_dir)} | options
    return run_workflow(f"train_{stage}", tracking=tracking, **options)


def rows(folder):
    with (folder / "stage1" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class Recorder:
    """Reads what MONAI's MLflow handler reads, in the same places."""

    def __init__(self, output_transform=None, tag_name="", iteration_log=True, **_):
        self.transform, self.tag, self.iteration_log, self.noted = output_transform, tag_name, iteration_log, []

    def attach(self, engine: Engine):
        if self.iteration_log:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.epoch)

    def iteration(self, engine):
        self.noted.append((self.tag, engine.state.iteration, float(self.transform(engine.state.output))))

    def epoch(self, engine):
        self.noted += [(name, engine.state.epoch, float(value)) for name, value in engine.state.metrics.items()]


def test_the_handler_that_monai_adds_can_read_the_trainer_s_loss(data, tmp_path, monkeypatch):
    # the package mlflow is not needed to see what its handler would be given
    monkeypatch.setattr(Recorder, "__module__", "monai.handlers.mlflow_handler")  # where MONAI looks for it
    monkeypatch.setattr("monai.handlers.mlflow_handler.MLFlowHandler", Recorder)
    workflow = train(data, tmp_path, tracking="mlflow")
    trainer, validator = (workflow.parser.get_parsed_content(f"{part}#handlers")[-1] for part in ("train", "validate"))
    losses = [noted for noted in trainer.noted if noted[0] == "train_iteration_loss"]
    assert [step for _, step, _ in losses] == [1, 2, 3, 4], "an iteration's loss has a name of its own"
    means = {step: value for name, step, value in trainer.noted if name == "train_loss"}
    assert means == pytest.approx({1: sum(v for *_, v in losses[:2]) / 2, 2: sum(v for *_, v in losses[2:]) / 2})
    assert {(name, step) for name, step, _ in validator.noted} == {("val_loss", 2), ("val_dice", 2)}


@pytest.mark.parametrize(
    ("config", "kind"), [("train_stage1", "train"), ("train_stage2", "train"), ("inference", "infer")]
)
def test_tracking_leaves_a_workflow_sound(config, kind, tmp_path):
    workflow = ConfigWorkflow(
        f"configs/{config}.json", workflow_type=kind, tracking="mlflow", output_dir=str(tmp_path), spatial_size=16
    )
    workflow.initialize()
    handlers = workflow.parser.get("handlers" if kind == "infer" else "train#handlers")
    assert handlers[-1]["_target_"] == "MLFlowHandler"
    assert handlers[-1].get("tag_name") == (None if kind == "infer" else "train_iteration_loss")


@pytest.mark.parametrize("typed", [["--tracking", "mlflow"], ["--tracking=mlflow"]])
def test_what_tracking_adds_may_be_overridden(typed, monkeypatch):
    monkeypatch.setattr("scripts.runtime.commandline.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install mlflow"):
        _tracking_ids(["monai.bundle", "run", *typed])
    monkeypatch.setattr("scripts.runtime.commandline.find_spec", lambda name: name)
    added = _tracking_ids(["monai.bundle", "run", *typed])
    assert {"experiment_name", "run_name", "tracking_uri", "save_execute_config"} <= set(added)
    assert not {"trainer", "validator", "evaluator"} & set(added)
    assert _tracking_ids(["monai.bundle", "run", "--experiment_name", "mine"]) == {}


def test_mlflow_keeps_losses_and_metrics(data, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the optional package mlflow is not installed")
    names = {"experiment_name": "tiny", "run_name": "first"}
    train(data, tmp_path, tracking="mlflow", save_execute_config=str(tmp_path / "mlflow.json"), **names)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")

    def history(name):
        return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}

    assert list(history("train_iteration_loss")) == [1, 2, 3, 4]
    table = rows(tmp_path)
    assert history("train_loss") == pytest.approx(
        {i: float(row["train_loss"]) for i, row in enumerate(table, 1)}, abs=1e-5
    )
    assert history("val_loss") == pytest.approx({2: float(table[1]["val_loss"])}, abs=1e-5)
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["mlflow.json"]


class StandIn(ModuleType):
    """Notes what wandb is told."""

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.config = [], None

    def init(self, config, **_):
        self.config = config
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.logged.append("finished")


def test_wandb_gets_what_metrics_csv_gets(data, tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(data, tmp_path, wandb="true")
    table, (*epochs, end) = rows(tmp_path), wandb.logged
    assert end == "finished" and len(epochs) == 2 and wandb.config["epochs"] == 2 and wandb.config["wandb"] is True
    for row, epoch in zip(table, epochs, strict=True):
        for name, value in epoch.items():
            assert value == pytest.approx(float(row[name]), abs=1e-5), name
    assert "val_loss" in epochs[1] and "val_loss" not in epochs[0]


def test_wandb_is_off_by_default(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(data, tmp_path, epochs=1)


def test_only_the_first_process_reports(data, tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    train(data, tmp_path, epochs=1, wandb=True, val_groups=2)
    assert wandb.logged == [] and wandb.config is None
    assert not list(tmp_path.glob("stage1/*")), "nor do metrics.csv, TensorBoard and weights come from it"


def test_a_missing_package_is_noticed_before_an_old_run_is_deleted(data, tmp_path, monkeypatch):
    train(data, tmp_path, epochs=1)
    before = (tmp_path / "stage1" / "last.pt").read_bytes()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(data, tmp_path, epochs=1, wandb=True, overwrite=True)
    assert (tmp_path / "stage1" / "last.pt").read_bytes() == before
