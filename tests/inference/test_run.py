"""Runs over many targets: failures, interruptions, shards, processes."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.nnunet import DatasetError
from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.inference import native_nifti
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.probabilities import probability_folder
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.reporting.report_files import read_report
from tests.workflows import run_workflow

NAMES = [f"scan_{number}" for number in range(5)]


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    write_cohorts(folder, cohorts=1, subjects=3, spatial_size=16, num_labels=2, progress=False)
    return folder / "Dataset900_Synthetic000"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), path)
    return path


@pytest.fixture
def scans(contexts, tmp_path):
    """A folder of five different scans."""
    source = nib.load(sorted((contexts / "imagesTr").iterdir())[0])
    folder = tmp_path / "scans"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        voxels = np.roll(source.get_fdata(dtype=np.float32), number + 1, 0)
        nib.save(nib.Nifti1Image(voxels, source.affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def infer(contexts, scans, weights, tmp_path):
    """``infer(**options) -> report``."""

    def run(output_dir=tmp_path / "out", **options):
        fixed = {"dataset_dir": str(scans), "context_dir": str(contexts), "context_size": 2, "device": "cpu"}
        plain = {"output_dir": str(output_dir), "checkpoint": str(weights), "overlays": False}
        run_workflow("inference", **fixed | plain | options)
        return report(output_dir)

    return run


def report(folder):
    return json.loads((folder / "report.json").read_text())


def answers(folder):
    """Modification time of every answer."""
    return {path.name.removesuffix(".nii.gz"): path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}


def noted(folder):
    """Cases that the processes have put on record so far."""
    return {case for part in (folder / "shards").glob("report-*.json") for case in read_report(part).get("cases", ())}


def failing(monkeypatch, method, case, error):
    """Let a method of the predictor fail at the target of this name."""
    plain = getattr(ICLInferer, method)

    def wrapped(self, what, *args, **kwargs):
        if case in str(getattr(what, "name", what)):
            raise error
        return plain(self, what, *args, **kwargs)

    monkeypatch.setattr(ICLInferer, method, wrapped)


@pytest.mark.parametrize(
    ("case", "method", "error", "reason"),
    [
        (NAMES[0], "target", MemoryError(), "MemoryError"),
        (NAMES[2], "look", RuntimeError("out of memory\nand more"), "RuntimeError: out of memory"),
        (NAMES[4], "to_native", ValueError("no such thing"), "no such thing"),
    ],
)
def test_a_target_that_fails_on_the_way_is_set_aside(infer, tmp_path, monkeypatch, method, error, reason, case):
    with monkeypatch.context() as patch:
        failing(patch, method, case, error)
        with pytest.raises(DatasetError, match=f"^1 targets were left out: {case}: {reason}$"):
            infer()
    found = report(tmp_path / "out")
    assert found["failed"] == {case: [reason]} and found["finished"]
    assert sorted([*found["cases"], case]) == NAMES and sorted(found["cases"]) == sorted(answers(tmp_path / "out"))
    stamps = answers(tmp_path / "out")
    found = infer()  # the same command tries again what failed, and nothing else
    assert sorted(found["cases"]) == NAMES and not found["failed"]
    assert {k: v for k, v in answers(tmp_path / "out").items() if k != case} == stamps


def test_a_target_that_cannot_be_saved_leaves_nothing_behind(infer, tmp_path, monkeypatch):
    plain = native_nifti.save_native

    def write(answer, filename):
        plain(answer, filename)
        if NAMES[1] in str(filename):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(native_nifti, "save_native", write)
    with pytest.raises(DatasetError, match="Input/output error"):
        infer(probabilities=True)
    found = report(tmp_path / "out")
    assert list(found["failed"]) == [NAMES[1]] and len(found["cases"]) == 4
    assert NAMES[1] not in answers(tmp_path / "out") and not probability_folder(tmp_path / "out", NAMES[1]).exists()


def test_many_failures_are_summed_up(infer, scans, tmp_path):
    for number in range(8):
        (scans / f"bad_{number}.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"^8 targets were left out: bad_0.*; and 3 more, in .*report\.json$"):
        infer()
    assert len(report(tmp_path / "out")["cases"]) == 5


def test_nan_voxels_are_found_when_their_turn_comes(infer, scans, tmp_path):
    voxels = np.ones((8, 8, 8), np.float32)
    voxels[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), scans / "nan.nii.gz")
    with pytest.raises(DatasetError, match="nan: .*nan.nii.gz holds NaN"):
        infer()
    assert sorted(report(tmp_path / "out")["cases"]) == NAMES


def test_the_same_scan_twice_gets_two_answers(infer, scans):
    shutil.copy(scans / f"{NAMES[0]}.nii.gz", scans / "copy.nii.gz")
    found = infer()
    assert len(found["cases"]) == 6 and found["cases"]["copy"]["volumes_mm3"] == found["cases"][NAMES[0]]["volumes_mm3"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_folder_stops_the_run_and_loses_nothing(infer, tmp_path, monkeypatch, code):
    plain = native_nifti.save_native

    def write(answer, filename):
        if NAMES[2] in str(filename):
            raise OSError(code, os.strerror(code))
        plain(answer, filename)

    with monkeypatch.context() as patch:
        patch.setattr(native_nifti, "save_native", write)
        with pytest.raises(OSError, match=r"takes no more files \(.*same command again; 2 targets are done"):
            infer()
    found = report(tmp_path / "out")
    assert list(found["cases"]) == NAMES[:2] and not found["failed"] and not found["finished"]
    stamps = answers(tmp_path / "out")
    assert sorted(infer()["cases"]) == NAMES and stamps.items() <= answers(tmp_path / "out").items()


def test_a_folder_that_cannot_be_written_is_refused_at_once(infer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into .*file.*another --output_dir"):
        infer(output_dir=tmp_path / "file")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("scripts.inference.result_folder.tempfile.NamedTemporaryFile", full)
    with pytest.raises(OSError, match=r"cannot write into .*out \(No space left on device\)"):
        infer()


def test_an_interruption_stops_the_run_and_keeps_what_is_done(infer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "look", NAMES[3], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            infer()
    found = report(tmp_path / "out")
    assert list(found["cases"]) == NAMES[:3] and not found["failed"] and not found["finished"]
    assert sorted(infer()["cases"]) == NAMES


def test_a_failed_picture_does_not_lose_the_answer(infer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("scripts.inference.case_report.overlay_figure", lambda *args, **kwargs: 1 / 0)
        found = infer(overlays=True)
    assert sorted(found["cases"]) == NAMES and not found["failed"]
    assert all(
        "no picture: ZeroDivisionError: division by zero" in case["warnings"] for case in found["cases"].values()
    )
    assert not list((tmp_path / "out").glob("*.png"))


def test_pictures_show_the_contexts_of_the_case(infer, tmp_path, monkeypatch, contexts):
    shown = {}

    def figure(image, mask, spacing, pairs, title, names):
        shown[title] = names
        raise ValueError("seen")

    monkeypatch.setattr("scripts.inference.case_report.overlay_figure", figure)
    itself = sorted((contexts / "imagesTr").iterdir())[0]
    (tmp_path / "more").mkdir()
    shutil.copy(itself, tmp_path / "more" / "itself.nii.gz")
    found = infer(overlays=True, dataset_dir=str(tmp_path / "more"), context_size=3)
    assert len(found["contexts"]) == 3 and len(shown["itself"]) == 2
    assert itself.name.removesuffix("_0000.nii.gz") not in shown["itself"]
    assert set(shown["itself"]) == {name for names in found["cases"]["itself"]["contexts"].values() for name in names}


def test_a_case_is_done_only_when_all_that_is_asked_for_is_there(infer, tmp_path):
    infer()
    first = answers(tmp_path / "out")
    infer(overlays=True, probabilities=True)
    second = answers(tmp_path / "out")
    assert all(second[name] > first[name] for name in NAMES)
    (tmp_path / "out" / f"{NAMES[0]}.png").unlink()
    (probability_folder(tmp_path / "out", NAMES[1]) / "label_2.nii.gz").unlink()
    infer(overlays=True, probabilities=True)
    third = answers(tmp_path / "out")
    assert {name for name in NAMES if third[name] != second[name]} == set(NAMES[:2])
    infer()
    assert answers(tmp_path / "out") == third, "less is asked for"


def test_a_killed_run_is_finished_from_its_journal(infer, tmp_path):
    infer()
    out = tmp_path / "out"
    found, stamps = report(out), answers(out)
    lines = [
        {"fingerprint": found["fingerprint"], "kind": "cases", "case": name, "entry": found["cases"][name]}
        for name in NAMES[:3]
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (out / "report.jsonl").write_text(text[:-20])  # the third line was not finished; the fourth answer not noted
    (out / "report.json").write_text(json.dumps(found | {"cases": {}, "finished": False}))
    (out / f"{NAMES[4]}.nii.gz").unlink()
    (out / ".neuroverse3d-abc_1234.nii.gz").write_bytes(b"cut off")
    assert sorted(infer()["cases"]) == NAMES
    new = answers(out)
    assert {name for name in NAMES if new[name] != stamps.get(name)} == set(NAMES[2:])
    assert not [path for path in out.iterdir() if path.name.startswith(".neuroverse3d-") or path.suffix == ".jsonl"]


def test_a_changed_image_is_in_the_way_and_a_touched_one_is_not(infer, scans, tmp_path):
    infer()
    stamps = answers(tmp_path / "out")
    os.utime(scans / f"{NAMES[0]}.nii.gz", (1, 1))
    infer()
    assert answers(tmp_path / "out") == stamps
    shutil.copy(scans / f"{NAMES[1]}.nii.gz", scans / f"{NAMES[0]}.nii.gz")
    with pytest.raises(FileExistsError, match=rf"\({NAMES[0]}\): give another --output_dir or --overwrite true"):
        infer()
    assert answers(tmp_path / "out") == stamps


def test_runs_over_other_targets_add_to_the_report_and_other_settings_do_not(infer, scans, tmp_path):
    infer(dataset_dir=str(scans / f"{NAMES[0]}.nii.gz"))
    found = infer(dataset_dir=str(scans / f"{NAMES[1]}.nii.gz"))
    assert list(found["cases"]) == NAMES[:2] and found["targets"] == 1
    with pytest.raises(FileExistsError, match=NAMES[0]):  # its report would be lost
        infer(dataset_dir=str(scans / f"{NAMES[2]}.nii.gz"), labels=[1])


def test_every_label_is_announced(infer, monkeypatch):
    seen = []
    monkeypatch.setattr("scripts.inference.run.InferenceRun._show_label", lambda self, *args: seen.append(args))
    infer()
    assert seen == [(1, 1, 2), (2, 2, 2)] * 5


def test_shards_share_the_targets_and_the_last_one_merges(infer, tmp_path):
    out = tmp_path / "out"
    for number in (3, 1):
        with pytest.raises(FileNotFoundError):  # no report of the whole
            infer(shard=f"{number}/3")
    assert sorted(answers(out)) == [NAMES[0], NAMES[2], NAMES[3]]
    stamps = answers(out)
    found = infer(shard="2/3")
    assert sorted(found["cases"]) == NAMES and found["finished"] and (out / "report.html").is_file()
    assert stamps.items() <= answers(out).items()
    stamps = answers(out)
    infer(shard="1/2")
    found = infer()  # neither another splitting nor none does anything again
    assert answers(out) == stamps and sorted(found["cases"]) == NAMES and not (out / "shards").exists()


def test_shards_take_over_the_self_test_of_one_that_has_made_it(infer, tmp_path, monkeypatch):
    made = []
    plain = ConfidentInferer._test
    monkeypatch.setattr(ConfidentInferer, "_test", lambda self: made.append(self) or plain(self))
    with pytest.raises(FileNotFoundError):
        infer(shard="2/2", self_test=True)
    found = infer(shard="1/2", self_test=True)
    assert len(made) == 1
    whole = infer(output_dir=tmp_path / "whole", self_test=True)
    assert len(made) == 2 and found["self_test"] == whole["self_test"]
    for name in NAMES:
        assert found["cases"][name]["expected_dice"] == whole["cases"][name]["expected_dice"] != {}
    infer(output_dir=tmp_path / "whole", self_test=True, overwrite=True)
    assert len(made) == 3


def test_a_shard_may_have_nothing_to_do(infer, tmp_path):
    with pytest.raises(FileNotFoundError):
        infer(shard="9/9")
    assert json.loads((tmp_path / "out" / "shards" / "report-9-of-9.json").read_text())["finished"]


def torchrun(contexts, scans, weights, out, **popen):
    options = {
        "dataset_dir": scans,
        "context_dir": contexts,
        "context_size": 2,
        "checkpoint": weights,
        "output_dir": out,
        "overlays": "false",
        "align": "off",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    return subprocess.Popen(
        [*command, "monai.bundle", "run", "--config_file", "configs/inference.json", *flags],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def test_processes_share_the_targets_and_a_failed_target_ends_none_of_them(
    contexts,
    scans,
    weights,
    tmp_path,
):
    (scans / "a_broken_one.nii.gz").write_bytes(b"nothing")
    process = torchrun(contexts, scans, weights, tmp_path / "out")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "error: 1 targets were left out: a_broken_one" in output, output
    found = report(tmp_path / "out")
    assert sorted(found["cases"]) == NAMES and list(found["failed"]) == ["a_broken_one"], output
    assert found["finished"] and found["shards"] == 2


def test_a_killed_process_loses_no_answer(contexts, scans, infer, weights, tmp_path):
    for number in range(15):
        shutil.copy(scans / f"{NAMES[number % 5]}.nii.gz", scans / f"more_{number}.nii.gz")
    out = tmp_path / "out"
    process = torchrun(contexts, scans, weights, out, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while len(noted(out)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
        os.kill(int(ranks[0]), signal.SIGKILL)
        output, _ = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and not (out / "report.json").exists(), output
    before, stamps = noted(out), answers(out)
    assert before <= stamps.keys()
    found = infer()
    assert len(found["cases"]) == 20 and not found["failed"]
    assert all(answers(out)[name] == stamps[name] for name in before), "what was noted is not done again"


@pytest.mark.parametrize("made_for_it", [True, False])
def test_shards_and_repeated_runs_keep_to_the_precision_that_the_folder_has(infer, tmp_path, monkeypatch, made_for_it):
    monkeypatch.setattr("scripts.runtime.precision.is_fast", lambda *_: not made_for_it)
    with contextlib.suppress(FileNotFoundError):  # there is no report of all before the last shard
        infer(shard="1/2")
    monkeypatch.setattr("scripts.runtime.precision.is_fast", lambda *_: made_for_it)
    merged = infer(shard="2/2")
    assert merged["settings"]["amp"] is not made_for_it and len(merged["cases"]) == len(NAMES)
    with pytest.raises(FileExistsError, match=f"settings .--amp {str(not made_for_it).lower()}.*--overwrite true"):
        infer(amp=made_for_it)
    anew = infer(overwrite=True)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert anew["settings"]["amp"] is made_for_it and manifest["options"]["amp"] is made_for_it
