"""The page is made of the record, and both of what there is."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import page as pages
from benchmarks.__main__ import SUBJECTS, listing
from benchmarks.measure import FIGURES, RECORD, Run
from benchmarks.page import PAGE, TARGETS, latest, page, rendered, works

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
TARGET = {"benchmark": "network forward", "case": "64³", "side": "ours", "figure": "speedup", "at_least": 2.2}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """``record(*changes) -> list``: the latest lines of a record, and a target beside them."""
    monkeypatch.setattr(pages, "TARGETS", tmp_path / "targets.json")
    pages.TARGETS.write_text(json.dumps([TARGET]))

    def write(*changes):
        path = tmp_path / "record.jsonl"
        path.write_text("".join(json.dumps(LINE | change) + "\n" for change in changes))
        return latest(path)

    return write


def test_the_page_is_current():
    assert rendered(TEXT, latest()) == TEXT, "python -m benchmarks.page makes it anew"


def test_every_benchmark_has_its_place_and_every_line_a_benchmark():
    known = dict(works())
    shown = re.findall(r"<!-- record: ([\w ]+) -->", TEXT)
    assert sorted(shown) == sorted([*known, "list", "targets"])
    for line in map(json.loads, RECORD.read_text(encoding="utf-8").splitlines()):
        assert line["benchmark"] in known and line["figures"] and line["figures"].keys() <= FIGURES.keys()
        assert line["data"] and line["device"] and line["threads"] and line["commit"] and line["date"]
        assert line["command"].startswith((f"python -m benchmarks.{line['benchmark']}", "by hand"))
        assert "/work" not in json.dumps(line) and "/tmp" not in json.dumps(line) and "dirty" not in line["commit"]


def test_every_benchmark_is_listed():
    said = listing()
    for subject in SUBJECTS:
        module = import_module(f"benchmarks.{subject}")
        made = re.findall(r"@work\ndef (\w+)", inspect.getsource(module))
        assert made == list(module.WORKS) and all(f"\n  {name} " in said for name in made)


def test_pages_name_benchmarks_that_exist():
    known = dict(works())
    for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        for subject, name in re.findall(r"\bbenchmarks\.(?!md|page|SUBJECT)(\w+)(?: (\w+))?", text):
            assert f"{subject} {name}" in known, f"{path}: benchmarks.{subject} {name}"


def test_the_page_explains_every_common_option():
    assert set(re.findall(r"^\| `--(\w+)` \|", TEXT, re.MULTILINE)) == {field.name for field in fields(Run)}


def test_targets_are_of_benchmarks_and_figures_that_exist():
    for target in json.loads(TARGETS.read_text(encoding="utf-8")):
        assert target["benchmark"] in dict(works()) and target["figure"] in FIGURES
        assert ("at_least" in target) != ("at_most" in target)


def test_the_last_measurement_of_a_machine_counts(record):
    found = record({}, {"device": "another"}, {"figures": {"speedup": 2.6}, "commit": "def"})
    assert [(line["device"], line["figures"]["speedup"]) for line in found] == [("a processor", 2.6), ("another", 1.9)]
    text = rendered("<!-- record: targets -->\nold\n<!-- end -->", found)
    assert "old" not in text and "| ≥ 2.20× | 2.60× | yes | a processor, 2026-11-01 |" in text
    assert "| 1.90× | no | another, 2026-11-01 |" in text
    assert "| ≥ 2.20× | – | – | – |" in rendered("<!-- record: targets -->\n<!-- end -->", record({"case": "other"}))


def test_a_table_has_what_was_measured_together_and_says_where(record):
    lines = record(
        {"side": "baseline", "figures": {"seconds": 5.0}, "note": "busy"},
        {"figures": {"dice": [0.5, 0.4, 0.6]}, "note": "busy"},
        {"case": "128³", "commit": "def"},
    )
    text = rendered("before\n<!-- record: network forward -->\n<!-- end -->\nafter", lines)
    assert text.startswith("before\n") and text.endswith("\nafter")
    assert "`python -m benchmarks.network forward`, a processor (AVX2), 2 threads, abc, 2026-11-01. Busy." in text
    assert "| | | Dice | seconds |" in text and "| 64³ | baseline |  | 5 |" in text
    assert "|  | ours | 0.500 [0.400, 0.600] |  |" in text and "| 128³ | ours | 1.90× |" in text
    assert rendered(text, lines) == text
    assert "Not measured yet." in rendered("<!-- record: network volume -->\n<!-- end -->", lines)
    with pytest.raises(KeyError, match="network nothing"):
        rendered("<!-- record: network nothing -->\n<!-- end -->", lines)


def test_the_picture_is_drawn_of_what_was_measured(record, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made = tmp_path / "page.md"
    made.write_text("<!-- record: network contexts -->\n<!-- end -->")
    curve = [
        {"benchmark": "network contexts", "case": f"L={n}, 64³", "side": side, "figures": {"seconds": n, "peak_mib": 9}}
        for n in (1, 8)
        for side in ("baseline", "ours")
    ]
    lines = record(*curve)
    monkeypatch.setattr(pages, "latest", lambda: lines)
    monkeypatch.setattr(pages, "PICTURE", tmp_path / "curve.png")
    page(str(made))
    assert (
        Path(pages.PICTURE).read_bytes().startswith(b"\x89PNG")
        and "| L=8, 64³ | baseline | 8 | 9 |" in made.read_text()
    )
