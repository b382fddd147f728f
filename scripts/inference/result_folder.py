"""The folder that a run writes into: whose it is, what of it is done already, and what a failed case leaves."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import Case, DatasetError
from scripts.inference.case_report import file_facts
from scripts.inference.probabilities import probability_folder
from scripts.reporting.report_files import REPORT, VOLUMES, ReportFiles
from scripts.reporting.report_page import PAGE
from scripts.runtime.manifest import MANIFEST
from scripts.runtime.output_folder import STATE, OutputFolder, placed_here, signature
from scripts.runtime.shards import Shard

_PROBE_BYTES = 2**20
_LOCKS = "inference-"
_IN_FINGERPRINT = ("align", "amp", "evidence")
"""Options of a report's settings that another value of makes another run."""
_TUNED = "tuned"
_POLL_SECONDS = 1.0
_CORRECTED = "the prediction was changed after it was written: kept as it is"


def recorded_amp(folder: str | os.PathLike) -> bool | None:
    """Whether the predictions in a folder were made under autocast, by its newest report; None without one."""
    files = ReportFiles(folder, Shard(1, 1))
    reports = sorted((report for report in files.earlier()), key=lambda report: report.get("started") or "")
    amp = reports[-1].get("settings", {}).get("amp") if reports else None
    return amp if isinstance(amp, bool) else None


@dataclass(frozen=True)
class Unfinished:
    """What is left of a run.

    Attributes:
        todo: targets still to do.
        done: report entries of those that are done, by name.
        self_test: summary of the self-test that a report has of the same contexts, weights and settings.
    """

    todo: list[Case]
    done: dict[str, Any]
    self_test: dict[str, Any] | None


class ResultFolder:
    """Predictions, pictures and reports of runs.

    A case that is already done is skipped only if its image, the contexts, the weights and the settings are the
    same; results of anything else are never overwritten unasked, and what this program did not write is never
    overwritten at all. Several runs with the same contexts, weights and settings may be at work here at once.

    Args:
        output_dir: the folder.
        shard: the process's share of the targets.
        overlays: the run writes a PNG per case.
        probabilities: the run writes probability maps, without which a case is not done.
        overwrite: replace results of this program.

    Attributes:
        path: the folder.
        overlays: as given.
        overwrite: as given.
        files: the report.
    """

    def __init__(
        self,
        output_dir: str,
        shard: Shard,
        overlays: bool = True,
        probabilities: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(output_dir)
        self.overlays = overlays
        self.files = ReportFiles(self.path, shard)
        self._shard = shard
        self._probabilities = probabilities
        self.overwrite = overwrite
        self._output = OutputFolder(self.path)
        self._at_work = contextlib.ExitStack()
        self._labels: Sequence[int] = ()
        self._before: dict[Path, Any] = {}

    def prediction(self, case: str) -> Path:
        """File of a case's prediction."""
        return self.path / f"{case}.nii.gz"

    def picture(self, case: str) -> Path:
        """File of a case's picture."""
        return self.path / f"{case}.png"

    def open(self, targets: Sequence[Case]) -> None:
        """Make the folder, and see that the results of these targets can be written.

        Raises:
            FileExistsError: a prediction would be written over a scan.
            DatasetError: predictions of two targets would be one file.
            OSError: the folder cannot be written.
        """
        self.check_inputs([target["image"] for target in targets], targets)
        self._probe()
        self._check_names(targets)

    def check_inputs(self, inputs: Sequence[str | os.PathLike | None], targets: Sequence[Case]) -> None:
        """Refuse if a prediction would be written over an input, under whatever name or link that is given.

        Raises:
            FileExistsError: it would.
        """
        known = {_identity(path): path for path in inputs if path is not None}
        known.pop(None, None)
        outputs = [path for t in targets for path in (self.prediction(t["case"]), self.path / f"{t['case']}.png")]
        for path in [*outputs, *self._pages()]:
            if (itself := known.get(_identity(path))) is not None:
                same = os.path.abspath(itself) == os.path.abspath(path)
                raise FileExistsError(
                    f"{path}{'' if same else f' (the same file as {itself})'} is an input of this run, such as a scan, "
                    "and would be written over: give another --output_dir"
                )

    def enter(self, fingerprint: str, settings: Mapping[str, Any]) -> bool:
        """Be at work in the folder, beside runs with the same contexts, weights and settings; whether there are none.

        Args:
            fingerprint: of contexts, weights and settings.
            settings: options by name, to name those that another run has otherwise.

        Raises:
            FileExistsError: a run with others is at work there.
        """
        own = f"{_LOCKS}{fingerprint[:16]}.lock"
        with self._output.locked():
            self._at_work.close()
            for path in self._output.state.glob(f"{_LOCKS}*.lock"):
                if path.name != own and not self._is_free(path.name):
                    raise FileExistsError(
                        f"a run with other contexts, weights or settings{self._differing(fingerprint, settings)} is at "
                        f"work in {self.path}: wait, or give another --output_dir"
                    )
            alone = self._is_free(own)
            self._at_work.enter_context(self._output.at_work(own, shared=True))
        return alone

    @contextlib.contextmanager
    def tuning(self) -> Iterator[Path]:
        """A folder for weights that suit the contexts, while no other run that is at work here has it."""
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._output.at_work(f"{_TUNED}.lock"))
                    break
                except BlockingIOError:
                    time.sleep(_POLL_SECONDS)
            yield self.path / _TUNED

    def leave(self) -> None:
        """No longer be at work in the folder."""
        self._at_work.close()

    def unfinished(
        self, targets: Sequence[Case], fingerprint: str, settings: Mapping[str, Any], labels: Sequence[int]
    ) -> Unfinished:
        """Take what is done from earlier reports, and the rest as what is to do.

        Args:
            targets: this process's.
            fingerprint: of contexts, weights and settings.
            settings: as of :meth:`enter`.
            labels: that are predicted.

        Raises:
            FileExistsError: results of other contexts, weights or settings are in the way, or files of others.
        """
        self._labels = labels
        self._output.remove_leftovers()
        self.files.adopt_earlier_version()
        files = set(os.listdir(self.path))
        names = {target["case"] for target in targets}
        earlier = [] if self.overwrite else list(self.files.earlier())
        same_run = [report for report in earlier if report.get("fingerprint") == fingerprint]
        done = {name: entry for report in same_run for name, entry in report["cases"].items()}
        self_test = next((report["self_test"] for report in reversed(same_run) if "self_test" in report), None)
        in_the_way = {
            name
            for report in earlier
            if report.get("fingerprint") != fingerprint
            for name in report["cases"]
            if f"{name}.nii.gz" in files
        }
        written = {target["case"] for target in targets if f"{target['case']}.nii.gz" in files}
        known = written & done.keys()
        in_the_way |= self._changed([target for target in targets if target["case"] in known], done)
        if not self.overwrite and not same_run:  # else: written by this very run, which was cut short
            in_the_way |= written
        # a user's own work, or of a version without record and not to be told from it
        corrected = {case for case in known if not self._output.wrote(self.prediction(case))}
        for case in filter(lambda case: self._output.has_record_of(self.prediction(case)), corrected):
            warnings = [*done[case].get("warnings", ()), _CORRECTED]
            done[case] |= {"warnings": list(dict.fromkeys(warnings))}
        todo = [
            {name: target[name] for name in ("image", "case", "folder_problems") if name in target}
            for target in targets
            if target["case"] not in corrected
            and (target["case"] not in known or not self._complete(target["case"], files))
        ]
        left = {target["case"] for target in todo}
        self._output.check(*(path for case in left | in_the_way for path in self._planned(case)), *self._pages())
        self._before = {path: signature(path) for case in left for path in self._planned(case)}
        if in_the_way:
            raise FileExistsError(
                f"{self.path} holds predictions made with other images, contexts, weights or settings"
                f"{self._differing(fingerprint, settings)} ({', '.join(sorted(in_the_way)[:5])}"
                f"{' ...' if len(in_the_way) > 5 else ''}): give another --output_dir or --overwrite true"
            )
        kept = {
            name: entry
            for name, entry in sorted(done.items())
            if name not in left and f"{name}.nii.gz" in files and (self._shard.count == 1 or name in names)
        }
        return Unfinished(todo, kept, self_test)

    def remove(self, case: str) -> None:
        """Delete what there is of a failed case: of this run, and what it was to replace; not what others wrote."""
        for path in self._planned(case):
            if placed_here(path) or (self._before.get(path) is not None and signature(path) == self._before[path]):
                path.unlink()
        with contextlib.suppress(OSError):
            probability_folder(self.path, case).rmdir()

    def _planned(self, case: str) -> list[Path]:
        """What a run is to write for a case."""
        maps = probability_folder(self.path, case)
        labels = self._labels if self._probabilities else ()
        picture = [self.picture(case)] if self.overlays else []
        return [self.prediction(case), *picture, *(maps / f"label_{label}.nii.gz" for label in labels)]

    def _differing(self, fingerprint: str, settings: Mapping[str, Any]) -> str:
        """Options that reports of other runs in the folder have otherwise, for a message."""
        others = [r.get("settings", {}) for r in self.files.earlier() if r.get("fingerprint") != fingerprint]
        found = {f"--{name} {other[name]}".lower() for other in others for name in _IN_FINGERPRINT
                 if name in other and other[name] != settings[name]}  # fmt: skip
        return f" ({', '.join(sorted(found))})" if found else ""

    def _pages(self) -> list[Path]:
        return [self.path / name for name in (REPORT, PAGE, VOLUMES, MANIFEST)]

    def _complete(self, case: str, files: set[str]) -> bool:
        """Whether everything that a run is to write for a case is there."""
        return all(path.name in files if path.parent == self.path else path.is_file() for path in self._planned(case))

    def _check_names(self, targets: Sequence[Case]) -> None:
        """Refuse targets whose predictions would be one file where the file system does not tell upper from lower case.

        Raises:
            DatasetError: there are such targets.
        """
        self._output.open()
        if not self._output.state.with_name(STATE.upper()).exists():
            return
        first: dict[str, str] = {}
        for case in (target["case"] for target in targets):
            other = first.setdefault(unicodedata.normalize("NFC", case).casefold(), case)
            if other != case:
                raise DatasetError(f"{other} and {case} are one file name in {self.path}: rename one of the scans")

    def _is_free(self, lock: str) -> bool:
        try:
            with self._output.at_work(lock):
                return True
        except BlockingIOError:
            return False

    def _changed(self, targets: Sequence[Case], done: dict[str, Any]) -> set[str]:
        """Names of the targets whose image is not the one that was done; only files that were touched are read."""
        touched = [t for t in targets if done[t["case"]].get("image_file") != file_facts(t["image"])]
        found = inspect_cases([{"image": t["image"], "case": t["case"], "source": t["case"]} for t in touched])
        return {t["case"] for t in found if t["digest"] != done[t["case"]]["digest"]}

    def _probe(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".probe.") as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
        except OSError as error:
            raise OSError(
                f"cannot write into {self.path} ({error.strerror}): give another --output_dir or free some space"
            ) from error


def _identity(path: str | os.PathLike) -> tuple[int, int] | None:
    """What a file is, whatever its names; None for no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
