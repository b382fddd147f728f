"""Second passes at finer voxels, with networks whose answer is known."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter

from scripts.confidence import ConfidentInferer
from scripts.contexts import ContextSet
from scripts.data.preprocessing import FinerScores, Preprocessing
from scripts.data.resampling import GridAxis, box_about
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.refinement import WORTHWHILE, found_box
from tests.workflows import run_workflow

GRID = (16, 16, 16)


class Bright(torch.nn.Module):
    """Answers what is bright in the target, of every label alike; keeps what it was shown."""

    def __init__(self, finds_again=True):
        super().__init__()
        self.register_buffer("grid", torch.tensor(GRID))
        self.finds_again = finds_again
        self.shown = []

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.shown.append((target_in, context_in, context_out))
        again = len(self.shown) > 1
        return target_in.clone() if self.finds_again or not again else 0 * target_in


def ball(shape, centre, radius):
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.linalg.norm(places - np.array(centre), axis=-1) <= radius


def pair(centre=(20, 13, 17), radius=4.0, shape=(32, 32, 32), zoom=1.0, seed=0):
    """A bright ball of label 1, more than what is clipped of an image, in dim noise."""
    mask = ball(shape, centre, radius)
    image = np.random.default_rng(seed).uniform(1, 20, shape) + 200 * mask
    affine = torch.diag(torch.tensor([zoom, zoom, zoom, 1.0], dtype=torch.float64))
    return [MetaTensor(torch.as_tensor(np.float32(part))[None], affine=affine) for part in (image, mask)]


def refining(contexts, **options):
    made = ICLInferer(options.pop("network", None) or Bright(), device="cpu", refine=True, **options)
    made.set_context(*zip(*contexts, strict=True))
    return made


def both_ways(made, image):
    """Answer of the first pass alone, and with the second."""
    target = made.to_grid(image)
    scores = made(target[None], made.network)[0]
    return made.answer(scores, target, {}), made.answer(scores, target)


def dice(a, b):
    a, b = np.asarray(a) > 0, np.asarray(b) > 0
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("place", [(20, 13, 17), (5, 26, 16), (16, 16, 28)])
def test_a_small_structure_is_found_again_at_finer_voxels(place):
    made = refining([pair((18, 14, 16)), pair((13, 20, 13), seed=1)])
    image, label = pair(place, seed=2)
    first, second = both_ways(made, image)
    done = made.refined[1]
    assert 1 <= done["spacing_mm"] <= WORTHWHILE * made.context.preprocessing.spacing_mm
    assert dice(second[0], label[0]) >= dice(first[0], label[0]) + 0.03 and dice(second[0], label[0]) > 0.85
    inside = np.abs(np.array(place) - done["centre_mm"]) <= np.array(done["region_mm"]) / 2
    assert inside.all() and max(done["region_mm"]) <= 16 * done["spacing_mm"] + 1
    assert torch.equal(made.predict(image).as_tensor(), second.as_tensor())
    assert second.shape == image.shape and torch.equal(second.affine, image.affine)


def test_the_second_pass_sees_target_and_contexts_about_the_label():
    made = refining([pair((11, 20, 16)), pair((20, 11, 16), seed=1)])
    made.predict(pair((16, 16, 16), seed=2)[0])
    (_, _, first), (target, images, masks) = made.network.shown
    assert target.shape == (1, 1, *GRID) and images.shape == masks.shape == (1, 2, 1, *GRID)
    for mask, image in zip(masks[0], images[0], strict=True):
        centre = mask[0].nonzero().float().mean(0)
        assert torch.allclose(centre, torch.full((3,), 7.5), atol=1) and image[mask > 0].min() > 0.5
    assert masks.sum() > 2 * first.sum()  # more voxels of it than before
    assert torch.allclose((target[0, 0] > 0.5).nonzero().float().mean(0), torch.full((3,), 7.5), atol=1)
    assert target.min() == 0 and target.max() == 1


def test_outside_of_the_region_nothing_changes():
    made = refining([pair((16, 16, 16))])
    first, second = both_ways(made, pair((7, 7, 7), seed=3)[0])
    low, high = np.array(made.refined[1]["centre_mm"]) + np.outer((-0.5, 0.5), made.refined[1]["region_mm"])
    beyond = np.ones(first.shape[1:], bool)
    beyond[tuple(slice(max(int(a) - 2, 0), int(b) + 3) for a, b in zip(low, high, strict=True))] = False
    assert beyond.any() and np.array_equal(first[0].numpy()[beyond], second[0].numpy()[beyond])
    assert not torch.equal(first.as_tensor(), second.as_tensor())


def test_labels_compete_after_the_second_pass_as_before():
    image, label = pair((10, 16, 16))
    other = ball((32, 32, 32), (21, 16, 16), 4)
    image[0][torch.as_tensor(other)] += 200
    label = label + 2 * torch.as_tensor(other)[None]
    made = refining([[image, label]])
    target = made.to_grid(image.clone() + 0.5)
    scores = torch.stack([target.as_tensor()[0], 0 * target.as_tensor()[0]])  # the first pass has but one of them
    scores[1, 10:] = target.as_tensor()[0, 10:]
    answer = made.answer(scores, target)[0].numpy()
    assert set(made.refined) == {1, 2} and all("spacing_mm" in done for done in made.refined.values())
    assert dice(answer, label[0]) > 0.9 and (answer[label[0] == 1] == 1).mean() > 0.8
    assert (answer == 1).any() and ((answer == 2) & (label[0].numpy() == 2)).any()


# --- labels that stay as they are


def test_what_was_not_found_stays_so():
    made = refining([pair()])
    target = made.to_grid(pair(seed=1)[0])
    answer = made.answer(torch.zeros(1, *target.shape[1:]), target)
    assert not answer.any() and "did not find" in made.refined[1]["kept"] and not made.network.shown


def test_a_label_that_fills_the_grid_stays_as_it_is(caplog):
    made = refining([pair((16, 16, 16), 13)])
    with caplog.at_level("INFO"):
        first, second = both_ways(made, pair((16, 16, 16), seed=1)[0])
    assert torch.equal(first.as_tensor(), second.as_tensor()) and len(made.network.shown) == 1
    assert "needs the grid as it is" in made.refined[1]["kept"] and "label 1 stays as it is" in caplog.text


def test_voxels_are_never_finer_than_the_scans_own():
    made = refining([pair()])  # the grid's voxels are of 2 mm
    image, _ = pair((8, 9, 7), 2, (18, 18, 18), zoom=1.8, seed=1)
    first, second = both_ways(made, image)
    assert torch.equal(first.as_tensor(), second.as_tensor())
    assert "own voxels of 1.8 mm" in made.refined[1]["kept"]
    image, _ = pair((40, 32, 36), 9, (64, 64, 64), zoom=0.5, seed=1)
    made.predict(image)
    assert made.refined[1]["spacing_mm"] >= (8 + 2 * 4) / 16, "nor so fine that the contexts' region exceeds the grid"


def test_a_label_that_the_second_pass_loses_stays_as_it_is():
    made = refining([pair()], network=Bright(finds_again=False))
    first, second = both_ways(made, pair(seed=1)[0])
    assert first.any() and torch.equal(first.as_tensor(), second.as_tensor())
    assert "nothing was found at" in made.refined[1]["kept"]


def test_without_a_context_but_the_target_itself():
    made = refining([pair()])
    assert not made.predict(pair()[0]).any() and "no context" in made.refined[1]["kept"]


def test_specks_do_not_make_a_region_larger():
    score = np.zeros((20, 20, 20), np.float32)
    assert found_box(score) is None
    score[4:8, 5:9, 6:10] = 0.4
    score[18, 18, 18] = 0.9
    assert found_box(score) == (slice(4, 8), slice(5, 9), slice(6, 10))
    score[15:18, 5:9, 6:10] = 0.3  # another side of it
    assert found_box(score)[0] == slice(4, 18)


# --- size


def test_a_region_larger_than_the_grid_is_tiled():
    made = refining([pair((16, 16, 16))])
    image, label = pair((16, 16, 16), 10, seed=1)
    _, second = both_ways(made, image)
    shapes = {tuple(target.shape) for target, _, _ in made.network.shown}
    assert shapes == {(1, 1, *GRID)} and len(made.network.shown) > 2
    assert max(made.refined[1]["region_mm"]) > 16 * made.refined[1]["spacing_mm"]
    assert dice(second[0], label[0]) > 0.95


def test_a_region_takes_no_more_than_a_few_grids_however_large_the_scan():
    made = refining([pair(radius=4.0)], spacing=6.0)
    target = made.to_grid(pair((60, 60, 60), 50, (120, 120, 120), seed=1)[0])
    scores = made(target[None], made.network)[0]
    finer = made.finer(scores, target)
    assert max(finer[1].scores.shape) <= 2 * 16 + 4


def test_crops_of_the_contexts_serve_all_targets_as_far_as_there_is_room(monkeypatch):
    read, native = [], ContextSet.native
    monkeypatch.setattr(ContextSet, "native", lambda self, number: read.append(number) or native(self, number))
    answers = []
    for cache_mb, expected in ((100, [0, 1]), (0, 2 * [0, 1])):
        made = refining([pair((18, 14, 16)), pair((13, 20, 13), seed=1)], cache_mb=cache_mb)
        read.clear()
        answers.append([made.predict(pair(centre, seed=2)[0]) for centre in ((13, 13, 13), (20, 17, 20))])
        assert read == expected
    assert all(torch.equal(a.as_tensor(), b.as_tensor()) for a, b in zip(*answers, strict=True))


axes = st.tuples(st.booleans(), st.integers(1, 60), st.floats(0.3, 3.0), st.integers(0, 59), st.integers(1, 60))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(described=st.tuples(axes, axes, axes), counts=st.tuples(*[st.integers(1, 40)] * 3))
def test_boxes_hold_the_region_and_lie_in_the_scan_whichever_way_it_is_stored(described, counts):
    def box(turn):
        grid = [GridAxis(i, flipped != turn, size, 0, step) for i, (flipped, size, step, _, _) in enumerate(described)]
        ranges = [(min(a, size - 1), min(max(a + 1, b), size)) for _, size, _, a, b in described]
        return grid, ranges, box_about(grid, ranges, counts)

    grid, ranges, found = box(False)
    _, _, turned = box(True)
    for a, (low, high), (start, stop), other, count in zip(grid, ranges, found, turned, counts, strict=True):
        assert other == (a.size - stop, a.size - start)
        start, stop = other if a.flipped else (start, stop)
        assert 0 <= start <= low < high <= stop <= a.size
        filled = (stop - start - 1) / a.step <= count - 1 + 1e-2 or stop - start == high - low
        assert filled and (stop - start == a.size or (stop - start) / a.step > count - 1 - 1e-2)


# --- scores of two grids


def test_finer_scores_take_the_place_of_the_others_where_they_reach():
    scan = pair(shape=(48, 48, 48), seed=4)[0]
    coarse, fine = Preprocessing(GRID, 3.0), Preprocessing(GRID, 1.0)
    target, near = coarse.target(scan), fine.target(scan, [(8, 24), (16, 32), (24, 40)])
    assert near.shape == (1, *GRID) and torch.allclose(near.affine[:3, 3], torch.tensor([8.0, 16, 24]).double())
    scores = torch.full((2, *target.shape[1:]), 0.2)
    scores[1] = 0.3
    finer = {7: FinerScores(torch.full(GRID, 0.9), near)}
    maps = coarse.to_native(scores, target, 3, [None, finer[7]]).as_tensor()
    assert torch.allclose(maps[1, 8:24, 16:32, 24:40], torch.tensor(0.9), atol=1e-4)
    assert torch.allclose(maps[0], torch.tensor(0.2), atol=1e-4)
    assert int((maps[1] > 0.5).sum()) == 16**3
    answer = coarse.to_native_labels(scores, target, [3, 7], 0.5, finer)[0]
    assert int((answer == 7).sum()) == 16**3 and (answer[8:24, 16:32, 24:40] == 7).all()
    with pytest.raises(ValueError, match="do not fit a target"):
        coarse.to_native_labels(scores, target, [3, 7], 0.5, {7: FinerScores(torch.ones(4, 4, 4), near)})


# --- where it stands among the other options


def test_it_is_for_segmentation():
    with pytest.raises(ValueError, match="--refine true is for segmentation"):
        ICLInferer(Bright(), device="cpu", task="generation", refine=True)


def test_scores_of_a_scan_that_is_not_at_hand():
    made = refining([pair()])
    target = made.to_grid(pair(seed=1)[0])
    made.to_grid(pair(seed=2)[0])
    with pytest.raises(ValueError, match="needs the target's scan"):
        made.answer(torch.zeros(1, *target.shape[1:]), target)


def test_the_final_answer_of_an_ensemble_is_refined_once():
    made = refining([pair((12 + 3 * i, 16, 16), seed=i) for i in range(4)])
    confident = ConfidentInferer(made, ensemble=3, progress=False)
    confident.prepare()
    made.network.shown.clear()
    image, label = pair(seed=9)
    answer = confident.predict(image)
    assert [context.shape[1] for _, context, _ in made.network.shown] == [4, 2, 2, 4]  # the last with all contexts
    assert dice(answer[0], label[0]) > 0.9 and confident.found["agreement"]["1"] > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_nifti):
    root = tmp_path_factory.mktemp("data") / "Dataset001_Balls"
    rng = np.random.default_rng(0)
    for i in range(3):
        image, label = pair(rng.uniform(8, 24, 3), seed=i)
        write_nifti(root / "imagesTr" / f"case_{i}_0000.nii.gz", gaussian_filter(image[0].numpy(), 1), np.eye(4))
        write_nifti(root / "labelsTr" / f"case_{i}.nii.gz", label[0].numpy().astype(np.uint8), np.eye(4))
    described = {"channel_names": {"0": "C0"}, "labels": {"background": 0, "ball": 1}, "numTraining": 3}
    (root / "dataset.json").write_text(json.dumps(described | {"file_ending": ".nii.gz"}))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights whose output is above the threshold in part of the volume."""
    torch.manual_seed(1)
    network = Neuroverse3D(channels=(4, 8), spatial_size=16).eval()
    with torch.no_grad():
        network.target_decoder.output.weight.mul_(50)
        output = network(torch.rand(1, 1, *GRID), torch.rand(1, 2, 1, *GRID), torch.rand(1, 2, 1, *GRID).round())
        network.target_decoder.output.bias.add_(0.5 - output.quantile(0.9))
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def infer(output_dir, folder, weights, **options):
    options = {"dataset_dir": str(folder), "context_dir": str(folder), "context_size": 2, "device": "cpu"} | options
    run_workflow("inference", output_dir=str(output_dir), checkpoint=str(weights), **options)
    return json.loads((output_dir / "report.json").read_text())


def test_the_workflow_refines_and_reports(folder, weights, tmp_path):
    plain = infer(tmp_path / "plain", folder, weights, overlays=False)
    report = infer(tmp_path / "fine", folder, weights, overlays=False, refine="true", probabilities=True)
    assert report["settings"]["refine"] is True and plain["settings"]["refine"] is False
    assert report["fingerprint"] != plain["fingerprint"]
    assert not any("refined" in case for case in plain["cases"].values())
    done = [case["refined"]["1"] for case in report["cases"].values()]
    assert all(("kept" in one) != ({"spacing_mm", "region_mm", "centre_mm"} <= one.keys()) for one in done)
    assert any("spacing_mm" in one for one in done)
    assert "refined at mm" in (tmp_path / "fine" / "report.html").read_text()
    changed = 0
    for name, case in report["cases"].items():
        answers = [np.asarray(nib.load(tmp_path / run / f"{name}.nii.gz").dataobj) for run in ("plain", "fine")]
        score = nib.load(tmp_path / "fine" / "probabilities" / name / "label_1.nii.gz").get_fdata()
        assert ((score > 0.5) == (answers[1] > 0)).mean() > 0.99  # the maps are what the mask was decided by
        changed += not np.array_equal(*answers)
        if "kept" in case["refined"]["1"]:
            assert np.array_equal(*answers)
    assert changed
    with pytest.raises(FileExistsError, match="--overwrite true"):
        infer(tmp_path / "fine", folder, weights, overlays=False)


def test_python_and_workflow_agree(folder, weights, tmp_path):
    report = infer(tmp_path, folder, weights, overlays=False, refine=True)
    made = ICLInferer(str(weights), device="cpu", refine=True, spacing=report["spacing_mm"])
    files = [
        (folder / "imagesTr" / f"{n}_0000.nii.gz", folder / "labelsTr" / f"{n}.nii.gz") for n in report["contexts"]
    ]
    made.set_context(*zip(*files, strict=True))
    name = next(n for n in report["cases"] if n not in report["contexts"])
    answer = made.predict(folder / "imagesTr" / f"{name}_0000.nii.gz")
    assert np.array_equal(answer[0].numpy(), np.asarray(nib.load(tmp_path / f"{name}.nii.gz").dataobj))
    assert {str(value): done for value, done in made.refined.items()} == report["cases"][name]["refined"]
