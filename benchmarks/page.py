"""Makes the tables of the benchmarks' page from the record: ``python -m benchmarks.page``.

A table stands in ``docs/benchmarks.md`` between ``<!-- record: NAME -->`` and ``<!-- end -->``; NAME is a benchmark as
``python -m benchmarks`` lists it (``network forward``). Of several measurements of the same thing the last counts,
wherever it was made; what no command makes anew stays in the record alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import works
from benchmarks.measure import FIGURES, RECORD, written
from scripts.runtime.atomic_files import write_text
from scripts.runtime.commandline import main

PAGE = Path("docs/benchmarks.md")
_BLOCK = re.compile(r"(<!-- record: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SAME = ("benchmark", "case", "side", "data")
_TOGETHER = ("data", "device", "threads", "commit", "command", "note")

Record = Mapping[str, Any]


def page(output_file: str = str(PAGE)) -> None:
    """Write the tables of the page anew.

    Args:
        output_file: the page.
    """
    path = Path(output_file)
    write_text(rendered(path.read_text(encoding="utf-8"), latest()), path)


def latest(path: Path = RECORD) -> list[Record]:
    """Lines of the record that a command makes, the last of those that measure the same, in the order of these."""
    found: dict[tuple, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["command"].startswith("python"):
            key = tuple(record[name] for name in _SAME)
            found.pop(key, None)
            found[key] = record
    return list(found.values())


def rendered(text: str, records: Sequence[Record]) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: a table of a benchmark that does not exist.
    """
    known = dict(works())

    def block(found: re.Match) -> str:
        known[found[2]]
        lines = _results([record for record in records if record["benchmark"] == found[2]])
        return found[1] + "\n".join(["", *lines, ""]) + "\n" + found[3]

    return _BLOCK.sub(block, text)


def _results(records: Sequence[Record]) -> Iterator[str]:
    """A table for each measurement, with where it comes from."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps([record[key] for key in _TOGETHER]), []).append(record)
    if not groups:
        yield "Not measured yet."
    for number, group in enumerate(groups.values()):
        yield from ([""] if number else []) + [_origin(group[0]), ""]
        names = [name for name in FIGURES if any(name in record["figures"] for record in group)]
        sides = any(record["side"] for record in group)
        yield f"| | {'| ' * sides}{' | '.join(FIGURES[name][0] for name in names)} |"
        yield "|" + "---|" * (1 + sides + len(names))
        before = None
        for record in group:
            cells = ["" if record["case"] == before else record["case"], *[record["side"]] * sides]
            cells += [written(name, record["figures"][name]) if name in record["figures"] else "" for name in names]
            before = record["case"]
            yield f"| {' | '.join(cells)} |"


def _origin(record: Record) -> str:
    """Data, command without what all begin with, machine, commit and day."""
    typed = record["command"].removeprefix("python -m benchmarks.")
    machine = f"{record['device']}, {record['threads']} thread{'s' * (record['threads'] > 1)}"
    said = "; ".join((record["data"], f"`{typed}`", machine, record["commit"], record["date"][:10]))
    note = f" {record['note'][0].upper()}{record['note'][1:]}." if record["note"] else ""
    return f"{said[0].upper()}{said[1:]}.{note}"


if __name__ == "__main__":
    main(page)
