"""The page is made of the record, and both of what there is."""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.__main__ import SUBJECTS, listing, works
from benchmarks.measure import FIGURES, RECORD
from benchmarks.page import PAGE, latest, rendered

TEXT = PAGE.read_text(encoding="utf-8")
LINE = {
    "benchmark": "network forward",
    "case": "64³",
    "side": "ours",
    "data": "random volumes",
    "device": "a processor",
}
LINE |= {"abilities": ["AVX2"], "threads": 2, "commit": "abc", "date": "2026-11-01T00:00:00", "note": ""}
LINE |= {"command": "python -m benchmarks.network forward", "figures": {"speedup": 1.9}}


def latest_of(tmp_path, *changes):
    """The latest lines of a record."""
    path = tmp_path / "record.jsonl"
    path.write_text("".join(json.dumps(LINE | change) + "\n" for change in changes))
    return latest(path)


def test_the_page_is_current():
    assert rendered(TEXT, latest()) == TEXT, "python -m benchmarks.page makes it anew"


def test_every_benchmark_has_its_place():
    assert sorted(re.findall(r"<!-- record: ([\w ]+) -->", TEXT)) == sorted(dict(works()))


def test_every_line_says_where_it_comes_from():
    for line in map(json.loads, RECORD.read_text(encoding="utf-8").splitlines()):
        assert line["figures"] and line["figures"].keys() <= FIGURES.keys()
        assert line["data"] and line["device"] and line["threads"] and line["commit"] and line["date"]
        assert line["command"].startswith((f"python -m benchmarks.{line['benchmark']}", "by hand"))
        assert "/work" not in json.dumps(line) and "/tmp" not in json.dumps(line) and "dirty" not in line["commit"]
    assert {line["benchmark"] for line in latest()} <= dict(works()).keys()


def test_every_benchmark_is_listed():
    for subject in SUBJECTS:
        module = import_module(f"benchmarks.{subject}")
        assert re.findall(r"@work\ndef (\w+)", inspect.getsource(module)) == list(module.WORKS)
    assert all(f"\n{name} " in listing() for name, _ in works())


def test_pages_name_benchmarks_that_exist():
    known = dict(works())
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for subject, name in re.findall(r"\bbenchmarks\.(?!md|page|SUBJECT)(\w+)(?: (\w+))?", text):
            assert f"{subject} {name}" in known, f"{path}: benchmarks.{subject} {name}"


def test_the_last_measurement_counts_and_what_no_command_makes_is_not_shown(tmp_path):
    newer = {"device": "another", "figures": {"speedup": 2.6}}
    found = latest_of(tmp_path, {}, {"case": "128³"}, newer, {"command": "by hand", "case": "0³"})
    assert [(line["case"], line["figures"]["speedup"]) for line in found] == [("128³", 1.9), ("64³", 2.6)]


def test_a_table_has_what_was_measured_together_and_says_where(tmp_path):
    lines = latest_of(
        tmp_path,
        {"side": "baseline", "figures": {"seconds": 5.0}, "note": "busy"},
        {"figures": {"dice": [0.5, 0.4, 0.6]}, "note": "busy"},
        {"case": "128³", "commit": "def", "command": LINE["command"] + " --pairs 1"},
    )
    text = rendered("before\n<!-- record: network forward -->\nold\n<!-- end -->\nafter", lines)
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert "Random volumes; `network forward`; a processor, 2 threads; abc; 2026-11-01. Busy." in text
    assert "Random volumes; `network forward --pairs 1`; a processor, 2 threads; def" in text
    assert "| | | Dice | seconds |" in text and "| 64³ | baseline |  | 5 |" in text
    assert "|  | ours | 0.500 [0.400, 0.600] |  |" in text and "| 128³ | ours | 1.90× |" in text
    assert rendered(text, lines) == text
    assert "Not measured yet." in rendered("<!-- record: network step -->\n<!-- end -->", lines)
    with pytest.raises(KeyError, match="network nothing"):
        rendered("<!-- record: network nothing -->\n<!-- end -->", lines)
