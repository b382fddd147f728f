"""What this program did not write stays, whatever is asked for; one run per folder; runs that end at any moment."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.runtime import output_folder
from scripts.runtime.output_folder import (
    STATE,
    OutputFolder,
    check_folder,
    put_folder_in_place,
    write_output,
    write_text,
)
from tests.workflows import SMALL, run_workflow

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    write_cohorts(folder, cohorts=1, subjects=4, spatial_size=16, num_labels=2, progress=False)
    return folder / "Dataset900_Synthetic000"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), path)
    return path


@pytest.fixture
def infer(contexts, weights):
    def run(dataset_dir, output_dir, **options):
        fixed = {"context_dir": str(contexts), "context_size": 2, "device": "cpu", "checkpoint": str(weights)}
        paths = {"dataset_dir": str(dataset_dir), "output_dir": str(output_dir)}
        run_workflow("inference", **fixed | paths | {"overlays": False} | options)
        return report(output_dir)

    return run


def scan(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.random.default_rng(seed).random((12, 12, 12), np.float32), AFFINE), path)
    return path


def report(folder):
    return json.loads((folder / "report.json").read_text())


def contents(folder):
    """Every file but the record and what runs remember."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and STATE not in p.parts and p.name[0] != "."}


# --- inference


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("reached", ["as it is", "through a link", "by a hard link"])
def test_an_input_is_never_an_output(infer, tmp_path, overwrite, reached):
    a, b = scan(tmp_path / "A" / "a.nii.gz"), scan(tmp_path / "B" / "x.nii.gz", 1)
    infer(a, tmp_path / "B")
    before = contents(tmp_path / "B")
    source, out = b, tmp_path / "B"
    if reached == "through a link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "B")
    elif reached == "by a hard link":
        source = tmp_path / "C" / "x.nii.gz"
        source.parent.mkdir()
        os.link(b, source)
    with pytest.raises(FileExistsError, match=r"x\.nii\.gz.* is an input of this run, such as a scan"):
        infer(source, out, overwrite=overwrite)
    assert contents(tmp_path / "B") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_replaced_and_not_called_answers(infer, contexts, tmp_path, overwrite):
    targets = tmp_path / "targets"
    for path in (contexts / "imagesTr").iterdir():
        targets.mkdir(exist_ok=True)
        shutil.copy(path, targets / path.name.replace("_0000", ""))
    manual = shutil.copytree(contexts / "labelsTr", tmp_path / "labelsTr")
    before = contents(manual)
    with pytest.raises(FileExistsError, match="were not written by this program") as caught:
        infer(targets, manual, overwrite=overwrite)
    assert "answers" not in str(caught.value) and "--overwrite" not in str(caught.value)
    assert contents(manual) == before


def test_a_faulty_scan_does_not_cost_a_file_of_its_name(infer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.nii.gz").write_bytes(b"no scan")
    other = scan(tmp_path / "out" / "x.nii.gz")
    before = other.read_bytes()
    with pytest.raises(FileExistsError, match="not written by this program"):
        infer(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert other.read_bytes() == before


def test_a_corrected_answer_is_kept(infer, tmp_path):
    scan(tmp_path / "in" / "a.nii.gz")
    infer(tmp_path / "in", tmp_path / "out")
    corrected = scan(tmp_path / "out" / "a.nii.gz", 5).read_bytes()
    scan(tmp_path / "in" / "b.nii.gz", 1)
    found = infer(tmp_path / "in", tmp_path / "out", overlays=True)
    assert sorted(found["cases"]) == ["a", "b"]
    assert any("changed after it was written" in text for text in found["cases"]["a"]["warnings"])
    with pytest.raises(FileExistsError, match="changed since"):
        infer(tmp_path / "in", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == corrected


@pytest.mark.parametrize("swapped", [False, True])
def test_a_folder_of_an_earlier_version_counts_by_its_report(infer, tmp_path, swapped):
    """Its answers may be replaced; a scan of the same name has other volumes."""
    scan(tmp_path / "in" / "a.nii.gz")
    infer(tmp_path / "in", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / STATE)
    output_folder._placed.clear()
    if swapped:
        before = scan(tmp_path / "out" / "a.nii.gz", 3).read_bytes()
        with pytest.raises(FileExistsError, match="changed since"):
            infer(tmp_path / "in", tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before
    else:
        assert list(infer(tmp_path / "in", tmp_path / "out")["cases"]) == ["a"]
        infer(tmp_path / "in", tmp_path / "out", overwrite=True, labels=[1])


def test_two_runs_at_once_both_stay_in_the_report(infer, tmp_path, monkeypatch):
    """The second runs from begin to end while the first is at its first target."""
    scan(tmp_path / "A" / "a.nii.gz")
    scan(tmp_path / "B" / "b.nii.gz", 1)
    plain = ICLInferer.to_native
    inside = []

    def meanwhile(self, *args, **kwargs):
        if not inside:
            inside.append(True)
            infer(tmp_path / "B", tmp_path / "out")
            with pytest.raises(FileExistsError, match="a run with other contexts, weights or settings is at work"):
                infer(tmp_path / "B", tmp_path / "out", labels=[1])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ICLInferer, "to_native", meanwhile)
    found = infer(tmp_path / "A", tmp_path / "out")
    assert sorted(found["cases"]) == ["a", "b"] and found["finished"] and not found["failed"]


def test_a_run_that_was_stalled_keeps_the_answer_that_another_finished(infer, tmp_path, monkeypatch):
    scan(tmp_path / "A" / "a.nii.gz")
    plain = ICLInferer.to_native
    inside = []

    def stalled(self, *args, **kwargs):
        if not inside:
            inside.append(True)
            infer(tmp_path / "A", tmp_path / "out")
            raise OSError("its temporary file is gone")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ICLInferer, "to_native", stalled)
    found = infer(tmp_path / "A", tmp_path / "out")
    assert list(found["cases"]) == ["a"] and not found["failed"] and (tmp_path / "out" / "a.nii.gz").is_file()


def test_a_name_that_is_not_utf8_costs_nothing_else(infer, tmp_path):
    scan(tmp_path / "in" / "a.nii.gz")
    shutil.copy(tmp_path / "in" / "a.nii.gz", os.fsencode(tmp_path / "in") + b"/b\xff.nii.gz")
    with contextlib.suppress(ValueError):  # at most that case
        infer(tmp_path / "in", tmp_path / "out", overlays=True)
    assert "a" in report(tmp_path / "out")["cases"] and report(tmp_path / "out")["finished"]


# --- training


def train(contexts, folder, **options):
    run_workflow("train_stage1", dataset_dir=str(contexts), output_dir=str(folder), **SMALL | {"epochs": 1} | options)


@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(contexts, tmp_path, monkeypatch, options):
    with monkeypatch.context() as patch:
        patch.setattr("scripts.training.training_run.TrainingRun._write", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(contexts, tmp_path)
    assert (tmp_path / "stage1" / "metrics.csv").is_file() and not (tmp_path / "stage1" / "last.pt").exists()
    train(contexts, tmp_path, **options)
    assert (tmp_path / "stage1" / "model.pt").is_file()
    assert len(list((tmp_path / "stage1" / "tensorboard").iterdir())) == 1


def test_a_run_that_ended_between_its_checkpoints_has_both_when_resumed(contexts, tmp_path):
    train(contexts, tmp_path)
    folder = tmp_path / "stage1"
    best = torch.load(folder / "model.pt")
    (folder / "model.pt").unlink()
    train(contexts, tmp_path, resume=True, epochs=2, learning_rate=0.0)
    again = torch.load(folder / "model.pt")
    assert best.keys() == again.keys() and all(torch.equal(again[key], best[key]) for key in best)


def test_one_training_per_folder(contexts, tmp_path):
    with OutputFolder(tmp_path / "stage1").at_work("training.lock"):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(FileExistsError, match="another training is at work in"):
                train(contexts, tmp_path, **options)
    assert os.listdir(tmp_path / "stage1") == [STATE]
    train(contexts, tmp_path)


def test_files_of_others_stay_in_a_training_folder(contexts, tmp_path):
    (tmp_path / "stage1" / "wandb").mkdir(parents=True)
    for name, options in (("model.pt", {"overwrite": True}), ("config.json", {}), ("metrics.csv", {"resume": True})):
        (tmp_path / "stage1" / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} was not written by this program"):
            train(contexts, tmp_path, **options)
        assert (tmp_path / "stage1" / name).read_text() == "mine"
        (tmp_path / "stage1" / name).unlink()


# --- the rule itself


def test_only_what_is_on_record_and_unchanged_is_replaced(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    write_text("one", path)
    write_text("two", path)
    output_folder._placed.clear()
    write_text("three", path)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="changed since"):
        write_text("four", path)
    link = tmp_path / "sub" / "link.txt"
    link.symlink_to(path)
    with pytest.raises(FileExistsError):
        write_text("four", link)
    assert path.read_text() == "mine" and link.is_symlink()


def test_what_appears_while_a_file_is_written_stays(tmp_path):
    path = tmp_path / "a.txt"

    def fill(temporary):
        path.write_text("mine")

    with pytest.raises(FileExistsError):
        write_output(path, fill)
    assert path.read_text() == "mine" and sorted(os.listdir(tmp_path)) == [STATE, "a.txt"]


def test_a_folder_is_replaced_whole_only_if_nobody_added_to_it(tmp_path):
    def make(text):
        made = tmp_path / "made"
        (made / "inner").mkdir(parents=True)
        (made / "inner" / "a.txt").write_text(text)
        put_folder_in_place(made, tmp_path / "out", tmp_path / "aside")
        shutil.rmtree(tmp_path / "aside", ignore_errors=True)

    make("one")
    make("two")
    check_folder(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "inner" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds inner/mine\.txt"):
        check_folder(tmp_path / "out", overwrite=True)
    with pytest.raises(FileExistsError, match="mine"):
        make("three")
    assert (tmp_path / "out" / "inner" / "a.txt").read_text() == "two"
    assert (tmp_path / "out" / "inner" / "mine.txt").read_text() == "mine"


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with OutputFolder(tmp_path).at_work("training.lock") as got, OutputFolder(tmp_path).locked():
        assert not got
    assert caplog.text.count("has no locks") == 1


# --- kill -9 at any moment

_CALLS = ("replace", "link", "fsync", "unlink", "chmod")


def _die_at(number, work):
    """Run ``work`` in a child that is gone, without any clean-up, at its ``number``-th file operation."""
    count = 0

    def dying(plain):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return plain(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, dying(getattr(os, name)))
    work()
    os._exit(0)


def killed_at(number, work):
    child = multiprocessing.get_context("fork").Process(target=_die_at, args=(number, work))
    child.start()
    child.join()
    return child.exitcode == 9


class Killed(BaseException):
    """Stands for the end of the process: whatever would clean up fails with it, too."""


def stopped_at(number, work):
    """Run ``work`` in this process until its ``number``-th file operation, from which on none is done.

    torch's threads do not survive a fork.
    """
    count = 0

    def dying(plain):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= number:
                raise Killed
            return plain(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_result_written_after_a_kill_at_any_moment(tmp_path):
    """The same command goes on: nothing in place that is not on record, nothing left over, files of others kept."""
    kills = 0
    for number in range(1, 40):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")

        def work(folder=folder):
            for text in ("one", "two"):
                for name in ("a.txt", "below/b.txt"):
                    write_text(text, folder / name)

        kills += killed_at(number, work)
        for path in (p for p in folder.rglob("*.txt") if p.name != "mine.txt"):
            assert OutputFolder(folder).wrote(path) and path.read_text() in ("one", "two")
        work()
        OutputFolder(folder).remove_leftovers()
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and STATE not in p.parts}
        assert names == {"mine.txt", "a.txt", "below/b.txt"}
        with pytest.raises(FileExistsError):
            write_text("two", folder / "mine.txt")
    assert kills >= 15


def test_inference_goes_on_after_a_kill_at_any_moment(infer, tmp_path):
    rng = random.Random(0)
    for number in range(3):
        scan(tmp_path / "in" / f"{number}.nii.gz", number)
    out = tmp_path / "out"
    kills = sum(stopped_at(rng.randrange(1, 20), lambda: infer(tmp_path / "in", out)) for _ in range(4))
    assert sorted(infer(tmp_path / "in", out)["cases"]) == ["0", "1", "2"] and kills >= 2
    assert not [path for path in out.rglob("*") if path.name.startswith(f"{STATE}-") or path.suffix == ".jsonl"
                and STATE not in path.parts]  # fmt: skip


def test_training_goes_on_after_a_kill_at_any_moment(contexts, tmp_path):
    rng = random.Random(1)
    train(contexts, tmp_path / "whole", epochs=2)
    run = tmp_path / "run"
    kills = 0
    for _ in range(3):
        kills += stopped_at(rng.randrange(1, 40), lambda: train(contexts, run, epochs=2, resume=True))
    with contextlib.suppress(ValueError):  # one of them may have finished it
        train(contexts, run, epochs=2, resume=True)
    states = [torch.load(folder / "stage1" / "model.pt") for folder in (run, tmp_path / "whole")]
    assert kills >= 2 and all(torch.equal(states[0][key], states[1][key]) for key in states[1])
