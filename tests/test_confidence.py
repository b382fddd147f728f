"""Agreement, expected Dice and flags, with networks whose answer is known; and in the inference workflow."""

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.confidence import ConfidentInferer, Votes
from scripts.data.written_cohorts import write_cohorts
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
    inferer = ICLInferer(Network(answer), device="cpu", task=task)
    images, labels = zip(*(pair(seed, to_the_left) for seed in range(count)), strict=True)
    inferer.set_context(images, labels)
    return ConfidentInferer(inferer, progress=False, **options)


def votes_of(*members):
    votes = Votes()
    for member in members:
        votes.add(member)
    return votes.agreement(sum(members) / len(members))


def blob(height):
    scores = torch.zeros(1, 1, 6, 6, 6)
    scores[..., 1:5, 1:5, 1:5] = height
    return scores


def test_agreement_of_firm_masks_is_one():
    assert votes_of(blob(1.0), blob(1.0)) == [1.0]


def test_agreement_falls_with_soft_scores_and_with_members_that_differ():
    (soft,) = votes_of(blob(0.6))  # gone at two of five thresholds
    assert soft == pytest.approx(2 * 0.6 / 1.6)
    (apart,) = votes_of(blob(1.0), blob(1.0), blob(1.0).roll(1, 2))
    assert 0.8 < apart < 1


def test_agreement_counts_against_the_other_labels():
    rival = torch.cat((blob(1.0), blob(0.9)), dim=1)
    first, second = votes_of(rival)
    assert first == pytest.approx(2 * 0.6 / 1.6) and second == 0
    assert votes_of(blob(0.1)) == [0.0]


def test_agreement_is_with_the_answer_where_labels_touch():
    touching = torch.cat((blob(0.45), blob(0.4)), dim=1)  # the first one's everywhere, at three of five thresholds
    first, second = votes_of(touching)
    assert first == pytest.approx(2 * 0.6 / 1.6) and second == 0


def test_without_ensemble_the_scores_are_the_predictors_own():
    confident = predictor()
    target = confident.inferer.to_grid(MetaTensor(pair(50)[0][None], affine=torch.eye(4)))[None]
    plain = confident.inferer(target, confident.inferer.network)
    assert torch.equal(confident(target, confident.inferer.network), plain)
    image = pair(50)[0]
    assert torch.equal(confident.predict(image), confident.inferer.predict(image)) and confident.predict(image).any()
    assert set(confident.found) == {"similarity", "agreement", "expected_dice", "flags"}
    assert confident.found["expected_dice"] == {} and 0.5 < confident.found["agreement"]["1"] < 1
    assert confident.found["flags"] == [] and confident.found["similarity"] > 0.8


def test_an_ensemble_averages_and_is_repeatable():
    first, again, other = (predictor(ensemble=4, seed=seed) for seed in (0, 0, 1))
    scores = []
    for confident in (first, again, other):
        target = confident.inferer.to_grid(MetaTensor(pair(50)[0][None], affine=torch.eye(4)))[None]
        confident.prepare()
        confident.inferer.network.calls = 0
        scores.append(confident(target, confident.inferer.network))
        assert confident.inferer.network.calls == 4
        assert len(confident.inferer.used[1]) == 6  # the members use parts of these
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    labels = confident.inferer.context.pairs()[1].float()
    assert scores[0].min() >= 0 and torch.all(scores[0][0] <= labels.amax(0))


def test_self_test_turns_agreement_into_expected_dice():
    confident = predictor(self_test=True)
    found = confident.prepare()
    assert len(found["contexts"]) == 6 and 0.6 < found["mean_dice"]["1"] < 1
    confident.predict(pair(50)[0])
    agreement, expected = (confident.found[key]["1"] for key in ("agreement", "expected_dice"))
    mean_dice, mean_agreement = (found[key]["1"] for key in ("mean_dice", "mean_agreement"))
    assert expected == pytest.approx(mean_dice * (agreement / mean_agreement) ** 1.75, abs=1e-3)
    assert abs(expected - mean_dice) < 0.15
    other = predictor(self_test=True)
    other.inferer.network.calls = 0
    assert other.prepare(json.loads(json.dumps(found))) == found and other.inferer.network.calls == 0
    other.predict(pair(50)[0])
    assert other.found == confident.found


def test_an_answer_less_firm_than_in_any_context_is_flagged():
    def unsure_of_dark_scans(target, labels):
        return labels.mean(1) * (1 if target.mean() > 0.1 else 0.7)

    confident = predictor(unsure_of_dark_scans, self_test=True)
    confident.predict(pair(50)[0])
    assert not confident.found["flags"] and confident.found["expected_dice"]["1"] > 0.6
    firm = confident.found["expected_dice"]["1"]
    confident.predict(pair(50)[0] ** 6)
    assert any("label 1: agreement" in flag for flag in confident.found["flags"])
    assert confident.found["expected_dice"]["1"] < firm


def test_a_scan_unlike_the_contexts_is_flagged():
    confident = predictor()
    confident.predict(1 - pair(50)[0])
    assert any("unlike every context in layout" in flag for flag in confident.found["flags"])


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
    assert confident.predict(pair(50)[0]).any() and confident.found["expected_dice"] == {}


def test_a_target_among_two_contexts_still_has_the_other_in_every_member():
    confident = predictor(count=2, ensemble=5)
    assert confident.predict(pair(0)[0]).any()  # a member without contexts would have dragged the mean below 0.5
    assert confident.found["agreement"]["1"] == 1


def test_image_to_image_tasks_have_no_dice(caplog):
    confident = predictor(task="generation", ensemble=3, self_test=True)
    assert confident.prepare() is None and "no self-test" in caplog.text
    confident.predict(pair(50)[0])
    assert confident.found["agreement"] == {} and confident.found["similarity"] > 0.8


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
