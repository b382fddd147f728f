"""Report, journal and shards as files."""

import csv
import json
import os

import pytest

from scripts.merge_reports import merge_reports
from scripts.reporting.report_files import ReportFiles, merge_shards, publish, read_report
from scripts.runtime.shards import Shard

ALL = Shard(1, 1)


def entry(volume=1.0):
    return {
        "image_digest": "d",
        "seconds": 1.0,
        "contexts": {"1": ["a"]},
        "volumes_mm3": {"1": volume, "2": 0.5},
        "warnings": [],
    }


def empty(targets=4, fingerprint="f", **more):
    facts = {"fingerprint": fingerprint, "task": "segmentation", "labels": [1, 2], "contexts": ["a"], "spacing_mm": 1.0}
    return facts | {"targets": targets, "shard": "1/1", "finished": False, "cases": {}, "failed": {}} | more


def shard_report(folder, number, count, cases, finished=True, **more):
    report = empty(shard=f"{number}/{count}", finished=finished, **more)
    report["cases"] = {case: entry() for case in cases}
    ReportFiles(folder, Shard(number, count)).fold(report)
    return report


def test_noted_cases_are_read_back_whatever_was_cut_off(tmp_path):
    files, report = ReportFiles(tmp_path, ALL), empty()
    files.fold(report)
    before = files.path.read_text()
    report["failed"]["b"] = ["no reason"]
    files.note(report, "b")
    report["cases"]["a"] = entry()
    files.note(report, "a")
    assert files.path.read_text() == before, "thousands of cases: the whole report is not written for each"
    del report["failed"]["b"]
    report["cases"]["b"] = entry(2)
    files.note(report, "b")
    with files.path.with_suffix(".jsonl").open("a") as journal:
        journal.write('{"fingerprint": "f", "kind": "cases", "ca')
    assert read_report(files.path) == report
    files.fold(report)
    assert not files.path.with_suffix(".jsonl").exists() and read_report(files.path) == report


def test_the_report_is_rewritten_when_time_has_come(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.reporting.report_files.FOLD_SECONDS", 0.0)
    monkeypatch.setattr("scripts.reporting.report_files.FOLD_SHARE", 1e9)
    files, report = ReportFiles(tmp_path, ALL), empty()
    files.fold(report)
    report["cases"]["a"] = entry()
    files.note(report, "a")
    assert json.loads(files.path.read_text()) == report and not list(tmp_path.glob("*.jsonl"))


def test_a_journal_of_another_run_adds_nothing(tmp_path):
    files, report = ReportFiles(tmp_path, ALL), empty()
    files.fold(report)
    report["cases"]["a"] = entry()
    files.note(report, "a")
    journal = files.path.with_suffix(".jsonl").read_text()
    files.fold(empty(fingerprint="g"))
    files.path.with_suffix(".jsonl").write_text(journal)
    assert read_report(files.path)["cases"] == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"cases": 3, "failed": {}}', "\udcff"])
def test_a_damaged_report_is_none(tmp_path, text):
    (tmp_path / "report.json").write_bytes(os.fsencode(text))
    assert read_report(tmp_path / "report.json") == {}
    assert read_report(tmp_path / "nowhere.json") == {}


def test_shards_are_merged(tmp_path, capsys):
    first = shard_report(tmp_path, 1, 2, ["a", "c"])
    shard_report(tmp_path, 2, 2, ["b"])
    files = ReportFiles(tmp_path, Shard(2, 2))
    second = read_report(files.path)
    second["failed"]["d"] = ["broken"]
    files.note(second, "d")  # only in the journal
    merge_reports(str(tmp_path))
    assert "3 cases done, 1 failed, of 4 targets in 2 shards" in capsys.readouterr().out
    merged = json.loads((tmp_path / "report.json").read_text())
    assert list(merged["cases"]) == ["a", "b", "c"] and merged["failed"] == {"d": ["broken"]}
    assert merged["finished"] and merged["shards"] == 2 and "shard" not in merged
    assert {k: merged[k] for k in ("fingerprint", "labels")} == {k: first[k] for k in ("fingerprint", "labels")}
    rows = list(csv.reader((tmp_path / "volumes.csv").open()))
    assert rows[:3] == [["case", "label", "volume_mm3"], ["a", "1", "1.0"], ["a", "2", "0.5"]] and len(rows) == 7
    assert "report" in (tmp_path / "report.html").read_text()


def test_shards_that_are_missing_or_unfinished_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no reports of shards"):
        merge_shards(tmp_path)
    shard_report(tmp_path, 2, 12, ["b"])
    shard_report(tmp_path, 11, 12, ["k"], finished=False)
    with pytest.raises(FileNotFoundError, match=r"11 of 12 shards have not finished \(1, 3, 4, .*--partial true"):
        merge_shards(tmp_path)
    merged = merge_shards(tmp_path, partial=True)
    assert list(merged["cases"]) == ["b", "k"] and not merged["finished"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fingerprint": "g"}, "different contexts, weights or settings"), ({"targets": 5}, "different targets")],
)
def test_shards_of_different_runs_are_refused(tmp_path, change, message):
    shard_report(tmp_path, 1, 2, ["a"])
    shard_report(tmp_path, 2, 2, ["b"], **change)
    with pytest.raises(ValueError, match=f"shards 1 and 2 of 2 .*{message}"):
        merge_shards(tmp_path, partial=True)


def test_another_splitting_does_not_disturb_and_what_was_done_before_stays(tmp_path):
    old = empty()
    old["cases"] = {"early": entry(), "gone": entry(), "a": entry(9.0)}
    publish(old, tmp_path)
    (tmp_path / "early.nii.gz").touch()
    (tmp_path / "a.nii.gz").touch()
    shard_report(tmp_path, 3, 8, ["x"])
    os.utime(ReportFiles(tmp_path, Shard(3, 8)).path, (0, 0))
    shard_report(tmp_path, 1, 2, ["a"])
    shard_report(tmp_path, 2, 2, ["b"])
    merged = merge_shards(tmp_path)
    assert list(merged["cases"]) == ["a", "b", "early"]
    assert merged["cases"]["a"]["volumes_mm3"]["1"] == 1.0


def test_generation_has_no_volumes(tmp_path):
    report = empty(task="generation")
    report["cases"]["a"] = entry() | {"volumes_mm3": {}}
    publish(report, tmp_path)
    assert not (tmp_path / "volumes.csv").exists() and "mm³" not in (tmp_path / "report.html").read_text()
