"""The context set: which pairs, at which spacing, and what it knows of itself."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts import contexts
from scripts.contexts import ContextSource, choose, context_cases, load_contexts
from scripts.data import DatasetError
from scripts.data.volumes import load_volume, volume_digest

GRID = (16, 16, 16)
NETWORK = SimpleNamespace(grid=torch.tensor(GRID))
NAMES = [f"p{i}" for i in range(6)]


@pytest.fixture
def root(make_dataset, tmp_path):
    return make_dataset(tmp_path / "data", cases=NAMES, channels=(0, 1))


def rewrite(path, change):
    source = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asanyarray(source.dataobj)), source.affine), path)


def source(folder, **settings):
    return ContextSource(None if folder is None else str(folder), NETWORK, **settings)


def names_of(cases):
    return [case["case"] for case in cases]


# --- choice


def test_random_choice_is_seeded_and_in_order_of_names():
    cases = [{"case": f"c{i:02d}"} for i in range(20)]
    first, again, other = (names_of(choose(cases, 5, seed=seed)) for seed in (1, 1, 2))
    assert first == again == sorted(first) and len(set(first)) == 5
    assert first != other
    drawn = {name for seed in range(30) for name in names_of(choose(cases, 5, seed=seed))}
    assert len(drawn) == 20


def test_first_takes_the_first():
    cases = [{"case": name} for name in NAMES]
    assert names_of(choose(cases, 3, "first", seed=7)) == NAMES[:3]


@pytest.mark.parametrize("selection", ["random", "first"])
@pytest.mark.parametrize("count", [6, 7, 100])
def test_all_are_taken_where_there_are_no_more(selection, count):
    assert names_of(choose([{"case": name} for name in NAMES], count, selection)) == NAMES


def test_unknown_selection():
    with pytest.raises(ValueError, match="--context_selection must be random or first, got 'best'"):
        choose([{"case": "a"}], 3, "best")


# --- the set


def test_pairs_are_on_the_grid(root):
    cases = context_cases(root)
    found = load_contexts(cases, cases[1:4], GRID)
    assert len(found) == 3 and found.names == NAMES[1:4]
    assert found.images.shape == found.labels.shape == (3, 1, *GRID)
    assert found.images.dtype == torch.float32 and 0 <= found.images.min() and found.images.max() <= 1
    assert not found.labels.dtype.is_floating_point and set(found.labels.unique().tolist()) == {0, 1, 2}
    assert found.preprocessing.spatial_size == GRID and found.output_range == (0.0, 1.0)
    for number, case in enumerate(cases[1:4]):  # the grid is the image's own, so nothing is resampled
        assert np.array_equal(found.labels[number, 0], nib.load(case["label"]).get_fdata())


def test_spacing_does_not_hang_on_the_choice(make_dataset, root):
    make_dataset(root.parent, root.name, cases=["large"], size=(16, 16, 24), channels=(0, 1))
    cases = context_cases(root)
    chosen = [[case] for case in cases]
    spacings = {load_contexts(cases, one, GRID).preprocessing.spacing_mm for one in chosen}
    assert spacings == {1.5}
    assert load_contexts(cases, cases, GRID, spacing=2.5).preprocessing.spacing_mm == 2.5


def test_labels_and_who_has_them(root):
    rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: np.where(v == 2, 0, v))
    rewrite(root / "labelsTr" / "p3.nii.gz", lambda v: np.zeros_like(v))
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID)
    assert found.label_values == [1, 2]
    assert found.holding(1) == [0, 1, 2, 4, 5] and found.holding(2) == [0, 2, 4, 5] and found.holding(3) == []
    assert load_contexts(cases, [cases[1]], GRID).label_values == [1]
    assert load_contexts(cases, [cases[3]], GRID).label_values == []


def test_a_target_is_recognised_among_the_contexts(root, tmp_path):
    cases = context_cases(root)
    found = load_contexts(cases, cases, GRID)
    copied = tmp_path / "another name.nii.gz"
    copied.write_bytes((root / "imagesTr" / "p2_0000.nii.gz").read_bytes())
    assert found.same_image(volume_digest(load_volume(copied))) == [2]
    assert found.same_image(volume_digest(load_volume(root / "labelsTr" / "p2.nii.gz"))) == []


# --- generation


def test_generation_pairs_are_two_channels(root):
    cases = context_cases(root, channel=0, label_channel=1)
    assert all(case["output"].endswith("_0001.nii.gz") and "label" not in case for case in cases)
    found = load_contexts(cases, cases[:4], GRID)
    assert found.images.shape == found.labels.shape == (4, 1, *GRID) and found.labels.dtype == torch.float32
    assert 0 <= found.labels.min() and found.labels.max() <= 1
    torch.testing.assert_close(found.labels, 1 - found.images, atol=0.02, rtol=0)


def test_generation_output_range_is_that_of_the_outputs(root):
    # a small object in much air
    for path in (root / "imagesTr").iterdir():
        scale = 1 if path.name.endswith("_0000.nii.gz") else 5

        def small(voxels, scale=scale):
            inner = np.zeros(voxels.shape, np.float32)
            inner[4:12, 4:12, 4:12] = scale * np.arange(100, 612).reshape(8, 8, 8)
            return inner

        rewrite(path, small)
    for number, name in enumerate(NAMES):  # the same image twice is refused
        rewrite(root / "imagesTr" / f"{name}_0000.nii.gz", lambda v, n=number: v + n)
    cases = context_cases(root, label_channel=1)
    low, high = load_contexts(cases, cases, (8, 8, 8)).output_range
    assert (low, high) == pytest.approx((500, 3055), abs=20)


def test_generation_needs_the_second_channel_of_every_case(root):
    for name in ("p1", "p4"):
        (root / "imagesTr" / f"{name}_0001.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"(?s)p1: output file is missing.*p4: output file is missing"):
        context_cases(root, label_channel=1)


def test_generation_without_the_second_channel(root):
    with pytest.raises(DatasetError, match=r"no files of channel 0002 \(channels there: \[0, 1\]\)"):
        context_cases(root, label_channel=2)


def test_generation_needs_no_labels(root):
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    assert names_of(context_cases(root, label_channel=1)) == NAMES


@pytest.mark.parametrize("skip", [False, True])
def test_faulty_outputs_are_named_or_left_out(root, skip, caplog):
    rewrite(root / "imagesTr" / "p1_0001.nii.gz", lambda v: v[1:])
    (root / "imagesTr" / "p3_0001.nii.gz").write_bytes(b"damaged")
    if skip:
        with caplog.at_level(logging.WARNING):
            assert names_of(context_cases(root, label_channel=1, skip_bad_cases=True)) == ["p0", "p2", "p4", "p5"]
        assert "p1: image and output differ in shape" in caplog.text
    else:
        with pytest.raises(DatasetError, match=r"(?s)2 of 6 cases.*p1: image and output differ in shape.*p3: output"):
            context_cases(root, label_channel=1)


# --- where they come from


def test_several_datasets_are_refused(make_dataset, tmp_path):
    for name in ("Dataset001_A", "Dataset002_B"):
        make_dataset(tmp_path, name, cases=1)
    with pytest.raises(DatasetError, match="--context_dir takes one dataset, .*Dataset001_A, Dataset002_B"):
        context_cases(tmp_path)
    assert names_of(context_cases(tmp_path / "Dataset001_A")) == ["case_00"]


def test_no_context_dir():
    with pytest.raises(ValueError, match="no contexts: give --context_dir"):
        source(None)()


def test_missing_context_dir(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: --context_dir takes"):
        source(tmp_path / "nowhere")()


def test_faulty_contexts_are_all_named(root):
    (root / "labelsTr" / "p1.nii.gz").unlink()
    rewrite(root / "labelsTr" / "p4.nii.gz", lambda v: v[1:])
    with pytest.raises(
        DatasetError, match=r"(?s)2 of 6 cases.*/p1: label file is missing.*/p4: image and label differ"
    ):
        source(root)()
    assert source(root, skip_bad_cases=True)().names == ["p0", "p2", "p3", "p5"]


def write_split(path, **parts):
    path.write_text(json.dumps({part: {"Dataset001_Blobs": names} for part, names in parts.items()}))
    return path


@pytest.mark.parametrize("label_channel", [None, 1])
def test_with_a_split_only_its_training_part_is_used(root, tmp_path, label_channel):
    split = write_split(tmp_path / "splits.json", train=["p1", "p2", "p5"], val=["p0"], test=["p3"])
    assert names_of(context_cases(root, label_channel=label_channel, split_file=split)) == ["p1", "p2", "p5"]


def test_a_split_without_training_cases(root, tmp_path):
    split = write_split(tmp_path / "splits.json", test=NAMES)
    with pytest.raises(DatasetError, match=r"splits\.json has no training cases of Dataset001_Blobs"):
        context_cases(root, split_file=split)


@pytest.mark.parametrize("size", [0, -1, [2, 4], 2.5])
def test_senseless_context_size(root, size):
    with pytest.raises(ValueError, match="--context_size must be one number of at least 1"):
        source(root, context_size=size)


def test_nothing_is_read_before_the_first_call(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("read")

    monkeypatch.setattr(contexts, "find_datasets", refuse)
    source(tmp_path)


def test_a_source_chooses_reads_and_says_which(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found = source(root, context_size=3, selection="first", record=str(tmp_path / "seen.json"))()
    assert found.names == ["p0", "p1", "p2"] and found.preprocessing.spatial_size == GRID
    assert "3 of 6 contexts (first), 1 mm voxels: p0, p1, p2" in caplog.text
    assert (tmp_path / "seen.json").is_file()
    assert source(root, context_size=3, seed=2)().names == source(root, context_size=3, seed=2)().names
    assert len(source(root, context_size=8)()) == 6


def test_second_channel_as_input(root):
    first, second = (load_contexts(cases, cases, GRID) for cases in (context_cases(root, 0), context_cases(root, 1)))
    torch.testing.assert_close(second.images, 1 - first.images, atol=0.02, rtol=0)
    assert torch.equal(first.labels, second.labels)


# --- pairs given file by file


def listed(root, names, **settings):
    images = [str(root / "imagesTr" / f"{name}_0000.nii.gz") for name in names]
    answers = [str(root / "labelsTr" / f"{name}.nii.gz") for name in names]
    return source(None, **({"images": images, "labels": answers} | settings))


def test_listed_files_are_the_same_contexts_as_their_folder(root):
    folder, files = source(root)(), listed(root, NAMES)()
    assert torch.equal(folder.images, files.images) and torch.equal(folder.labels, files.labels)
    assert folder.digests == files.digests and files.preprocessing.spacing_mm == folder.preprocessing.spacing_mm
    assert files.names == [str(root / "imagesTr" / f"{name}_0000.nii.gz") for name in NAMES]
    assert len(listed(root, NAMES, context_size=2)()) == 2


def test_listed_files_for_generation(root):
    outputs = [str(root / "imagesTr" / f"{name}_0001.nii.gz") for name in NAMES]
    found = listed(root, NAMES, labels=outputs, label_channel=1)()
    assert torch.equal(found.labels, source(root, label_channel=1)().labels)


@pytest.mark.parametrize("answers", [None, [], ["one"]])
def test_listed_images_need_as_many_labels(root, answers):
    with pytest.raises(ValueError, match=f"equally many files, at least one: got 6 and {len(answers or ())}"):
        listed(root, NAMES, labels=answers)()


def test_listed_labels_without_images(root):
    with pytest.raises(ValueError, match="equally many files, at least one: got 0 and 6"):
        listed(root, NAMES, images=None)()


def test_listed_files_that_are_faulty_are_all_named(root):
    (root / "imagesTr" / "p1_0000.nii.gz").unlink()
    rewrite(root / "labelsTr" / "p4.nii.gz", lambda v: v[1:])
    message = r"(?s)2 of 6 cases.*p1_0000\.nii\.gz: image file is missing.*p4_0000\.nii\.gz: image and label differ"
    with pytest.raises(DatasetError, match=message):
        listed(root, NAMES)()
    assert len(listed(root, NAMES, skip_bad_cases=True)()) == 4


def test_contexts_are_given_in_one_way(root):
    with pytest.raises(ValueError, match="either --context_dir, or --context_images and --context_labels"):
        source(root, images=["a.nii.gz"], labels=["b.nii.gz"])
