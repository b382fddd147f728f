"""Agreement, expected Dice and flags, with networks whose answer is known; and in the inference workflow."""

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.inference.confidence import ConfidentInferer, Firmness
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from tests.workflows import run_workflow

SIZE = 16


class Network(torch.nn.Module):
    """Answers ``answer(target, labels)``, labels ``(B, L, 1, H, W, D)``; counts its calls."""

    def __init__(self, answer):
        super().__init__()
        self.register_buffer("grid", torch.tensor((SIZE,) * 3))
        self.answer = answer
        self.calls = 0

    def forward(self, target, images, labels, mini_context_size):
        self.calls += 1
        return self.answer(target, labels)


def label_average(target, labels):
    return labels.mean(1)


def pair(seed, to_the_left=0):
    """A scan whose bright ball is labelled, at a place and with noise of its own."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"), -1)
    label = np.linalg.norm(grid - 7.5 + [to_the_left, 0, 0] - rng.uniform(-1, 1, 3), axis=-1) < 4
    image = 0.2 + 0.6 * label + 0.1 * rng.random((SIZE,) * 3)
    return image.astype(np.float32), label.astype(np.float32)


def predictor(answer=label_average, count=6, task="segmentation", to_the_left=0, **options):
    inferer = ICLInferer(Network(answer), device="cpu", task=task, align="off")
    images, labels = zip(*(pair(seed, to_the_left) for seed in range(count)), strict=True)
    inferer.set_context(images, labels)
    return ConfidentInferer(inferer, progress=False, **options)


def confidence_of(confident, image):
    return confident.complete(confident.predictor.target(image)).confidence


def agreement_of(*members):
    firmness = Firmness()
    for member in members:
        firmness.add(member[0])
    return firmness.agreement(sum(members)[0] / len(members))


def blob(height):
    scores = torch.zeros(1, 1, 6, 6, 6)
    scores[..., 1:5, 1:5, 1:5] = height
    return scores


def test_agreement_of_firm_masks_is_one():
    assert agreement_of(blob(1.0), blob(1.0)) == [1.0]


def test_agreement_falls_with_soft_scores_and_with_members_that_differ():
    (soft,) = agreement_of(blob(0.6))  # gone at two of five thresholds
    assert soft == pytest.approx(2 * 0.6 / 1.6)
    (apart,) = agreement_of(blob(1.0), blob(1.0), blob(1.0).roll(1, 2))
    assert 0.8 < apart < 1


def test_agreement_counts_against_the_other_labels():
    rival = torch.cat((blob(1.0), blob(0.9)), dim=1)
    first, second = agreement_of(rival)
    assert first == pytest.approx(2 * 0.6 / 1.6) and second == 0
    assert agreement_of(blob(0.1)) == [0.0]


def test_agreement_is_with_the_answer_where_labels_touch():
    touching = torch.cat((blob(0.45), blob(0.4)), dim=1)  # the first one's everywhere, at three of five thresholds
    first, second = agreement_of(touching)
    assert first == pytest.approx(2 * 0.6 / 1.6) and second == 0


def test_without_ensemble_the_scores_are_the_predictors_own():
    confident = predictor()
    image, network = pair(50)[0], confident.predictor.network
    on_grid = confident.predictor.target(image).image[None]
    assert torch.equal(confident(on_grid, network), confident.predictor(on_grid, network))
    assert torch.equal(confident.predict(image), confident.predictor.predict(image)) and confident.predict(image).any()
    found = confidence_of(confident, image)
    assert set(found) == {"similarity", "agreement", "expected_dice", "flags"}
    assert found["expected_dice"] == {} and 0.5 < found["agreement"]["1"] < 1
    assert found["flags"] == [] and found["similarity"] > 0.8


def test_an_ensemble_averages_and_is_repeatable():
    first, again, other = (predictor(ensemble=4, seed=seed) for seed in (0, 0, 1))
    scores = []
    for confident in (first, again, other):
        target = confident.predictor.target(pair(50)[0])
        confident.prepare()
        confident.predictor.network.calls = 0
        scores.append(confident(target.image[None], confident.predictor.network, target=target))
        assert confident.predictor.network.calls == 4
        assert len(target.used[1]) == 6  # the members use parts of these
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    labels = confident.predictor.context.pairs()[1].float()
    assert scores[0].min() >= 0 and torch.all(scores[0][0] <= labels.amax(0))


def test_self_test_turns_agreement_into_expected_dice():
    confident = predictor(self_test=True)
    found = confident.prepare()
    assert len(found["contexts"]) == 6 and 0.6 < found["mean_dice"]["1"] < 1
    trust = confidence_of(confident, pair(50)[0])
    agreement, expected = (trust[key]["1"] for key in ("agreement", "expected_dice"))
    mean_dice, mean_agreement = (found[key]["1"] for key in ("mean_dice", "mean_agreement"))
    assert expected == pytest.approx(mean_dice * (agreement / mean_agreement) ** 1.75, abs=1e-3)
    assert abs(expected - mean_dice) < 0.15
    other = predictor(self_test=True)
    other.predictor.network.calls = 0
    assert other.prepare(json.loads(json.dumps(found))) == found and other.predictor.network.calls == 0
    assert confidence_of(other, pair(50)[0]) == trust


def test_an_answer_less_firm_than_in_any_context_is_flagged():
    def unsure_of_dark_scans(target, labels):
        return labels.mean(1) * (1 if target.mean() > 0.1 else 0.7)

    confident = predictor(unsure_of_dark_scans, self_test=True)
    firm, unsure = (confidence_of(confident, image) for image in (pair(50)[0], pair(50)[0] ** 6))
    assert not firm["flags"] and firm["expected_dice"]["1"] > 0.6
    assert any("label 1: agreement" in flag for flag in unsure["flags"])
    assert unsure["expected_dice"]["1"] < firm["expected_dice"]["1"]


def test_a_scan_unlike_the_contexts_is_flagged():
    flags = confidence_of(predictor(), 1 - pair(50)[0])["flags"]
    assert any("unlike every context in layout" in flag for flag in flags)


def test_only_mirrors_that_do_no_harm_are_used(caplog):
    left = (torch.arange(SIZE) < SIZE // 2)[:, None, None]
    caplog.set_level(logging.INFO)
    even = predictor(ensemble=2)
    even.prepare()
    assert "mirrored in the ensemble: left-right, front-back, up-down" in caplog.text
    caplog.clear()
    sided = predictor(lambda target, labels: labels.mean(1) * left, to_the_left=3, ensemble=2)
    sided.prepare()
    assert "mirrored in the ensemble: front-back, up-down" in caplog.text


def test_a_label_in_one_context_only_has_no_self_test(caplog):
    confident = predictor(count=1, self_test=True, ensemble=3)
    assert confident.prepare() is None
    assert "two contexts or more" in caplog.text
    assert confident.predict(pair(50)[0]).any() and confidence_of(confident, pair(50)[0])["expected_dice"] == {}


def test_a_target_among_two_contexts_still_has_the_other_in_every_member():
    confident = predictor(count=2, ensemble=5)
    assert confident.predict(pair(0)[0]).any()  # a member without contexts would have dragged the mean below 0.5
    assert confidence_of(confident, pair(0)[0])["agreement"]["1"] == 1


def test_image_to_image_tasks_have_no_dice(caplog):
    confident = predictor(task="generation", ensemble=3, self_test=True)
    assert confident.prepare() is None and "no self-test" in caplog.text
    found = confidence_of(confident, pair(50)[0])
    assert found["agreement"] == {} and found["similarity"] > 0.8


def test_senseless_ensemble():
    with pytest.raises(ValueError, match="--ensemble must be at least 1, got 0"):
        predictor(ensemble=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(output_dir, **options) -> report`` on eight synthetic subjects, half of them contexts."""
    folder = tmp_path_factory.mktemp("trust")
    write_cohorts(folder, cohorts=1, subjects=8, spatial_size=SIZE, num_labels=2, progress=False)
    data = folder / "Dataset900_Synthetic000"
    torch.manual_seed(0)
    network = Neuroverse3D(channels=(4, 8), spatial_size=SIZE)
    with torch.no_grad():  # random weights that find something everywhere
        network.target_decoder.output.bias.add_(1)
    torch.save(network.state_dict(), folder / "model.pt")

    def infer(output_dir, **options):
        files = {"dataset_dir": str(data), "context_dir": str(data), "checkpoint": str(folder / "model.pt")}
        run_workflow("inference", output_dir=str(output_dir), device="cpu", overlays=False, **files, **options)
        return json.loads((output_dir / "report.json").read_text())

    return infer


def test_report(run, tmp_path):
    report = run(tmp_path, context_size=4, self_test="True", ensemble="2")
    assert set(report["self_test"]["contexts"]) == set(report["contexts"])
    assert report["self_test"]["worst"] in report["contexts"]
    for case in report["cases"].values():
        assert set(case["agreement"]) == set(case["expected_dice"]) == {"1", "2"}
        assert all(0 <= value <= 1 for key in ("agreement", "expected_dice") for value in case[key].values())
        assert -1 <= case["similarity"] <= 1 and isinstance(case["flags"], list)
    assert any(case["agreement"]["1"] > 0 for case in report["cases"].values())
    again = run(tmp_path, context_size=4, self_test=True, ensemble=2)
    assert again["cases"] == report["cases"] and again["self_test"] == report["self_test"]
    with pytest.raises(FileExistsError, match="--overwrite true"):
        run(tmp_path, context_size=4, ensemble=3)


def test_answers_do_not_change_by_default(run, tmp_path):
    plain = run(tmp_path / "plain", context_size=4)
    tested = run(tmp_path / "tested", context_size=4, self_test=True)
    assert "self_test" not in plain and "self_test" in tested
    for path in (tmp_path / "plain").glob("*.nii.gz"):
        answers = [np.asarray(nib.load(p).dataobj) for p in (path, tmp_path / "tested" / path.name)]
        assert np.array_equal(*answers)
