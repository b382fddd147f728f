"""How measurements are started, paired and kept."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks import paired
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare, measure_apart
from benchmarks.results import latest

SIDES = {BASELINE: Side("x:y", {"kind": BASELINE}), "ours": Side("x:y", {"kind": "ours"})}


@pytest.fixture
def scripted(monkeypatch):
    """Let measurements take their figures from lists; returns the order in which sides were measured."""

    def script(**figures):
        order, left = [], {name: iter(values) for name, values in figures.items()}

        def measure(side, conditions):
            order.append(side.arguments["kind"])
            return next(left[order[-1]])

        monkeypatch.setattr(paired, "measure_apart", measure)
        return order

    return script


def figures(seconds, peak_mib=100.0, **more):
    return {"seconds": seconds, "peak_mib": peak_mib} | more


def test_ratios_are_medians_of_the_pairs_and_not_ratios_of_medians(scripted):
    # the machine slows down by ten for the second pair
    scripted(
        baseline=[figures(4.0), figures(40.0), figures(6.0, 200.0)],
        ours=[figures(2.0), figures(20.0, 50.0), figures(1.0, 50.0)],
    )
    found = compare(SIDES, Conditions(), pairs=3)
    assert found["ratios"]["ours"] == {"speedup": 2.0, "memory": 0.5}
    assert found["sides"][BASELINE]["seconds"] == 6.0 and found["sides"]["ours"]["seconds"] == 2.0


def test_sides_take_turns_at_going_first(scripted):
    order = scripted(baseline=[figures(1.0)] * 3, ours=[figures(1.0)] * 3)
    compare(SIDES, Conditions(), pairs=3)
    assert order == ["baseline", "ours", "ours", "baseline", "baseline", "ours"]


@pytest.mark.parametrize(("conditions", "count"), [(Conditions(pairs=2), 2), (Conditions(pairs=2, quick=True), 1)])
def test_the_number_of_pairs_can_be_chosen(scripted, conditions, count):
    order = scripted(baseline=[figures(1.0)] * 9, ours=[figures(1.0)] * 9)
    assert compare(SIDES, conditions, pairs=5)["pairs"] == count
    assert len(order) == 2 * count


def test_sides_that_compute_something_else_are_not_compared(scripted):
    scripted(baseline=[figures(1.0, check=[1.0, -2.0])], ours=[figures(1.0, check=[1.0, -2.1])])
    with pytest.raises(ValueError, match="ours and baseline do not compute the same: outputs differ by 5.0e-02"):
        compare(SIDES, Conditions(), pairs=1)
    scripted(baseline=[figures(1.0, check=[1.0])], ours=[figures(1.0, check=[1.05], tolerance=0.1)])
    assert "check" not in compare(SIDES, Conditions(), pairs=1)["sides"]["ours"]
    scripted(baseline=[figures(1.0, check=[1.0])], ours=[figures(1.0, check=[float("nan")])])
    with pytest.raises(ValueError, match="do not compute the same"):
        compare(SIDES, Conditions(), pairs=1)


def test_a_measurement_runs_in_a_process_of_its_own_with_its_threads_and_memory(tmp_path):
    found = measure_apart(Side("paired:matrix_product", {"size": 8, "repeats": 1}), Conditions(threads=1))
    assert found["gflops"] > 0
    assert found["peak_mib"] < paired.peak_mib()  # this process has loaded far more


def test_a_measurement_that_fails_says_why():
    with pytest.raises(ValueError, match="paired:nothing failed with exit status 1: AttributeError.*nothing"):
        measure_apart(Side("paired:nothing", {}), Conditions())


def test_a_benchmark_has_the_common_options_and_keeps_conditions_and_machine(tmp_path, capsys):
    @benchmark
    def counting(conditions, upto: int = 2):
        """Count.

        Args:
            conditions: of the measurement.
            upto: how far.
        """
        for number in range(upto):
            yield {"case": str(number), "sides": {"ours": {"seconds": 1.5}}, "quickly": conditions.quick}

    output = tmp_path / "new folder" / "results.jsonl"
    counting(upto=3, quick="False", threads=1, output=str(output))
    counting(1, quick="TRUE", output=str(output))
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["case"] for line in lines] == ["0", "1", "2", "0"]
    assert [line["quickly"] for line in lines] == [False, False, False, True]
    assert lines[0]["benchmark"] == "counting" and lines[0]["conditions"]["threads"] == 1
    assert lines[0]["machine"]["device"] and lines[0]["machine"]["torch"]
    assert "seconds 1.5" in capsys.readouterr().out
    assert "upto" in counting.__doc__ and "LD_PRELOAD" in counting.__doc__
    assert latest(str(output))["counting"].keys() == {"0", "1", "2"}  # the quick record of case 0 did not replace it
    assert latest(str(output))["counting"]["0"]["conditions"]["quick"] is False
    with pytest.raises(FileNotFoundError, match="--preload takes the path of an allocator"):
        counting(preload=str(tmp_path / "nothing.so"))


def test_results_that_are_not_there():
    with pytest.raises(FileNotFoundError, match="no results in nowhere.jsonl: run make bench first"):
        latest("nowhere.jsonl")


def test_the_page_explains_every_common_option_and_names_every_benchmark():
    page = Path("docs/benchmarks.md").read_text(encoding="utf-8")
    options = set(re.findall(r"^\| `--(\w+)` \|", page, re.MULTILINE))
    assert options == {field.name for field in fields(Conditions)}
    decorated = {path.stem for path in Path("benchmarks").glob("*.py") if "\n@benchmark\n" in path.read_text()}
    named = set(re.findall(r"^\| `python -m benchmarks\.(\w+)", page, re.MULTILINE))
    assert decorated and decorated <= named and all(Path(f"benchmarks/{name}.py").is_file() for name in named)
