"""Makes the tables of the benchmarks' page from the record: ``python -m benchmarks.page``.

A table stands in ``docs/benchmarks.md`` between ``<!-- record: NAME -->`` and ``<!-- end -->``; NAME is a benchmark as
``python -m benchmarks`` lists it (``network forward``), or ``list``, all of them, or ``targets``, the figures that
``benchmarks/targets.json`` asks for beside those measured. Of several measurements of the same thing on the same
kind of machine the last counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.__main__ import SUBJECTS, first_line
from benchmarks.measure import BASELINE, FIGURES, RECORD, written
from scripts.runtime.atomic_files import write_atomically, write_text
from scripts.runtime.commandline import main

PAGE = Path("docs/benchmarks.md")
PICTURE = Path("docs/figures/context_curve.png")
TARGETS = Path(__file__).with_name("targets.json")
CURVE = "network contexts"
_BLOCK = re.compile(r"(<!-- record: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SAME = ("benchmark", "case", "side", "data", "device", "threads")
_TOGETHER = ("data", "device", "abilities", "threads", "commit", "day", "command", "note")

Record = Mapping[str, Any]


def page(output_file: str = str(PAGE)) -> None:
    """Write the tables of the page anew, and its picture where there are figures for it.

    Args:
        output_file: the page.
    """
    records = latest()
    path = Path(output_file)
    write_text(rendered(path.read_text(encoding="utf-8"), records), path)
    curve = [record for record in records if record["benchmark"] == CURVE and "seconds" in record["figures"]]
    if curve:
        _draw(curve, PICTURE)


def latest(path: Path = RECORD) -> list[Record]:
    """Lines of the record, the last of those that measure the same; in the order in which they came up first."""
    found: dict[tuple, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[tuple(record[key] for key in _SAME)] = record | {"day": record["date"][:10]}
    return list(found.values())


def rendered(text: str, records: Sequence[Record]) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: a table of a benchmark that does not exist.
    """
    known = dict(works())

    def block(found: re.Match) -> str:
        name = found[2]
        if name == "list":
            lines = _commands(known)
        elif name == "targets":
            lines = _targets(records)
        else:
            known[name]
            lines = _results([record for record in records if record["benchmark"] == name])
        return found[1] + "\n".join(["", *lines, ""]) + "\n" + found[3]

    return _BLOCK.sub(block, text)


def works() -> Iterator[tuple[str, Any]]:
    """Name and function of every benchmark."""
    for subject in SUBJECTS:
        for name, function in import_module(f"benchmarks.{subject}").WORKS.items():
            yield f"{subject} {name}", function


def _commands(known: Mapping[str, Any]) -> Iterator[str]:
    yield from ("| command | what it measures |", "|---|---|")
    for name, function in known.items():
        yield f"| `python -m benchmarks.{name}` | {first_line(function).rstrip('.').replace('``', '`')} |"


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
    note = f" {record['note'][0].upper()}{record['note'][1:]}." if record["note"] else ""
    return f"{record['data'][0].upper()}{record['data'][1:]}: {_command(record)}, {_machine(record)}.{note}"


def _command(record: Record) -> str:
    typed = record["command"]
    return f"`{typed}`" if typed.startswith("python") else typed


def _machine(record: Record) -> str:
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    return f"{record['device']} ({', '.join(record['abilities'])}), {threads}, {record['commit']}, {record['day']}"


def _targets(records: Sequence[Record]) -> Iterator[str]:
    """Every target beside what was measured, a line for each machine."""
    yield from ("| benchmark | case | figure | target | measured | met | on |", "|---|---|---|---|---|---|---|")
    for target in json.loads(TARGETS.read_text(encoding="utf-8")):
        name, least = target["figure"], target.get("at_least")
        bound = f"≥ {written(name, least)}" if least is not None else f"≤ {written(name, target['at_most'])}"
        case = ", ".join(filter(None, (target["case"], target["side"])))
        start = f"| {target['benchmark']} | {case} | {FIGURES[name][0]} | {bound} |"
        found = [
            record
            for record in records
            if all(record[key] == target[key] for key in ("benchmark", "case", "side")) and name in record["figures"]
        ]
        for record in found:
            value = record["figures"][name]
            mean = value[0] if isinstance(value, Sequence) else value
            met = mean >= least if least is not None else mean <= target["at_most"]
            yield f"{start} {written(name, value)} | {'yes' if met else 'no'} | {record['device']}, {record['day']} |"
        if not found:
            yield f"{start} – | – | – |"


def _draw(records: Sequence[Record], path: Path) -> None:
    """Seconds and peak memory against the number of contexts, of the machine that was measured last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine, case = records[-1]["device"], records[-1]["case"].split(", ", 1)[1]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, label in ((axes[0], "seconds", "seconds"), (axes[1], "peak_mib", "peak MiB")):
        for side, colour in ((BASELINE, "tab:gray"), ("ours", "tab:blue")):
            chosen = [one for one in records if (one["side"], one["device"]) == (side, machine)]
            sizes = [int(one["case"].partition(",")[0].removeprefix("L=")) for one in chosen]
            axis.plot(sizes, [one["figures"][name] for one in chosen], marker="o", color=colour, label=side)
        axis.set(xscale="log", xlabel="contexts L", ylabel=label, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(f"forward pass, {case}, {machine}")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=80, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    main(page)
