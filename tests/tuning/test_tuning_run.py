"""Tuning on a context set through the predictor and the workflow: what is kept, reported, and gone on with."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Events

from scripts.checkpoint import load_network
from scripts.inference.confidence import ConfidentInferer
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.training import time_budget
from scripts.tuning import tuning_run
from scripts.tuning.cases import find_cases
from tests.inference.test_alignment import SIZE, subject
from tests.tuning.judgement import winning
from tests.workflows import run_workflow

QUICK = {"steps": 3, "learning_rate": 1e-3, "amp": False, "minutes": 10.0}


def network(seed=0):
    torch.manual_seed(seed)
    return Neuroverse3D(channels=(4, 8), spatial_size=SIZE)


def predictor(count=3, align="off"):
    inferer = ICLInferer(network(), device="cpu", align=align)
    inferer.set_context(*zip(*(subject(seed) for seed in range(count)), strict=True))
    return inferer


def weights(inferer):
    return {name: value.clone() for name, value in inferer.network.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_tuned_weights_that_win_are_used_and_taken_again(monkeypatch, tmp_path):
    winning(monkeypatch, 0.1)
    inferer = predictor(align="affine")
    before = weights(inferer)
    report = inferer.tune(output_dir=tmp_path, **QUICK)
    assert report["kept"] and report["gain"] == pytest.approx(0.1, abs=1e-3) and report["judged"] == 3
    assert not same(before, weights(inferer)) and same(
        weights(inferer), load_network(tmp_path / "model.pt").state_dict()
    )
    assert not (tmp_path / "last.pt").exists() and json.loads((tmp_path / "report.json").read_text()) == report
    # what to expect is what contexts had while they were kept out, whether a self-test is asked for or not
    for confident in (ConfidentInferer(inferer), ConfidentInferer(inferer, self_test=True, progress=False)):
        assert confident.prepare() == report["self_test"]
    image, _ = subject(10)
    found = inferer.predict(image)
    again = predictor(align="affine")
    monkeypatch.setattr(tuning_run.TuningRun, "_tune", lambda *_: pytest.fail("tuned again"))
    assert again.tune(output_dir=tmp_path, **QUICK) == report and torch.equal(again.predict(image), found)


def test_weights_that_do_not_win_stay(monkeypatch, tmp_path):
    winning(monkeypatch, 0.001)
    inferer = predictor()
    before = weights(inferer)
    report = inferer.tune(output_dir=tmp_path, **QUICK)
    assert not report["kept"] and report["self_test"]["mean_dice"]["1"] < 1
    assert same(before, weights(inferer)) and same(before, load_network(tmp_path / "model.pt").state_dict())


class Looking(torch.nn.Module):
    """Answers the mean of the labels that it is shown, and what it has learnt to see in the target."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.tensor((SIZE,) * 3))
        self.look = torch.nn.Conv3d(1, 1, 3, padding=1)
        torch.nn.init.zeros_(self.look.weight)
        torch.nn.init.zeros_(self.look.bias)

    def forward(self, target_in, context_in, context_out, mini_context_size):
        return context_out.mean(1) + self.look(target_in)


@pytest.mark.parametrize("exchanged", [False, True])
def test_only_labels_that_can_be_learnt_give_weights_that_win(exchanged):
    pairs = [(image + label, label) for image, label in (subject(seed, degrees=12, shift=3) for seed in range(4))]
    if exchanged:  # each lies somewhere else
        places = ((8, 0, 0), (0, -9, 0), (0, 0, 8), (-7, 7, 0))
        pairs = [(image, np.roll(label, place, (0, 1, 2))) for (image, label), place in zip(pairs, places, strict=True)]
    inferer = ICLInferer(Looking(), device="cpu", align="off")
    inferer.set_context(*zip(*pairs, strict=True))
    before = weights(inferer)
    report = inferer.tune(**QUICK | {"steps": 30, "learning_rate": 3e-2})
    assert report["kept"] is not exchanged and same(before, weights(inferer)) is exchanged


def test_each_case_is_judged_by_weights_that_never_had_it_as_a_target(monkeypatch):
    inferer, judged = predictor(4), []
    monkeypatch.setattr(
        tuning_run.TuningRun,
        "_judged",
        lambda self, case: judged.append((case, self.episodes)) or self.inferer.tested(case),
    )
    shown = []
    plain = tuning_run.AlignedEpisodes.show
    monkeypatch.setattr(
        tuning_run.AlignedEpisodes, "show", lambda self, cases, of: (shown.append(cases), plain(self, cases, of))
    )
    inferer.tune(**QUICK)
    assert len(shown) == 4 and len(judged) == 8  # halfway and at the end of each fold
    for fold, cases in enumerate(shown):
        (halfway, _), (end, _) = judged[2 * fold : 2 * fold + 2]
        assert halfway is end and len(cases) == 3 and end not in cases
    assert len({case.name for case, _ in judged}) == 4


def test_folds_have_less_time_once_judging_takes_longer(monkeypatch):
    clock, begun = SimpleNamespace(now=0.0), []

    def tested(self, case, network=None):
        clock.now += 1 if network is None else 100
        return plain(self, case, network)

    plain = ConfidentInferer.tested
    for module in (tuning_run, time_budget):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(ConfidentInferer, "tested", tested)
    begin = tuning_run.TimeBudget.begin
    monkeypatch.setattr(
        tuning_run.TimeBudget, "begin", lambda self, seconds: begun.append(seconds) or begin(self, seconds)
    )
    predictor(4).tune(**QUICK)
    # of 600 s, 4 pass with the judgement before and 1 is spared; then a fold has two judgements of 100 s instead of 1 s
    assert begun == pytest.approx([595 / 4 - 1.1, 395 / 3 - 100, 0, 0])


def test_a_single_pair_is_tuned_on_deformed_copies_and_says_so():
    inferer = predictor(1)
    report = inferer.tune(**QUICK)
    assert "deformed copies" in report["judged_on"] and report["self_test"] is None
    assert report["judged"] == 4 and report["tuned_on"] == 9
    cases = find_cases(inferer, 100, seed=0)
    names = [[case.name for case in part] for part in (cases.tuned_in(0), cases.judged_in(0))]
    assert cases.copies and not set(names[0]) & set(names[1])
    one, other = cases.judged_in(0)[:2]
    assert one.target.digest != other.target.digest and 0 < float((one.label == 1).float().mean()) < 0.1


def test_two_pairs_are_tuned_on_each_other_and_judged_on_copies_predicted_from_the_other():
    cases = find_cases(predictor(2), 100, seed=0)
    assert cases.copies and sorted(case.name for case in cases.tuned_in(0)) == ["context 1", "context 2"]
    judged = cases.judged_in(0)
    assert [case.name for case in judged] == [f"copy {i} of context {2 - i % 2}" for i in range(1, 5)]


def test_stopped_and_resumed_ends_with_the_same_weights(tmp_path):
    whole = predictor()
    whole.tune(output_dir=tmp_path / "whole", **QUICK)
    (expected,) = [json.loads((tmp_path / "whole" / "report.json").read_text())]

    def stop(engine):
        if engine.state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    inferer = predictor()
    plain = tuning_run.TuningRun._run_fold

    def stopped(self, fold, *rest):
        with self.trainer.add_event_handler(Events.ITERATION_STARTED, stop):
            plain(self, fold, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_run.TuningRun, "_run_fold", stopped)
        with pytest.raises(SystemExit) as ended:
            inferer.tune(output_dir=tmp_path / "cut", **QUICK)
    assert ended.value.code == 143
    found = predictor()
    report = found.tune(output_dir=tmp_path / "cut", **QUICK)
    assert report["cases"] == expected["cases"] and same(weights(found), weights(whole))


def test_another_context_set_does_not_go_on_with_a_tuning(tmp_path):
    predictor().tune(output_dir=tmp_path, **QUICK)
    other = predictor(4)
    with pytest.raises(FileExistsError, match="--overwrite true"):
        other.tune(output_dir=tmp_path, **QUICK)
    assert other.tune(output_dir=tmp_path, overwrite=True, **QUICK)["judged"] == 4


def test_inference_tunes_once_and_says_so(monkeypatch, tmp_path, write_nifti):
    winning(monkeypatch, 0.1)
    plain, calls = ICLInferer.tune, []
    steps = {name: value for name, value in QUICK.items() if name != "minutes"}
    monkeypatch.setattr(
        ICLInferer,
        "tune",
        lambda self, minutes, *rest: calls.append((minutes, *rest)) or plain(self, minutes, *rest, **steps),
    )
    for seed in range(4):
        image, label = subject(seed)
        if seed == 3:
            write_nifti(tmp_path / "targets" / "case_3.nii.gz", image)
        else:
            write_nifti(tmp_path / "contexts" / "imagesTr" / f"case_{seed}_0000.nii.gz", image)
            write_nifti(tmp_path / "contexts" / "labelsTr" / f"case_{seed}.nii.gz", label)
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    options = {
        "dataset_dir": str(tmp_path / "targets"), "context_dir": str(tmp_path / "contexts"), "device": "cpu",
        "output_dir": str(tmp_path / "out"), "checkpoint": str(tmp_path / "weights.pt"), "tune": 2,
    }  # fmt: skip
    run_workflow("inference", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tuning"]["kept"] and report["tuning"]["minutes"] == 2
    assert calls == [(2.0, tmp_path / "out" / "tuned", False)]
    assert any("mean Dice" in line and "kept out" in line for line in report["warnings"])
    assert report["self_test"]["mean_dice"] and report["cases"]["case_3"]["expected_dice"]
    monkeypatch.setattr(tuning_run.TuningRun, "_tune", lambda *_: pytest.fail("tuned again"))
    run_workflow("inference", **options)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["tuning"] == report["tuning"]
    with pytest.raises(FileExistsError, match="--overwrite true"):
        run_workflow("inference", **options | {"tune": 0})


@pytest.mark.parametrize(
    ("options", "message"), [({"minutes": 0.0}, "--minutes"), ({"unpair_fraction": 2.0}, "unpair")]
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        predictor(2).tune(**QUICK | options)
