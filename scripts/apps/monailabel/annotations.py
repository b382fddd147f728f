"""The finished annotations of a MONAI Label datastore, as inspected cases."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from scripts.data.integrity import inspect_cases
from scripts.data.nnunet import Case
from scripts.data.volumes import strip_ending

FINAL = DefaultLabelTag.FINAL.value

RECORD = ".integrity.json"
"""File that remembers what was found in images and annotations; ``inference.json`` calls it so, too."""


@dataclass(frozen=True)
class Annotated:
    """What the datastore held when it was looked at.

    Attributes:
        cases: the usable annotations in the order of their names: ``case`` (the image's id in the datastore),
            ``image`` and ``label`` (paths), and what :func:`inspect_cases` adds.
        left_out: a line for each annotation that cannot be used, with the reason.
        names: label number -> name, of all numbers in the cases.
    """

    cases: tuple[Case, ...]
    left_out: tuple[str, ...]
    names: dict[int, str]


class Annotations:
    """Reads the finished annotations when they have changed, and only the files that have.

    A file is recognised by path, size and modification time.

    Args:
        datastore: where they are.
        record: file to remember what was found in them.
    """

    def __init__(self, datastore: Datastore, record: Path) -> None:
        self.datastore = datastore
        self.record = record
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] | None = None
        self._found = Annotated((), (), {})

    def read(self) -> Annotated:
        """All that are finished now."""
        with self._lock:
            pairs = self._pairs()
            files = tuple((case, name_of_file(image), name_of_file(label)) for case, image, label in pairs)
            state = files, self._passed_over()
            if state != self._state:
                self._found = self._inspect(pairs)
                self._state = state
            return self._found

    def besides(self, image: str | Path) -> Annotated:
        """The same without the annotation of one image, given by its path."""
        found, itself = self.read(), os.path.realpath(image)
        cases = tuple(case for case in found.cases if os.path.realpath(case["image"]) != itself)
        return found if len(cases) == len(found.cases) else Annotated(cases, found.left_out, found.names)

    def names_of(self, case: str) -> dict[int, str]:
        """Label number -> name, as the viewer gave them when the annotation of an image was saved."""
        return given_names(self.datastore.get_label_info(case, FINAL))

    def _pairs(self) -> list[tuple[str, str, str]]:
        """Id, image and label of each; a remote datastore fetches them first."""
        listed = ((entry["image"], entry["label"]) for entry in self.datastore.datalist())
        found = ((strip_ending(image) or Path(image).stem, image, label) for image, label in listed)
        return sorted(pair for pair in found if all(map(os.path.isfile, pair[1:])))

    def _passed_over(self) -> tuple[str, ...]:
        return getattr(self.datastore, "passed_over", ())  # MONAI Label's own stores have none

    def _inspect(self, pairs: Sequence[tuple[str, str, str]]) -> Annotated:
        cases = [{"case": case, "image": image, "label": label, "source": "studies"} for case, image, label in pairs]
        inspected = inspect_cases(cases, self.record)
        sound = tuple(case for case in inspected if not case["problems"])
        left_out = tuple(
            f"the annotation of {case['case']} is left out: {'; '.join(case['problems'])}"
            for case in inspected
            if case["problems"]
        )
        left_out += self._passed_over()
        names: dict[int, str] = {}
        for case in sound:
            given = self.names_of(case["case"])
            for value in case["values"]:
                if value in given:
                    names.setdefault(value, given[value])
        for value in sorted({value for case in sound for value in case["values"]}):
            name = names.get(value, f"label {value}")
            taken = {other for number, other in names.items() if number != value}
            names[value] = f"{name} ({value})" if name in taken else name
        return Annotated(sound, left_out, dict(sorted(names.items())))


def given_names(info: dict[str, Any]) -> dict[int, str]:
    """Label number -> name in what a viewer says of a label: ``label_info``, a list of names with ``idx`` or ``id``."""
    entries = info.get("label_info")
    entries = entries if isinstance(entries, list) else ()
    numbered = ((entry.get("idx", entry.get("id")), entry.get("name")) for entry in entries if isinstance(entry, dict))
    return {number: str(name) for number, name in numbered if type(number) is int and name}


def name_of_file(path: str | Path) -> tuple[str, int, int]:
    """What a file is recognised by without being read: real path, size and time of modification in ns."""
    status = os.stat(path)
    return os.path.realpath(path), status.st_size, status.st_mtime_ns
