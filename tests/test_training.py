"""Both training stages through their configurations, on tiny synthetic cohorts."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.checkpoint import load_network, read_checkpoint
from scripts.checkpoint.commands import compact
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.networks import Neuroverse3D
from scripts.runtime.output_folder import STATE
from scripts.training.engine import GroupTrainer, episode_scores, prepare_episode
from tests.workflows import SMALL, run_workflow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cohorts(folder, cohorts=1, subjects=8, spatial_size=16, num_labels=2, progress=False)
    return folder


def train(output_dir, stage="stage1", **options):
    run_workflow(f"train_{stage}", output_dir=str(output_dir), **(SMALL | options))
    return output_dir / stage


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same_weights(a, b):
    first, second = load_network(a).state_dict(), load_network(b).state_dict()
    return all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), dataset_dir=str(data))


def test_a_run_leaves_its_files(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "model.pt", "last.pt", "tensorboard", "config.json", "manifest.json", "metrics.csv", "splits.json", "rows.json",
        ".neuroverse3d",
    }  # fmt: skip
    assert [row["epoch"] for row in rows(finished)] == ["1", "2"]
    assert all(0 <= float(row["val_dice"]) <= 1 and float(row["val_loss"]) > 0 for row in rows(finished))
    config = json.loads((finished / "config.json").read_text())
    assert config["channels"] == [4, 8] and config["spatial_size"] == [16, 16, 16]
    split = json.loads((finished / "splits.json").read_text())
    parts = [set(split[part].get("Dataset900_Synthetic000", [])) for part in ("train", "val", "test")]
    assert len(parts[0]) + len(parts[1]) == 8 and not parts[0] & parts[1]


def test_checkpoint_knows_its_network(finished):
    network = load_network(finished / "model.pt")
    assert network.channels == (4, 8) and network.grid.tolist() == [16, 16, 16]


def test_tensorboard_has_scalars_and_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    assert {"train_loss", "val_loss", "train_dice", "val_dice"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["validation/Dataset900_Synthetic000/segmentation"]


def test_same_seed_same_weights_and_another_seed_others(finished, data, tmp_path):
    assert same_weights(finished / "model.pt", train(tmp_path / "a", dataset_dir=str(data)) / "model.pt")
    assert not same_weights(finished / "model.pt", train(tmp_path / "b", dataset_dir=str(data), seed=1) / "model.pt")


def test_resumed_run_equals_an_uninterrupted_one(finished, data, tmp_path):
    half = train(tmp_path, dataset_dir=str(data), epochs=1)
    assert len(rows(half)) == 1
    train(tmp_path, dataset_dir=str(data), epochs=2, resume=True)
    assert same_weights(half / "last.pt", finished / "last.pt")
    drop = ("seconds",)
    strip = [{k: v for k, v in row.items() if k not in drop} for row in rows(half)]
    assert strip == [{k: v for k, v in row.items() if k not in drop} for row in rows(finished)]
    before, after = (read_checkpoint(f / "last.pt") for f in (finished, half))
    assert before["best"] == after["best"] and before["lr_scheduler"] == after["lr_scheduler"]


def test_resume_keeps_a_better_model(data, tmp_path):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1)
    content = read_checkpoint(folder / "last.pt")
    content["best"] = {"value": 0.0}  # nothing can be better
    torch.save(content, folder / "last.pt")
    shutil.copy(folder / "model.pt", tmp_path / "kept.pt")
    train(tmp_path, dataset_dir=str(data), epochs=2, resume=True)
    assert same_weights(folder / "model.pt", tmp_path / "kept.pt")


def test_a_finished_run_is_not_overwritten_unasked(data, tmp_path):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1)
    stamp = (folder / "model.pt").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--resume true"):
        train(tmp_path, dataset_dir=str(data), epochs=1)
    with pytest.raises(ValueError, match="already finished epoch 1"):
        train(tmp_path, dataset_dir=str(data), epochs=1, resume="TRUE")
    assert (folder / "model.pt").stat().st_mtime_ns == stamp
    train(tmp_path, dataset_dir=str(data), epochs=1, overwrite=True)
    assert len(rows(folder)) == 1


def test_overwrite_deletes_nothing_before_all_is_in_order(data, tmp_path):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1)
    before = load_network(folder / "model.pt").state_dict()
    with pytest.raises(FileNotFoundError):
        train(tmp_path, dataset_dir=str(tmp_path / "nowhere"), epochs=1, overwrite=True)
    assert (folder / "model.pt").is_file() and (folder / "last.pt").is_file()
    options = {"learning_rate": 0.0, "channels": None, "init_checkpoint": str(folder / "model.pt")}
    train(tmp_path, dataset_dir=str(data), epochs=1, overwrite=True, **options)  # from its own weights
    after = load_network(folder / "model.pt").state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_resume_keeps_the_split(data, tmp_path):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1, test_fraction=0.25)
    split = json.loads((folder / "splits.json").read_text())
    train(tmp_path, dataset_dir=str(data), epochs=2, resume=True)  # without --test_fraction
    assert json.loads((folder / "splits.json").read_text()) == split


def test_cases_given_directly(data, tmp_path):
    images = sorted((data / "Dataset900_Synthetic000" / "imagesTr").iterdir())
    pairs = [{"image": str(p), "label": str(p).replace("imagesTr", "labelsTr").replace("_0000", "")} for p in images]
    options = {"train#dataset#data": pairs[:6], "validate#dataset#data": pairs[6:], "train#trainer#max_epochs": 1}
    folder = train(tmp_path, **options)  # as MONAI Label's training task does
    assert len(rows(folder)) == 1 and not (folder / "splits.json").exists() and not (tmp_path / "cohorts").exists()


def test_nothing_to_resume(data, tmp_path):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1, resume=True)
    assert len(rows(folder)) == 1, "there was nothing, so it begins"
    (folder / "last.pt").unlink()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(tmp_path, dataset_dir=str(data), resume=True)


def test_resume_with_another_learning_rate_scales_the_schedule(data, tmp_path):
    options = {"dataset_dir": str(data), "lr_patience": 100}
    train(tmp_path, epochs=1, learning_rate=1e-3, **options)
    folder = train(tmp_path, epochs=2, learning_rate=5e-4, resume=True, **options)
    assert [float(row["learning_rate"]) for row in rows(folder)] == pytest.approx([1e-3, 5e-4])
    assert read_checkpoint(folder / "last.pt")["lr_scheduler"]["min_lrs"] == pytest.approx([5e-6])


def test_resume_refuses_what_would_make_it_another_run(data, tmp_path):
    train(tmp_path, dataset_dir=str(data), epochs=1)
    for other in ({"groups_per_epoch": 3}, {"seed": 5}, {"spatial_size": 24}):
        with pytest.raises(ValueError, match=f"--{next(iter(other))} .*: keep that when resuming"):
            train(tmp_path, dataset_dir=str(data), epochs=2, resume=True, **other)


def test_stage_two_goes_on_from_stage_one(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "stage1")
    options = SMALL | {"dataset_dir": str(data), "channels": None, "epochs": 3, "context_size": [1, 6]}
    folder = train(tmp_path, "stage2", **options)
    sizes = {int(row["context_size"]) for row in rows(folder)}
    assert sizes <= set(range(1, 7)) and len(sizes) > 1
    assert load_network(folder / "model.pt").channels == (4, 8)
    assert json.loads((folder / "splits.json").read_text()) == json.loads((finished / "splits.json").read_text())


def test_stage_two_keeps_stage_one_s_test_cases_out(data, tmp_path):
    first = train(tmp_path, dataset_dir=str(data), epochs=1, test_fraction=0.25)
    second = train(tmp_path, "stage2", dataset_dir=str(data), epochs=1)  # without --test_fraction
    splits = [json.loads((folder / "splits.json").read_text()) for folder in (first, second)]
    assert splits[0] == splits[1] and sum(map(len, splits[0]["test"].values())) == 2


def test_stage_two_without_stage_one(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stage1/model\.pt"):
        train(tmp_path, "stage2", dataset_dir=str(data))


def test_channels_that_contradict_the_checkpoint(finished, data, tmp_path):
    with pytest.raises(ValueError, match=r"--channels \(8, 8\) contradicts .*\(4, 8\)"):
        train(tmp_path, dataset_dir=str(data), channels=[8, 8], init_checkpoint=str(finished / "model.pt"))


def test_without_a_dataset_it_trains_on_synthetic_cohorts(tmp_path):
    folder = train(tmp_path, epochs=1)
    assert (folder / "model.pt").is_file() and not (tmp_path / "cohorts").exists()
    assert json.loads((folder / "rows.json").read_text())[0]["sources"] == ["synthetic"]
    train(tmp_path, "stage2", epochs=1, context_size=2)


def test_early_stopping_by_flag(data, tmp_path):
    options = {"dataset_dir": str(data), "learning_rate": 0.0, "epochs": 6, "early_stop_patience": 2}
    assert len(rows(train(tmp_path / "a", early_stop="True", **options))) == 3
    resumed = {**options, "epochs": 2}
    train(tmp_path / "c", early_stop=True, **resumed)  # the count goes on after a resume
    assert len(rows(train(tmp_path / "c", early_stop=True, resume=True, **options))) == 3
    assert len(rows(train(tmp_path / "b", early_stop="false", **(options | {"epochs": 4})))) == 4


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    with pytest.raises(FloatingPointError, match="--learning_rate"):
        train(tmp_path, dataset_dir=str(data), learning_rate=1e30, epochs=3)


def test_plateau_lowers_the_learning_rate(data, tmp_path):
    options = {"dataset_dir": str(data), "learning_rate": 1e-12, "epochs": 3, "lr_patience": 0}
    rates = [float(row["learning_rate"]) for row in rows(train(tmp_path, **options))]
    assert rates[-1] < rates[0]


def test_two_groups_per_step(data, tmp_path):
    assert (train(tmp_path, dataset_dir=str(data), batch_size=2, epochs=1) / "model.pt").is_file()


def test_faulty_cases_end_the_run_unless_skipped(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    images = sorted((tmp_path / "data" / "Dataset900_Synthetic000" / "imagesTr").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:200])
    with pytest.raises(ValueError, match=images[0].name.removesuffix("_0000.nii.gz")):
        train(tmp_path / "out", dataset_dir=str(tmp_path / "data"))
    assert not (tmp_path / "out" / "stage1" / "model.pt").exists()
    train(tmp_path / "out", dataset_dir=str(tmp_path / "data"), epochs=1, skip_bad_cases="true")


KILLED = """
import json, os, signal, sys
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

where, options = sys.argv[1], json.loads(sys.argv[2])
workflow = ConfigWorkflow("configs/train_stage1.json", workflow_type="train", **options)
workflow.initialize()
trainer = workflow.parser.get_parsed_content("train#trainer")
def send(number):
    return lambda engine: os.kill(os.getpid(), number)

if where == "mid-epoch":
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), send(signal.SIGKILL))
elif where == "asked mid-epoch":
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), send(signal.SIGTERM))
elif where == "asked in validation":
    evaluator = workflow.parser.get_parsed_content("validate#evaluator")
    evaluator.add_event_handler(Events.ITERATION_STARTED(once=1), send(signal.SIGTERM))
else:  # while the second last.pt is written
    save, written = torch.save, []

    def half(obj, f, **options):
        save(obj, f, **options)
        written.append(f)
        if sum("last.pt" in str(name) for name in written) == 2:
            with open(f, "r+b") as file:
                file.truncate(os.path.getsize(f) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
workflow.run()
workflow.finalize()
"""


def killed(where, options, output_dir):
    options = SMALL | options | {"output_dir": str(output_dir)}
    command = [sys.executable, "-c", KILLED, where, json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("where", ["mid-epoch", "while writing"])
def test_a_run_that_was_killed_ends_with_the_same_weights(finished, data, tmp_path, where):
    done = killed(where, {"dataset_dir": str(data)}, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "stage1"
    assert read_checkpoint(folder / "last.pt")["trainer"]["iteration"] == 2, "the end of the first epoch"
    assert bool(list(folder.glob(f"{STATE}-*"))) == (where == "while writing")
    train(tmp_path, dataset_dir=str(data), resume=True)
    assert same_weights(folder / "last.pt", finished / "last.pt")
    assert same_weights(folder / "model.pt", finished / "model.pt")
    assert [row["train_loss"] for row in rows(folder)] == [row["train_loss"] for row in rows(finished)]
    assert [path.name for path in folder.glob(".*")] == [STATE]


def compare_runs(folder, finished):
    assert same_weights(folder / "last.pt", finished / "last.pt")
    assert same_weights(folder / "model.pt", finished / "model.pt")
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(f)] for f in (folder, finished)]
    assert strip[0] == strip[1]
    after, before = (read_checkpoint(f / "last.pt") for f in (folder, finished))
    assert after["best"] == before["best"] and after["lr_scheduler"] == before["lr_scheduler"]
    assert torch.equal(after["random"]["torch"], before["random"]["torch"]) and "within_epoch" not in after


@pytest.mark.parametrize(
    ("where", "step", "said"),
    [
        ("asked mid-epoch", 3, "in epoch 2 after 1 of 2 steps"),
        ("asked in validation", 2, "after epoch 1"),
    ],
)
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(finished, data, tmp_path, where, step, said):
    done = killed(where, {"dataset_dir": str(data)}, tmp_path)
    assert done.returncode == 143, done.stderr
    folder = tmp_path / "stage1"
    assert read_checkpoint(folder / "last.pt")["trainer"]["iteration"] == step
    train(tmp_path, dataset_dir=str(data), resume=True)
    compare_runs(folder, finished)


def test_a_stop_waits_for_the_optimiser_step_that_gradients_are_gathered_for(data, tmp_path):
    options = {"dataset_dir": str(data), "groups_per_epoch": 5, "epochs": 1, "accumulation_steps": 6}
    whole = train(tmp_path / "whole", **options)
    done = killed("asked mid-epoch", options, tmp_path / "stopped")
    assert done.returncode == 143, done.stderr
    folder = tmp_path / "stopped" / "stage1"
    assert read_checkpoint(folder / "last.pt")["trainer"]["iteration"] == 4  # three episodes a group
    train(tmp_path / "stopped", resume=True, **options)
    compare_runs(folder, whole)


def test_sigterm_to_all_processes_of_a_run(data, tmp_path):
    """As torchrun and Slurm send it: to the loading process, too, whose end must not end the step."""
    options = SMALL | {"dataset_dir": data, "output_dir": tmp_path, "spatial_size": 32, "channels": [16, 32]}
    options |= {"epochs": 1000, "groups_per_epoch": 1000, "num_workers": 1}
    typed = [token for name, value in options.items() for token in (f"--{name}", str(value).replace(" ", ""))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train_stage1.json", *typed]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        line = next(line for line in process.stdout if "training" in line)
        next(line for line in process.stderr if "loss=" in line)  # groups are being loaded
        os.killpg(process.pid, signal.SIGTERM)
        try:
            rest, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143 and "--resume true" in rest, line + rest


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(data, tmp_path, monkeypatch):
    folder = train(tmp_path, dataset_dir=str(data), epochs=1)
    before = (folder / "last.pt").read_bytes()

    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*\.pt: is the disk full \(\d+ MB free\)\?"):
        train(tmp_path, dataset_dir=str(data), epochs=2, resume=True)
    assert (folder / "last.pt").read_bytes() == before


@pytest.mark.parametrize("amp", [False, True])
def test_the_pretraining_overlay_learns_masks_and_images(tmp_path, amp):
    rows = [{"dataset": "synthetic"}, {"dataset": "synthetic", "task": "gaussian_denoising"}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    options = SMALL | {"output_dir": str(tmp_path), "collection_file": str(tmp_path / "rows.json"), "amp": amp}
    options |= {"init_checkpoint": None, "epochs": 1, "groups_per_epoch": 6, "batch_size": 1, "val_interval": 1}
    workflow = ConfigWorkflow(
        ["configs/train_stage2.json", "configs/pretrain.json"], workflow_type="train", logging_file=False, **options
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    (row,) = csv.DictReader((tmp_path / "stage2" / "metrics.csv").open())
    assert 0 <= float(row["train_dice"]) <= 1 and float(row["train_psnr"]) > 0
    assert 0 < float(row["train_loss"]) < 20


def test_aligned_pretraining_keeps_the_weights_of_every_epoch_to_average(tmp_path):
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), tmp_path / "first.pt")
    options = SMALL | {"output_dir": str(tmp_path), "init_checkpoint": str(tmp_path / "first.pt"), "channels": None}
    options |= {"epochs": 2, "groups_per_epoch": 2, "batch_size": 1, "val_interval": 9, "context_size": [1, 2]}
    configs = [f"configs/{name}.json" for name in ("train_stage2", "pretrain", "pretrain_aligned")]
    workflow = ConfigWorkflow(configs, workflow_type="train", logging_file=False, **options)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    kept = sorted((tmp_path / "stage2").glob("network_epoch=*.pt"))
    assert len(kept) == 2
    compact([str(file) for file in kept], str(tmp_path / "mean.pt"))
    mean, last = (load_network(file).state_dict() for file in (tmp_path / "mean.pt", kept[-1]))
    assert any(not torch.equal(mean[name], last[name]) for name in mean)


def test_several_tasks_in_one_run(data, tmp_path):
    described = [
        {"dataset": "Dataset900_Synthetic000"},
        {"dataset": "Dataset900_Synthetic000", "task": "inpainting", "loss_weight": 0.5},
        {"dataset": "synthetic", "task": "gaussian_denoising"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": described}))
    options = {"groups_per_epoch": 4, "val_groups": 3}
    options |= {"dataset_dir": str(data), "collection_file": str(tmp_path / "rows.json")}
    folder = train(tmp_path, epochs=2, **options)
    (first, *_) = rows(folder)
    assert 0 <= float(first["val_dice"]) <= 1 and float(first["val_psnr"]) > 0
    used = json.loads((folder / "rows.json").read_text())
    assert [(row["task"], row["loss_weight"]) for row in used] == [
        ("segmentation", 1), ("inpainting", 0.5), ("gaussian_denoising", 1)
    ]  # fmt: skip
    only = train(tmp_path / "only", epochs=1, task="inpainting", **options)
    assert [row["task"] for row in json.loads((only / "rows.json").read_text())] == ["inpainting"]
    assert rows(only)[0]["val_dice"] == "" and float(rows(only)[0]["train_psnr"]) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "TRUE"},
        {"amp": True, "amp_dtype": "float16"},
        {"activation_checkpointing": True, "accumulation_steps": 3},
        {"augment": "false", "unpair_fraction": 0.5},
        {"gin_prob": 1.0, "flip_prob": 1.0, "elastic_prob": 1.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_options_of_the_step(data, tmp_path, options):
    folder = train(tmp_path, dataset_dir=str(data), epochs=2, **options)
    assert all(float(row["val_loss"]) > 0 for row in rows(folder))


@pytest.mark.parametrize("made_for_it", [True, False])
def test_a_resumed_run_keeps_to_its_precision_on_any_hardware(data, tmp_path, monkeypatch, made_for_it):
    for epochs, here in ((1, not made_for_it), (2, made_for_it)):
        monkeypatch.setattr("scripts.runtime.precision.is_fast", lambda *_, here=here: here)
        folder = train(tmp_path, dataset_dir=str(data), epochs=epochs, resume=epochs > 1)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["options"]["amp"] is not made_for_it


def test_augmentation_is_part_of_training_unless_switched_off(finished, data, tmp_path):
    plain = train(tmp_path, dataset_dir=str(data), augment="False")
    assert not same_weights(plain / "last.pt", finished / "last.pt")


class Counting(torch.nn.Module):
    """Remembers which target it saw; one parameter to train."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.seen.append((target_in.mean().item(), context_in.mean((0, 2, 3, 4, 5)).tolist(), mini_context_size))
        return target_in * self.scale


def test_every_member_in_turn_is_the_target_with_one_step_each():
    group = torch.arange(3.0).reshape(1, 3, 1, 1, 1, 1).expand(1, 3, 1, 4, 4, 4)
    network = Counting()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(network.scale.item()))
    trainer = GroupTrainer(
        "cpu",
        1,
        [
            {
                "image": group,
                "label": (group > 0).float(),
                "loss_weight": torch.ones(1),
                "generation": torch.tensor([False]),
            }
        ],
        network,
        optimizer,
        torch.nn.MSELoss(),
        prepare_batch=prepare_episode,
        to_kwargs={"mini_context_size": 2},
        decollate=False,
    )
    trainer.run()
    assert [target for target, _, _ in network.seen] == [0.0, 1.0, 2.0]
    assert [contexts for _, contexts, _ in network.seen] == [[1.0, 2.0], [0.0, 2.0], [0.0, 1.0]]
    assert {size for _, _, size in network.seen} == {2} and len(steps) == 3


def test_scores_suit_the_task():
    label = torch.zeros(2, 1, 4, 4, 4)
    label[..., :2] = 1
    masks, images = torch.tensor([False, False]), torch.tensor([True, True])
    assert episode_scores(label, label, masks) == {"dice": 1, "psnr": None}
    assert episode_scores(1 - label, label, masks)["dice"] == 0
    assert episode_scores(0 * label, 0 * label, masks)["dice"] == 1
    found = episode_scores(label + 0.1, label, images)
    assert found["dice"] is None and found["psnr"] == pytest.approx(20, abs=1e-3)
    mixed = episode_scores(torch.stack((label[0], label[1] + 0.01)), label, torch.tensor([False, True]))
    assert mixed["dice"] == 1 and mixed["psnr"] == pytest.approx(40, abs=1e-2)
