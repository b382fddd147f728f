"""The report of an inference run as files: no finished case is forgotten, and thousands are cheap to note down.

A process notes every case in a journal, one line each, and folds the journal into its report from time to time.
With the targets split over several processes each has a report of its own in ``shards/``; they are merged into the
``report.json`` of the run when all are there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.atomic import write_csv, write_json
from scripts.report_page import write_page
from scripts.shards import Shard

logger = logging.getLogger(__name__)

REPORT = "report.json"
VOLUMES = "volumes.csv"
SHARDS = "shards"
FOLD_SECONDS = 30.0
FOLD_SHARE = 0.02
"""A report is rewritten so seldom that it takes no more than this part of the time."""

Report = dict[str, Any]


class ReportFiles:
    """Report and journal of one process.

    Args:
        folder: the run's output folder.
        shard: which part of the targets is this process's.
    """

    def __init__(self, folder: str | os.PathLike, shard: Shard) -> None:
        digits = len(str(shard.count))
        part = f"{SHARDS}/report-{shard.number:0{digits}d}-of-{shard.count}.json"
        self.folder = Path(folder)
        self.path = self.folder / (REPORT if shard.count == 1 else part)
        self._due = 0.0

    def fold(self, report: Report) -> None:
        """Write the whole report; the journal begins anew."""
        started = time.monotonic()
        write_json(report, self.path)
        _journal(self.path).unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + max(FOLD_SECONDS, (now - started) / FOLD_SHARE)

    def note(self, report: Report, case: str) -> None:
        """Note down a case that was just entered in the report, done or failed.

        Args:
            report: the whole report.
            case: its name.

        Raises:
            OSError: the folder takes no more.
        """
        if time.monotonic() >= self._due:
            self.fold(report)
            return
        kind = "cases" if case in report["cases"] else "failed"
        line = {"fingerprint": report["fingerprint"], "kind": kind, "case": case, "entry": report[kind][case]}
        with _journal(self.path).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line, allow_nan=False) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def earlier(self) -> Iterator[Report]:
        """Every report that earlier runs left in the folder, whoever wrote it."""
        for path in (self.folder / REPORT, *sorted((self.folder / SHARDS).glob("report-*.json"))):
            if report := read_report(path):
                yield report


def read_report(path: str | os.PathLike) -> Report:
    """A report with what its journal adds; empty if there is none, or none that can be read."""
    path = Path(path)
    report = _parsed(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    if not isinstance(report.get("cases"), dict) or not isinstance(report.get("failed"), dict):
        return {}
    if _journal(path).is_file():
        for text in _journal(path).read_text(encoding="utf-8", errors="replace").splitlines():
            line = _parsed(text)  # the last one may have been cut short
            if line and line["fingerprint"] == report.get("fingerprint"):
                report["failed"].pop(line["case"], None)
                report[line["kind"]][line["case"]] = line["entry"]
    return report


def publish(report: Report, folder: str | os.PathLike) -> None:
    """Write the report of a whole run, for programs and for people: JSON, page, and table of volumes."""
    folder = Path(folder)
    write_json(report, folder / REPORT)
    _journal(folder / REPORT).unlink(missing_ok=True)
    rows = [
        (case, label, volume)
        for case, entry in sorted(report["cases"].items())
        for label, volume in entry["volumes_mm3"].items()
    ]
    if rows:
        write_csv(("case", "label", "volume_mm3"), rows, folder / VOLUMES)
    write_page(report, folder)


def merge_shards(folder: str | os.PathLike, partial: bool = False) -> Report:
    """Make the report of a run from those of its shards.

    Cases that an earlier ``report.json`` of the same contexts, weights and settings has are kept if their answers
    are still there.

    Args:
        folder: the run's output folder.
        partial: go on although shards are missing or have not finished.

    Returns:
        The report, which :func:`publish` writes.

    Raises:
        FileNotFoundError: no reports of shards, or some are missing or unfinished.
        ValueError: they are of different runs.
    """
    folder = Path(folder)
    paths = list((folder / SHARDS).glob("report-*-of-*.json"))
    if not paths:
        raise FileNotFoundError(f"no reports of shards in {folder / SHARDS}")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)  # the folder may hold those of another splitting
    count = newest.stem.rpartition("-")[2]
    parts = {number: read_report(ReportFiles(folder, Shard(number, int(count))).path) for number in _upto(count)}
    there = {number: part for number, part in parts.items() if part}
    for what, name in (("contexts, weights or settings", "fingerprint"), ("targets", "targets")):
        values = {number: part[name] for number, part in there.items()}
        first = next(iter(values))
        other = next((number for number in values if values[number] != values[first]), None)
        if other is not None:
            raise ValueError(
                f"shards {first} and {other} of {count} in {folder} had different {what}: run all of them with one "
                "command and the same files"
            )
    missing = [number for number, part in parts.items() if not part.get("finished")]
    if missing and not partial:
        listing = ", ".join(map(str, missing[:20])) + (" ..." if len(missing) > 20 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {count} shards have not finished ({listing}): run them (again), or merge what there "
            "is with --partial true"
        )
    merged = next(iter(there.values())) | {"shards": int(count), "finished": not missing, "cases": {}, "failed": {}}
    before = read_report(folder / REPORT)
    if before.get("fingerprint") == merged["fingerprint"]:
        merged["cases"] = {k: v for k, v in before["cases"].items() if (folder / f"{k}.nii.gz").is_file()}
    for part in there.values():
        merged["cases"] |= part["cases"]
        merged["failed"] |= part["failed"]
    merged["cases"] = {
        name: entry for name, entry in sorted(merged["cases"].items()) if name not in merged["failed"]
    }  # fmt: skip
    del merged["shard"]
    return merged


def remove_shards(folder: str | os.PathLike) -> None:
    """Take away reports of shards that a run without shards has made out of date."""
    shards = Path(folder) / SHARDS
    for path in shards.glob("report-*.json*"):
        path.unlink()
    if shards.is_dir() and not any(shards.iterdir()):
        shards.rmdir()


def _journal(report: Path) -> Path:
    return report.with_suffix(".jsonl")


def _upto(count: str) -> range:
    return range(1, int(count) + 1)


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
