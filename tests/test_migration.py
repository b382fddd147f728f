"""What docs/migration.md promises to users of other scripts, tried line by line on tiny data."""

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.checkpoint import atomic_save, convert, load_network, to_authors
from scripts.data import EpisodeDataset, Preprocessing
from scripts.data.preprocessing import fit_spacing
from scripts.data.volumes import load_volume
from scripts.evaluation import Evaluation
from scripts.networks import Neuroverse3D
from scripts.prepare_data import prepare_data
from scripts.runtime.commandline import refuse_unknown
from scripts.runtime.options import OPTIONS, normalise
from tests.workflows import run_workflow

SMALL = {
    "channels": [4, 8],
    "spatial_size": 16,
    "groups_per_epoch": 1,
    "val_groups": 1,
    "val_context_size": 2,
    "num_workers": 0,
    "image_interval": 0,
    "device": "cpu",
}
DATASETS = ("Dataset001_A", "Dataset002_B")


@pytest.fixture(scope="module")
def data(make_dataset, tmp_path_factory):
    """Two datasets of ten cases and two channels."""
    folder = tmp_path_factory.mktemp("data")
    for name in DATASETS:
        make_dataset(folder, name, cases=10, channels=(0, 1))
    return folder


def workflow_of(config, **options):
    kind = "infer" if config == "inference" else "train"
    workflow = ConfigWorkflow(f"configs/{config}.json", workflow_type=kind, **options)
    workflow.initialize()
    return workflow


def part_of(workflow, name):
    return workflow.parser.get_parsed_content(name)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A checkpoint in the authors' layout, as their LightningModel writes it."""
    path = tmp_path_factory.mktemp("weights") / "theirs.ckpt"
    torch.manual_seed(0)
    atomic_save(to_authors(Neuroverse3D(channels=(4, 8), spatial_size=16)), path)
    return path


@pytest.fixture(scope="module")
def ours(theirs):
    """The same, converted."""
    convert(str(theirs), str(theirs.with_name("ours.pt")))
    return theirs.with_name("ours.pt")


# --- the command line


@pytest.mark.parametrize(
    "old",
    "stage data_dir random_context_size max_epochs lr lr_decline_patience gradient_clip_val ell gs l "
    "num_gpus train_gpus mixed_precision precision checkpoint_path checkpoint_index checkpoint_dir "
    "train_or_val_split_rate workers no_wandb nb_inner_channels skip_resize".split(),
)
def test_an_option_of_the_other_scripts_is_refused_and_not_swallowed(old):
    config = ConfigParser.load_config_file("configs/train_stage1.json")
    if old == "stage":  # an id here too, but of no effect on which stage runs: two files are two stages
        assert config["stage"] == "stage1" and "stage" not in OPTIONS
        return
    with pytest.raises(ValueError, match="unknown option"):
        refuse_unknown([old], config)


@pytest.mark.parametrize(
    ("name", "typed", "meant"),
    [
        ("context_size", "3", 3),
        ("context_size", (2, 9), [2, 9]),
        ("datasets", "['A','B']", ["A", "B"]),
        ("sample_rate", "0.5", 0.5),
        ("val_fraction", 0.1, 0.1),
        ("channels", (32, 64, 128, 256, 512), [32, 64, 128, 256, 512]),
        ("amp", "True", True),
        ("learning_rate", "1e-6", 1e-6),
        ("context_images", ["a b,c.nii.gz", "d.nii.gz"], ["a b,c.nii.gz", "d.nii.gz"]),
        ("context_images", "a b,c.nii.gz", ["a b,c.nii.gz"]),
        ("context_labels", "['a.nii.gz','b.nii.gz']", ["a.nii.gz", "b.nii.gz"]),
        ("task", "generation", "generation"),
    ],
)
def test_values_as_typed(name, typed, meant):
    assert normalise(name, typed) == meant


def test_a_list_of_paths_without_separators_of_ids():
    with pytest.raises(ValueError, match=r"--context_images .*'#'"):
        normalise("context_images", ["a#1.nii.gz"])


# --- training


def test_every_number_of_the_recipe_arrives_where_it_works(data, tmp_path):
    probabilities = {name: 0.5 for name in OPTIONS if name.endswith("_prob")}
    workflow = workflow_of(
        "train_stage1",
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        **(SMALL | probabilities),
        epochs=7,
        learning_rate=3e-4,
        batch_size=2,
        context_size="[2,4]",
        lr_patience=3,
        grad_clip=0.5,
        mini_context_size=2,
        accumulation_steps=2,
        val_fraction=0.2,
        sample_rate=0.5,
        datasets="['Dataset001']",
        amp="true",
    )
    trainer, dataset = part_of(workflow, "train#trainer"), part_of(workflow, "train#dataset")
    assert trainer.state.max_epochs == 7 and trainer.accumulation_steps == 2 and trainer.grad_scaler is None
    assert part_of(workflow, "optimizer").param_groups[0]["lr"] == 3e-4
    assert part_of(workflow, "lr_scheduler").patience == 3
    assert part_of(workflow, "train#handlers")[1].max_norm == 0.5
    assert trainer.to_kwargs == {"mini_context_size": 2}
    assert part_of(workflow, "train#dataloader").batch_size == 2
    assert {dataset.context_size(epoch) for epoch in range(40)} == {2, 3, 4}
    inferer = part_of(workflow, "train#inferer")
    assert inferer.amp and inferer.dtype == torch.bfloat16
    assert all(getattr(dataset.augmentation, name) == 0.5 for name in probabilities) and len(probabilities) == 13
    collection = part_of(workflow, "collection")
    parts = {part: {(case["dataset"], case["case"]) for case in cases} for part, cases in collection.parts().items()}
    assert len(parts["val"]) == 2 and len(parts["train"]) == 4 and not parts["test"]
    assert {dataset for cases in parts.values() for dataset, _ in cases} == {"Dataset001_A"}
    assert part_of(workflow, "network_def").channels == (4, 8)


def test_half_precision_with_scaled_gradients(data, tmp_path):
    options = SMALL | {"amp": True, "amp_dtype": "float16"}
    workflow = workflow_of("train_stage1", dataset_dir=str(data), output_dir=str(tmp_path), **options)
    assert part_of(workflow, "train#inferer").dtype == torch.float16
    assert part_of(workflow, "train#trainer").grad_scaler is not None


def test_two_stages_into_one_folder(data, tmp_path):
    options = SMALL | {"dataset_dir": str(data), "output_dir": str(tmp_path), "epochs": 1}
    run_workflow("train_stage1", **options, context_size=3, datasets=["Dataset001_A"])
    del options["channels"]
    run_workflow("train_stage2", **options, context_size=[2, 4], datasets=["Dataset001_A"])
    for stage in ("stage1", "stage2"):  # in place of --checkpoint-dir, and of Weights & Biases by default
        assert load_network(tmp_path / stage / "model.pt").channels == (4, 8)
        assert list((tmp_path / stage / "tensorboard").glob("events*"))
    assert ConfigParser.load_config_file("configs/train_stage1.json")["wandb"] is False


def test_rows_in_place_of_the_list_in_the_code(data, tmp_path):
    rows = [
        {"dataset": "Dataset001_A", "input": [0], "classes": ["first"], "draw_weight": 3, "loss_weight": 0.5},
        {"dataset": "Dataset001_A", "task": "modality_transfer", "input": [0], "output": 1},
        {"dataset": "Dataset002_B", "task": "gaussian_denoising", "draw_weight": 0},
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    options = SMALL | {"dataset_dir": str(data), "output_dir": str(tmp_path), "epochs": 1}
    workflow = run_workflow("train_stage1", **options, collection_file=str(tmp_path / "rows.json"))
    resolved = json.loads((tmp_path / "stage1" / "rows.json").read_text())
    assert [(row["task"], row["draw_weight"], row["loss_weight"]) for row in resolved] == [
        ("segmentation", 3.0, 0.5),
        ("modality_transfer", 1.0, 1.0),
    ]
    dataset = part_of(workflow, "train#dataset")
    drawn = [dataset.draw(number).task for number in range(200)]
    assert drawn.count("segmentation") == pytest.approx(150, abs=25)


def test_fine_tuning_from_their_weights(theirs, ours, data, tmp_path):
    options = SMALL | {"dataset_dir": str(data), "output_dir": str(tmp_path), "channels": None, "epochs": 1}
    run_workflow("train_stage2", **options, init_checkpoint=str(ours), learning_rate=1e-6, context_size=2)
    before, after = load_network(ours).state_dict(), load_network(tmp_path / "stage2" / "model.pt").state_dict()
    moved = [(before[k] - after[k]).abs().max().item() for k in before if k != "grid"]
    assert 0 < max(moved) < 1e-4, "a small step away from where they were"
    with pytest.raises(ValueError, match=r"scripts\.checkpoint convert"):  # unconverted
        run_workflow("train_stage2", **(options | {"output_dir": str(tmp_path / "b")}), init_checkpoint=str(theirs))


def test_processes_share_the_groups_out(data, tmp_path, monkeypatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 4)
    parser = ConfigParser()
    parser.read_config(["configs/train_stage1.json", "configs/multi_gpu_train.json"])
    parser.update({"dataset_dir": str(data), "output_dir": str(tmp_path)} | SMALL | {"groups_per_epoch": 8})
    assert list(parser.get_parsed_content("train#dataloader").sampler) == [1, 5]
    parser["val_groups"] = 6
    parser.parse()
    assert list(parser.get_parsed_content("validate#dataloader").sampler) == [1, 5], "none twice"


def test_data_that_are_on_the_grid_already_are_not_resampled(make_dataset, tmp_path):
    folder = make_dataset(tmp_path, "Dataset003_C", cases=4)
    dataset = EpisodeDataset.from_folder(
        str(folder), "val", spatial_size=16, cache_dir=str(tmp_path / "cache"), context_size=2, val_fraction=0.25
    )
    assert dataset.prepared.spacing_mm == {"Dataset003_C": 1.0}
    case = dataset.draw(0).members[0]
    _, label = dataset.prepared.load(case)
    assert np.array_equal(label[0].numpy(), np.asarray(nib.load(case["label"]).dataobj))


def test_a_margin_is_kept_out_of_it_by_the_spacing(write_nifti, tmp_path):
    """With an empty margin the box would be enlarged to the grid; --spacing keeps the voxels as they are."""
    image = np.zeros((16, 16, 16), np.float32)
    image[2:12, 3:13, 4:14] = np.random.default_rng(0).integers(1, 100, (10, 10, 10))
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", image))
    assert fit_spacing([{"extent_mm": [10.0] * 3, "voxel_mm": [1.0] * 3}], (16, 16, 16)) < 0.7
    on_grid = Preprocessing((16, 16, 16), 1.0).pair(volume, (volume > 50).float())[1]
    assert np.array_equal(on_grid[0, 3:13, 3:13, 3:13].numpy(), image[2:12, 3:13, 4:14] > 50)


def test_a_dataset_class_for_a_loop_of_one_s_own(data, tmp_path):
    dataset = EpisodeDataset.from_folder(
        str(data), mode="val", augment=False, spatial_size=16, cache_dir=str(tmp_path), context_size=2
    )
    sample = dataset[0]
    assert sample["image"].shape == sample["label"].shape == (3, 1, 16, 16, 16)
    assert set(sample["label"].unique().tolist()) == {0, 1} and isinstance(dataset, torch.utils.data.Dataset)


# --- data, inference, evaluation


def test_prepare_data_takes_the_same_words(data, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(3):
        source = data / DATASETS[0]
        shutil.copy(source / "imagesTr" / f"case_{number:02d}_0000.nii.gz", raw / f"{number}_img.nii.gz")
        shutil.copy(source / "labelsTr" / f"case_{number:02d}.nii.gz", raw / f"{number}_gt.nii.gz")
    words = {"image_pattern": "*_img.nii.gz", "mask_pattern": "*_gt.nii.gz", "modality": "MRI"}
    prepare_data(input_dir=str(raw), output_dir=str(tmp_path / "data"), dataset_name="Mine", **words)
    made = tmp_path / "data" / "Dataset001_Mine"
    assert sorted(p.name for p in (made / "labelsTr").iterdir()) == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]
    assert json.loads((made / "dataset.json").read_text())["channel_names"] == {"0": "MRI"}


def files(data, names, channel=None):
    folder = data / DATASETS[0] / ("labelsTr" if channel is None else "imagesTr")
    suffix = "" if channel is None else f"_{channel:04d}"
    return [str(folder / f"{name}{suffix}.nii.gz") for name in names]


def answers(folder):
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize("task", ["segmentation", "generation"])
def test_inference_from_a_folder_or_from_lists_of_files(task, data, ours, tmp_path):
    names = [f"case_{number:02d}" for number in range(10)]
    targets = tmp_path / "targets"
    targets.mkdir()
    shutil.copy(files(data, names, 0)[0], targets / "new.nii.gz")
    options = {
        "dataset_dir": str(targets),
        "checkpoint": str(ours),
        "spatial_size": 16,
        "context_size": 12,
        "task": task,
        "device": "cpu",
        "overlays": False,
    }
    folder, output = str(data / DATASETS[0]), 1 if task == "generation" else None
    lists = {"context_images": files(data, names, 0), "context_labels": files(data, names, output)}
    run_workflow(
        "inference", **options, output_dir=str(tmp_path / "a"), context_dir=folder, channel=0, context_label_channel=1
    )
    run_workflow("inference", **options, output_dir=str(tmp_path / "b"), **lists)
    a, b = answers(tmp_path / "a"), answers(tmp_path / "b")
    assert list(a) == list(b) == ["new.nii.gz"] and np.array_equal(a["new.nii.gz"], b["new.nii.gz"])
    (warning,) = json.loads((tmp_path / "b" / "report.json").read_text())["cases"]["new"]["warnings"][:1]
    assert "the target is also context" in warning and "case_00_0000" in warning
    reference = tmp_path / "reference"
    reference.mkdir()
    shutil.copy((lists["context_labels"])[0], reference / "new.nii.gz")
    Evaluation(tmp_path / "b", reference, tmp_path / "scores", task=task, progress=False).run()
    assert (tmp_path / "scores" / "metrics.csv").is_file()


@torch.no_grad()
def test_the_network_in_a_script(ours):
    network = load_network(ours)
    target, context_in = torch.rand(1, 1, 16, 16, 16), torch.rand(1, 4, 1, 16, 16, 16)
    context_out = (context_in > 0.5).float()
    assert not network.training
    first, second = (network(target, context_in, context_out, mini_context_size=n) for n in (2, 4))
    assert first.shape == target.shape
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_every_option_on_the_page_exists():
    """No line of the page names an option, file or module that is not there."""
    page = Path("docs/migration.md").read_text(encoding="utf-8")
    ours = "\n".join(line.split("|")[2] for line in page.splitlines() if line.count("|") == 3)
    ours += "\n".join(page.split("```")[1::2])
    known = set(OPTIONS) | set(prepare_data.__annotations__) | {"config_file", "standalone", "source", "output"}
    named = set(re.findall(r"--(\w+)", ours)) - {"nproc_per_node"}
    assert len(named) > 20 and named <= known, sorted(named - known)
    for path in re.findall(r"configs/\w+\.json", page):
        assert Path(path).is_file(), path
