"""Where contexts come from: the ways to give them, the choice, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data import DatasetError, example_pairs
from scripts.data.example_pairs import context_cases
from scripts.data.volumes import load_volume
from scripts.inference.context_source import ContextSource, choose, gather_contexts
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from tests.workflows import run_workflow

GRID = (16, 16, 16)
NETWORK = SimpleNamespace(grid=torch.tensor(GRID))
NAMES = [f"p{i}" for i in range(6)]


@pytest.fixture
def root(make_dataset, tmp_path):
    return make_dataset(tmp_path / "data", cases=NAMES, channels=(0, 1))


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


@pytest.mark.parametrize("selection", ["random", "first", "similar"])
@pytest.mark.parametrize("count", [6, 7, 100])
def test_all_are_taken_where_there_are_no_more(selection, count):
    assert names_of(choose([{"case": name} for name in NAMES], count, selection)) == NAMES


def test_all_are_candidates_of_a_choice_by_similarity():
    assert names_of(choose([{"case": name} for name in NAMES], 2, "similar")) == NAMES


def test_unknown_selection():
    with pytest.raises(ValueError, match="--context_selection must be random, first or similar, got 'best'"):
        choose([{"case": "a"}], 3, "best")


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
def test_faulty_outputs_are_named_or_left_out(root, rewrite, skip, caplog):
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


def test_faulty_contexts_are_all_named(root, rewrite):
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

    monkeypatch.setattr(example_pairs, "find_datasets", refuse)
    source(tmp_path)


def test_a_source_chooses_reads_and_says_which(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        found = source(root, context_size=3, selection="first", record=str(tmp_path / "seen.json"))()
    assert found.names == ["p0", "p1", "p2"] and found.preprocessing.spatial_size == GRID
    assert "3 of 6 contexts (first), 1 mm voxels: p0, p1, p2" in caplog.text
    assert (tmp_path / "seen.json").is_file()
    assert source(root, context_size=3, seed=2)().names == source(root, context_size=3, seed=2)().names
    assert len(source(root, context_size=8)()) == 6


# --- pairs given file by file


def listed(root, names, **settings):
    images = [str(root / "imagesTr" / f"{name}_0000.nii.gz") for name in names]
    answers = [str(root / "labelsTr" / f"{name}.nii.gz") for name in names]
    return source(None, **({"images": images, "labels": answers} | settings))


def same_pairs(first, second):
    return all(torch.equal(*parts) for parts in zip(first.pairs(), second.pairs(), strict=True))


def test_listed_files_are_the_same_contexts_as_their_folder(root):
    folder, files = source(root)(), listed(root, NAMES)()
    assert same_pairs(folder, files)
    assert folder.digests == files.digests and files.preprocessing.spacing_mm == folder.preprocessing.spacing_mm
    assert files.names == [str(root / "imagesTr" / f"{name}_0000.nii.gz") for name in NAMES]
    assert len(listed(root, NAMES, context_size=2)()) == 2


def test_listed_files_for_generation(root):
    outputs = [str(root / "imagesTr" / f"{name}_0001.nii.gz") for name in NAMES]
    found = listed(root, NAMES, labels=outputs, label_channel=1)()
    assert same_pairs(found, source(root, label_channel=1)())


@pytest.mark.parametrize("answers", [None, [], ["one"]])
def test_listed_images_need_as_many_labels(root, answers):
    with pytest.raises(ValueError, match=f"equally many files, at least one: got 6 and {len(answers or ())}"):
        listed(root, NAMES, labels=answers)()


def test_listed_labels_without_images(root):
    with pytest.raises(ValueError, match="equally many files, at least one: got 0 and 6"):
        listed(root, NAMES, images=None)()


def test_listed_files_that_are_faulty_are_all_named(root, rewrite):
    (root / "imagesTr" / "p1_0000.nii.gz").unlink()
    rewrite(root / "labelsTr" / "p4.nii.gz", lambda v: v[1:])
    message = r"(?s)2 of 6 cases.*p1_0000\.nii\.gz: image file is missing.*p4_0000\.nii\.gz: image and label differ"
    with pytest.raises(DatasetError, match=message):
        listed(root, NAMES)()
    assert len(listed(root, NAMES, skip_bad_cases=True)()) == 4


def test_contexts_are_given_in_one_way(root):
    with pytest.raises(ValueError, match="given in several ways: give either --context_dir"):
        source(root, images=["a.nii.gz"], labels=["b.nii.gz"])


@pytest.mark.parametrize(
    "several",
    [
        {"context_file": "pairs.json", "images": ["a.nii.gz"], "labels": ["b.nii.gz"]},
        {"folder": "data", "context_file": "pairs.json"},
    ],
)
def test_no_two_ways_at_once(several):
    with pytest.raises(ValueError, match="contexts are given in several ways"):
        source(several.pop("folder", None), **several)


# --- two folders, and a JSON list


def test_folders_are_the_same_contexts_as_their_dataset(root):
    whole = source(root)()
    folders = source(None, images=[str(root / "imagesTr")], labels=[str(root / "labelsTr")])()
    assert folders.names == whole.names == NAMES and folders.fingerprint == whole.fingerprint.replace("[1, 2]", "null")
    assert same_pairs(folders, whole)


@pytest.mark.parametrize(("images", "labels"), [(1, 0), (0, 1), (2, 1)])
def test_folders_are_not_mixed_with_files(root, images, labels):
    folder, file = str(root / "imagesTr"), str(root / "labelsTr" / "p0.nii.gz")
    given = {"images": [folder] * images or [file], "labels": [folder] * labels or [file]}
    with pytest.raises(ValueError, match="take two folders, or two lists of files: got"):
        source(None, **given)()


def test_a_json_list_is_the_same_contexts_as_its_files(root):
    pairs = [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in NAMES]
    (root / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    found, files = source(None, context_file=str(root / "pairs.json"))(), listed(root, NAMES)()
    assert found.names == files.names and found.fingerprint == files.fingerprint


def test_a_json_list_for_generation(root):
    pairs = [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"imagesTr/{n}_0001.nii.gz"} for n in NAMES]
    (root / "pairs.json").write_text(json.dumps({"training": pairs}), encoding="utf-8")
    found = source(None, context_file=str(root / "pairs.json"), label_channel=1)()
    assert found.generation and same_pairs(found, source(root, label_channel=1)())


# --- faulty and poor contexts


def test_pairs_without_label_are_named_and_not_used(root, rewrite, caplog):
    for name in ("p0", "p3"):
        rewrite(root / "labelsTr" / f"{name}.nii.gz", lambda v: v * 0)
    for selection in ("random", "first", "similar"):
        caplog.clear()
        found = source(root, context_size=4, selection=selection)()
        assert found.names == ["p1", "p2", "p4", "p5"]
        assert "no label other than background in p0, p3: not used" in caplog.text
        assert found.warnings([1, 2]) == ["no label other than background in p0, p3: not used"]
    assert len(source(root, context_size=4, label_channel=1)()) == 4  # generation needs none


def test_values_of_no_class_are_no_label(make_dataset, tmp_path, rewrite):
    root = make_dataset(tmp_path, cases=3, labels={"background": 0, "first": 1, "ignore": 2})
    rewrite(root / "labelsTr" / "case_01.nii.gz", lambda v: np.where(v == 1, 0, v))
    assert source(root)().names == ["case_00", "case_02"]


def test_contexts_without_any_label(root, rewrite):
    for path in (root / "labelsTr").iterdir():
        rewrite(path, lambda v: v * 0)
    with pytest.raises(DatasetError, match="no label other than background: p0, p1, p2, p3, p4 and 1 more"):
        source(root)()


def test_fewer_contexts_than_asked_for(root, caplog):
    found = source(root, context_size=8)()
    assert len(found) == 6 and "only 6 contexts where --context_size is 8" in caplog.text
    assert found.warnings([1]) == ["only 6 contexts where --context_size is 8"]
    assert source(root, context_size=6)().warnings([1]) == []


FAULTS = {
    "missing label": (lambda root, rewrite: (root / "labelsTr" / "p1.nii.gz").unlink(), "label file is missing"),
    "no whole numbers": (
        lambda root, rewrite: rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: v / np.float32(2)),
        r"values that are no label numbers: \[0\.5\]",
    ),
    "shape": (
        lambda root, rewrite: rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: v[:-1]),
        "image and label differ in shape",
    ),
    "affine": (
        lambda root, rewrite: nib.save(
            nib.Nifti1Image(np.zeros((16, 16, 16), np.uint8), 2 * np.eye(4)), root / "labelsTr" / "p1.nii.gz"
        ),
        "image and label differ in affine",
    ),
    "twice the same": (
        lambda root, rewrite: shutil.copy(root / "imagesTr" / "p0_0000.nii.gz", root / "imagesTr" / "p1_0000.nii.gz"),
        "duplicate: same image as .*p0",
    ),
    "the same, turned": (
        lambda root, rewrite: [
            nib.save(nib.load(str(path)).as_reoriented([[0, -1], [1, -1], [2, 1]]), str(path).replace("p0", "p1"))
            for path in (root / "imagesTr" / "p0_0000.nii.gz", root / "labelsTr" / "p0.nii.gz")
        ],
        "duplicate: same image as .*p0",
    ),
}


@pytest.mark.parametrize("way", ["dataset", "folders", "files", "json"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_pair_is_named_however_it_is_given(root, rewrite, fault, way):
    spoil, message = FAULTS[fault]
    spoil(root, rewrite)
    pairs = [{"image": f"imagesTr/{n}_0000.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in NAMES]
    (root / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    made = {
        "dataset": lambda **more: source(root, **more),
        "folders": lambda **more: source(None, images=[root / "imagesTr"], labels=[root / "labelsTr"], **more),
        "files": lambda **more: listed(root, NAMES, **more),
        "json": lambda **more: source(None, context_file=str(root / "pairs.json"), **more),
    }[way]
    with pytest.raises(DatasetError, match=f"(?s)1 of 6 cases.*p1.*{message}"):
        made()()
    assert len(made(skip_bad_cases=True)()) == 5


def test_pairs_in_hand_are_checked_too(root):
    images = [load_volume(root / "imagesTr" / f"{name}_0000.nii.gz") for name in NAMES[:3]]
    labels = [load_volume(root / "labelsTr" / f"{name}.nii.gz") for name in NAMES[:3]]

    def gather(**changed):
        pairs = [(changed.get("image", images[0]), changed.get("label", labels[0])), (images[1], labels[1])]
        return gather_contexts(["a", "b"], pairs, GRID)

    found = gather()
    assert found.names == ["a", "b"] and found.warnings([1, 2]) == []
    assert all(torch.equal(x, y) for x, y in zip(found.native(1), (images[1], labels[1]), strict=True))
    for faulty, message in [
        ({"label": labels[0] / 2}, "a: label holds values that are no label numbers"),
        ({"label": labels[0][:, 1:]}, "a: image and label differ in shape"),
        ({"label": MetaTensor(labels[0].as_tensor(), affine=2 * torch.eye(4))}, "a: image and label differ in affine"),
        ({"image": images[0] * torch.nan}, "a: image holds NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            gather(**faulty)
    assert gather(image=images[1]).warnings([1]) == ["b is the same image as a"]
    empty = gather(label=labels[0] * 0)
    assert "no label other than background in a: not used" in empty.warnings([1]) and empty.holding(1) == [1]


def test_paths_with_spaces_and_letters_of_all_kinds(make_dataset, tmp_path):
    folder = tmp_path / "Müller's scans, 1 – ελ"
    root = make_dataset(folder, cases=["Jürgen ß", "Zoë 2"], channels=(0, 1))
    assert source(root)().names == ["Jürgen ß", "Zoë 2"]
    assert source(None, images=[root / "imagesTr"], labels=[root / "labelsTr"])().names == ["Jürgen ß", "Zoë 2"]
    assert len(listed(root, ["Jürgen ß", "Zoë 2"])()) == 2


# --- the predictor's use of them


class LabelAverage(torch.nn.Module):
    """Answers the mean of the context labels, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.tensor(GRID))
        self.given = []

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.given.append(context_in[0])
        return context_out.mean(1)


@pytest.fixture
def varied(root, write_nifti):
    """Six candidates that look different; label 2 is in the last three."""
    for number, name in enumerate(NAMES):
        voxels = 1 + 100 * np.random.default_rng(number).random(GRID).astype(np.float32)
        write_nifti(root / "imagesTr" / f"{name}_0000.nii.gz", voxels)
        label = np.zeros(GRID, np.uint8)
        label[4:8] = 1
        label[10:12] = 2 * (number > 2)
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label)
    return root


def whole_inferer(network, source):
    return ICLInferer(network, device="cpu", context=source, align="off")


def test_each_target_and_label_gets_its_contexts(varied, caplog):
    network = LabelAverage()
    predictor = whole_inferer(network, ContextSource(str(varied), network, 2, selection="similar"))
    seen = set()
    for number, name in enumerate(NAMES):
        target = load_volume(varied / "imagesTr" / f"{name}_0000.nii.gz")
        with caplog.at_level(logging.INFO):
            scan = target + 3 * torch.rand(1, *GRID)  # like that one, but another scan
            used = predictor.complete(predictor.target(scan)).used
        assert used[1][0] == name and len(used[1]) == len(used[2]) == 2
        assert set(used[2]) <= set(NAMES[3:]) and (used[2][0] == name) == (number > 2)
        assert f"most similar contexts for label 1: {name} (" in caplog.text.replace("label 1, 2:", "label 1:")
        images, _ = predictor.context.pairs([NAMES.index(n) for n in used[2]])
        assert torch.equal(network.given[-1], images)
        itself = predictor.complete(predictor.target(target)).used
        assert all(name not in others and len(others) == 2 for others in itself.values())
        seen |= set(itself[1])
    assert len(seen) > 2


def test_the_choice_is_among_those_allowed(varied):
    network = LabelAverage()
    predictor = whole_inferer(network, ContextSource(str(varied), network, 2, selection="similar"))
    target = predictor.target(load_volume(varied / "imagesTr" / "p0_0000.nii.gz") + torch.rand(1, *GRID))
    predictor.prepare_views(target)
    members = predictor.members_of(target, among=[1, 2, 4])
    assert set(members[1]) <= {1, 2, 4} and len(members[1]) == 2
    assert members[2] == [4]


def test_one_context_serves_all_but_itself(root, caplog):
    network = LabelAverage()
    predictor = whole_inferer(network, ContextSource(str(root), network, 1, selection="first"))
    assert predictor.predict(root / "imagesTr" / "p3_0000.nii.gz").any()
    itself = predictor.complete(predictor.target(root / "imagesTr" / "p0_0000.nii.gz"))
    assert not itself.prediction.any() and itself.used == {1: [], 2: []}
    assert "there is no context with label 1 but the target itself" in caplog.text


@pytest.mark.parametrize("selection", ["first", "similar"])
def test_the_report_says_what_is_to_be_known_of_the_contexts(root, rewrite, tmp_path, selection):
    rewrite(root / "labelsTr" / "p0.nii.gz", lambda v: v * 0)
    rewrite(root / "labelsTr" / "p1.nii.gz", lambda v: np.where(v == 2, 0, v))
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), tmp_path / "model.pt")
    given = {"context_images": [str(root / "imagesTr")], "context_labels": [str(root / "labelsTr")], "context_size": 3}
    options = given | {"dataset_dir": str(root), "device": "cpu", "overlays": selection == "first"}
    out = tmp_path / "out"
    run_workflow(
        "inference", output_dir=str(out), checkpoint=str(tmp_path / "model.pt"), context_selection=selection, **options
    )
    report = json.loads((out / "report.json").read_text())
    whole = selection == "similar"
    assert report["contexts"] == (["p1", "p2", "p3", "p4", "p5"] if whole else ["p1", "p2", "p3"])
    assert report["warnings"] == [
        "no label other than background in p0: not used",
        f"label 2 is in {4 if whole else 2} of {5 if whole else 3} contexts; not in p1",
    ]
    for name, case in report["cases"].items():
        used = case["contexts"]
        assert "p1" not in used["2"] and "p0" not in used["1"] and name not in used["1"]
        assert not whole or len(used["1"]) == len(used["2"]) == 3
    assert (out / ".contexts.json").is_file() == whole
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    run_workflow(
        "inference", output_dir=str(out), checkpoint=str(tmp_path / "model.pt"), context_selection=selection, **options
    )
    assert len(stamps) == 6 and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_target_that_was_turned_is_predicted_anew(root, tmp_path):
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), tmp_path / "model.pt")
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(root / "imagesTr" / "p0_0000.nii.gz", scan)
    out = tmp_path / "out"
    options = {"dataset_dir": str(scan), "context_dir": str(root), "device": "cpu", "overlays": False}
    options |= {"output_dir": str(out), "checkpoint": str(tmp_path / "model.pt"), "context_size": 2}
    run_workflow("inference", **options)
    nib.save(nib.load(scan).as_reoriented([[0, -1], [1, 1], [2, 1]]), scan)
    with pytest.raises(FileExistsError, match="--overwrite true"):
        run_workflow("inference", **options)
