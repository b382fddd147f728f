"""The report of an inference run as files: no finished case is forgotten, and thousands are cheap to note down.

A process notes every case in a journal, one line each, and folds the journal into the report from time to time.
Processes of one run may do so at once: each adds its cases to what the others wrote, under the folder's lock.
With the targets split over several processes each has a report of its own in ``shards/``; they are merged into the
``report.json`` of the run when all are there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.reporting.report_page import PAGE, write_page
from scripts.runtime.manifest import MANIFEST
from scripts.runtime.output_folder import OutputFolder, write_csv, write_json
from scripts.runtime.shards import Shard

logger = logging.getLogger(__name__)

REPORT = "report.json"
VOLUMES = "volumes.csv"
SHARDS = "shards"
_REPORT_ENTRIES = {"fingerprint", "task", "labels", "contexts", "spacing_mm", "cases", "failed"}
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
        self._output = OutputFolder(folder)
        self._due = 0.0

    def begin(self, report: Report, todo: Collection[str], alone: bool) -> None:
        """Write the report of a run that begins; its cases to do are not done any more.

        Args:
            report: the report, with the cases that are done.
            todo: names of those that are to do.
            alone: no other process is at work in the folder: what failed before is forgotten.
        """
        with self._output.locked():
            before = self._of_others(report)
            there = {name for name in before["cases"] if (self.folder / f"{name}.nii.gz").is_file()}
            before = {
                "cases": {name: entry for name, entry in before["cases"].items() if name in there - set(todo)},
                "failed": {name: why for name, why in before["failed"].items() if not alone and name not in todo},
            }
            self._write(_joined(before, report))

    def fold(self, report: Report) -> None:
        """Write the whole report, with what others have done; the journal begins anew."""
        with self._output.locked():
            self._write(_joined(self._of_others(report), report))

    def publish(self, report: Report) -> None:
        """Write the report of a whole run, with what others have done, for programs and for people."""
        with self._output.locked():
            publish(_joined(self._of_others(report), report), self.folder)

    def publish_merged(self, partial: bool = False) -> Report:
        """Write the report of all shards; arguments and errors as of :func:`merge_shards`."""
        with self._output.locked():
            merged = merge_shards(self.folder, partial)
            publish(merged, self.folder)
        return merged

    def withdraw(self, case: str, remove: Callable[[], None]) -> bool:
        """Remove what was written of a failed case, unless another process has done the case in the meantime.

        Args:
            case: its name.
            remove: deletes the files.

        Returns:
            Whether it was removed.
        """
        with self._output.locked():
            if case in read_report(self.path).get("cases", ()):
                return False
            remove()
            return True

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
        with self._output.locked():
            self._append(report, case)

    def _append(self, report: Report, case: str) -> None:
        self._claim_journal()
        kind = "cases" if case in report["cases"] else "failed"
        line = {"fingerprint": report["fingerprint"], "kind": kind, "case": case, "entry": report[kind][case]}
        with _journal(self.path).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line, allow_nan=False) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _claim_journal(self) -> None:
        journal = _journal(self.path)
        self._output.claim(os.path.relpath(journal, self.folder), journal)

    def _of_others(self, report: Report) -> Report:
        """What is written of the same run: by this process, by others at work, and by earlier ones."""
        found = read_report(self.path)
        same = found.get("fingerprint") == report["fingerprint"]
        return {kind: found[kind] if same else {} for kind in ("cases", "failed")}

    def _write(self, report: Report) -> None:
        started = time.monotonic()
        self._claim_journal()
        write_json(report, self.path)
        _journal(self.path).unlink(missing_ok=True)
        now = time.monotonic()
        self._due = now + max(FOLD_SECONDS, (now - started) / FOLD_SHARE)

    def paths(self) -> list[Path]:
        """Where reports may be in the folder, whoever wrote them."""
        return [self.folder / REPORT, *sorted((self.folder / SHARDS).glob("report-*.json"))]

    def adopt_earlier_version(self) -> None:
        """Put on record what a version without record wrote: the reports, and the predictions that they prove theirs.

        A prediction counts if a report names its case as done and has the volumes of the very labels that it holds;
        with it count its picture and its maps. A generated image has no such proof, and stays what it is.
        """
        for path in self.paths():
            report = read_report(path)
            if not report or not _REPORT_ENTRIES <= report.keys() or self._output.wrote(path):
                continue
            for case, entry in report["cases"].items():
                file = self.folder / f"{case}.nii.gz"
                if file.parent == self.folder and not self._output.has_record_of(file) and _proves(entry, file):
                    maps = (self.folder / "probabilities" / case).glob("label_*.nii.gz")
                    self._output.adopt(file, self.folder / f"{case}.png", *maps)
            pages = [self.folder / name for name in (PAGE, VOLUMES, MANIFEST)]
            self._output.adopt(_journal(path), *(page for page in pages if not self._output.has_record_of(page)), path)

    def earlier(self) -> Iterator[Report]:
        """Every report that earlier runs left in the folder, whoever wrote it."""
        for path in self.paths():
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
    OutputFolder(folder).open().claim(_journal(Path(REPORT)).name, _journal(folder / REPORT))
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

    Cases that an earlier ``report.json`` of the same contexts, weights and settings has are kept if their predictions
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
    shards, output = Path(folder) / SHARDS, OutputFolder(folder)
    output.remove(*(path for path in shards.glob("report-*.json*") if output.wrote(path)))
    if shards.is_dir() and not any(shards.iterdir()):
        shards.rmdir()


def _proves(entry: Mapping[str, Any], prediction: Path) -> bool:
    """Whether a mask is the one that a report's entry was made of."""
    try:
        image = nib.load(prediction)
        values, counts = np.unique(np.asanyarray(image.dataobj), return_counts=True)
        voxel_mm3 = float(np.prod(nib.affines.voxel_sizes(image.affine)))
        found = {str(int(value)): count * voxel_mm3 for value, count in zip(values, counts, strict=True) if value}
        noted = {label: volume for label, volume in entry["volumes_mm3"].items() if volume}
        whole = np.issubdtype(image.get_data_dtype(), np.integer) and bool(entry["volumes_mm3"])
        return whole and found.keys() == noted.keys() and all(abs(found[k] - noted[k]) < 0.01 for k in found)
    except Exception:  # nibabel raises many kinds for what is no image
        return False


def _joined(before: Report, report: Report) -> Report:
    """A report with the cases of others; one that this process failed at may be done by another."""
    cases = before["cases"] | report["cases"]
    failed = before["failed"] | report["failed"]
    return report | {
        "cases": dict(sorted(cases.items())),
        "failed": {name: why for name, why in failed.items() if name not in cases},
    }


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
