"""Pictures of training groups, from the command down to single pixels."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import scripts.preview as program
from scripts.data import Collection, EpisodeDataset, GroupAugmentation
from scripts.preview import draw_group, preview

NOTHING = {
    name: 0.0
    for name in GroupAugmentation.__init__.__annotations__
    if name.endswith("_prob")
}  # fmt: skip


@pytest.fixture(scope="module")
def data(make_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, "Dataset001_Blobs", cases=7, channels=(0, 1))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def show(data, cache, tmp_path):
    def shown(out=tmp_path / "out", **options):
        settings = {"spatial_size": 16, "context_size": 2, "groups": 2, "cache_dir": cache} | options
        preview(str(out), str(data), **settings)
        return out

    return shown


@pytest.fixture
def views(data, cache, monkeypatch):
    """What :func:`draw_group` shows under some augmentation, and the title."""

    def seen(task="segmentation", number=0, **probabilities):
        dataset = EpisodeDataset.from_collection(
            Collection(str(data), cache, tasks=task), spatial_size=16, cache_dir=cache, context_size=2
        )
        dataset.augmentation = GroupAugmentation(**(NOTHING | probabilities))
        found = []
        figure = program.group_figure
        monkeypatch.setattr(program, "group_figure", lambda *args: found.append(args) or figure(*args))
        picture = draw_group(dataset, number)
        assert picture.width > 0
        states, cases, generation, title = found[0]
        return dataset, {state.name: state for state in states}, cases, generation, title

    return seen


def names(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


def pictures(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("group_*.png"))]


def test_a_picture_per_group_and_one_of_all(show):
    out = show(groups=3)
    assert names(out) == ["group_0000.png", "group_0001.png", "group_0002.png", "preview.png"]
    sheet = Image.open(out / "preview.png")
    first, second, third = pictures(out)
    assert sheet.width >= first.width + second.width and sheet.height >= first.height + third.height
    assert len({picture.tobytes() for picture in (first, second, third)}) == 3


def test_the_same_seed_shows_the_same_and_another_one_does_not(show, tmp_path):
    first, again, other = (pictures(show(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(ImageChops.difference(a, b).getbbox() is None for a, b in zip(first, again, strict=True))
    assert [p.tobytes() for p in first] != [p.tobytes() for p in other]


def test_the_groups_are_those_of_a_training(show, data, cache, monkeypatch):
    titles = []
    figure = program.group_figure
    monkeypatch.setattr(program, "group_figure", lambda *args: titles.append((args[1], args[3])) or figure(*args))
    show(groups=4, seed=3)
    training = EpisodeDataset.from_folder(
        str(data), augment=True, spatial_size=16, cache_dir=cache, seed=3, context_size=2
    )
    for number, (cases, title) in enumerate(titles):
        group = training[number]
        assert cases == group["cases"].split()
        assert title.startswith(f"group {number}: Dataset001_Blobs, segmentation of {group['classes']}")
        same = torch.equal(group["image"], training.make(number, augment=False)["image"])
        assert ("not augmented" in title) <= same


def test_what_was_drawn_and_what_the_network_gets(views):
    dataset, states, cases, generation, title = views(image_invert_prob=1.0)
    drawn, augmented = states["as drawn"], states["augmented"]
    assert torch.allclose(augmented.images, 1 - drawn.images) and torch.equal(augmented.labels, drawn.labels)
    assert not generation and "not augmented" not in title
    assert cases == [case["case"] for case in dataset.draw(0).members]


def test_a_group_that_stays_as_it_is_says_so(views):
    _, states, _, _, title = views()
    assert list(states) == ["as drawn"] and title.endswith(", not augmented")


def test_a_change_of_the_labels_alone_counts(views):
    _, states, _, _, title = views(label_invert_prob=1.0)
    assert torch.equal(states["augmented"].labels, 1 - states["as drawn"].labels)
    assert "not augmented" not in title


def test_gin_is_applied_with_the_group_s_seed(views):
    dataset, states, _, _, title = views(gin_prob=1.0)
    made = dataset.make(0)
    (state,) = (state for name, state in states.items() if "GIN" in name)
    expected = program.GlobalIntensityNonlinear()(made["image"], made["gin"])[:, 0]
    assert torch.equal(state.images, expected) and not torch.allclose(expected, made["image"][:, 0], atol=1e-2)
    assert state.window is None and "not augmented" not in title


@pytest.mark.parametrize("task", ["inpainting", "modality_transfer"])
def test_tasks_that_make_images(views, task):
    dataset, states, _, generation, title = views(task, shift_prob=1.0)
    assert generation and title == f"group 0: Dataset001_Blobs, {task}"
    assert torch.equal(states["as drawn"].labels, dataset.make(0, augment=False)["label"][:, 0])


def test_rows_of_a_collection_file(show, tmp_path, monkeypatch):
    titles = []
    figure = program.group_figure
    monkeypatch.setattr(program, "group_figure", lambda *args: titles.append(args[3]) or figure(*args))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [{"dataset": "Dataset001_Blobs", "classes": ["second"]}]}))
    show(collection_file=str(rows))
    assert all("segmentation of second" in title for title in titles) and len(titles) == 2


def test_pictures_are_replaced_only_when_asked(show):
    out = show(groups=3)
    (out / "notes.txt").write_text("mine")
    before = (out / "preview.png").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite true"):
        show(groups=1, seed=5)
    assert (out / "preview.png").read_bytes() == before
    show(groups=1, seed=5, overwrite="true")
    assert names(out) == ["group_0000.png", "notes.txt", "preview.png"]
    assert (out / "preview.png").read_bytes() != before


def test_a_fault_in_the_data_keeps_the_old_pictures(show):
    out = show()
    before = names(out)
    with pytest.raises(ValueError, match="lower --context_size"):
        show(context_size=9, overwrite=True)
    assert names(out) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 0}, "--groups must be a whole number of at least 1, got 0"),
        ({"groups": "many"}, "got 'many'"),
        ({"spatial_size": "large"}, "--spatial_size 'large'"),
        ({"context_size": 0}, "--context_size 0"),
        ({"task": "segmentatoin"}, "segmentation"),
        ({"overwrite": "perhaps"}, "expected true or false"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(show, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        show(**options)
    assert not (tmp_path / "out").exists()


def test_no_data_and_no_folder(show, tmp_path):
    with pytest.raises(ValueError, match="give --dataset_dir or --collection_file"):
        preview(str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        show(tmp_path / "file")


def test_command_line(data, cache, tmp_path):
    command = [sys.executable, "-m", "scripts.preview", "--dataset_dir", str(data), "--output_dir", str(tmp_path)]
    command += ["--spatial_size", "16,16,16", "--context_size", "[1,2]", "--groups", "1", "--cache_dir", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["group_0000.png", "preview.png"] and "1 groups" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.strip().splitlines()[-1].startswith("error: ") and "--overwrite true" in again.stderr


def test_real_cases(shared_dir, tmp_path):
    source = shared_dir / "data" / "Dataset004_Hippocampus"
    some = tmp_path / "data" / source.name
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (some / folder).mkdir(parents=True)
        for case in sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").glob("*.nii.gz"))[:6]:
            (some / folder / f"{case}{ending}").symlink_to(source / folder / f"{case}{ending}")
    (some / "dataset.json").symlink_to(source / "dataset.json")
    preview(str(tmp_path / "out"), str(some), groups=2, spatial_size=16)
    for picture in pictures(tmp_path / "out"):
        pixels = np.asarray(picture).astype(int)
        assert (np.ptp(pixels, axis=2) > 60).any(), "no coloured outline"
