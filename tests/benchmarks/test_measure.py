"""How measurements are started, paired and recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from benchmarks import measure
from benchmarks.measure import BASELINE, Row, Run, Side, compare, measure_apart, shown, work

SIDES = {BASELINE: Side("x:y", {"kind": BASELINE}), "ours": Side("x:y", {"kind": "ours"})}


@pytest.fixture
def scripted(monkeypatch):
    """Let measurements take their figures from lists; returns the order in which sides were measured."""

    def script(**figures):
        order, left = [], {name: iter(values) for name, values in figures.items()}

        def measure_one(side, threads):
            order.append(side.arguments["kind"])
            return next(left[order[-1]])

        monkeypatch.setattr(measure, "measure_apart", measure_one)
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
    found = compare(SIDES, Run(), pairs=3)
    assert found["ours"] == {"seconds": 2.0, "peak_mib": 50.0, "speedup": 2.0, "memory": 0.5}
    assert found[BASELINE] == {"seconds": 6.0, "peak_mib": 100.0}


@pytest.mark.parametrize(("quick", "turns"), [(False, "bo ob bo"), (True, "bo")])
def test_sides_take_turns_at_going_first_and_a_quick_run_is_one(scripted, quick, turns):
    order = scripted(baseline=[figures(1.0)] * 3, ours=[figures(1.0)] * 3)
    compare(SIDES, Run(quick=quick), pairs=3)
    assert [name[0] for name in order] == list(turns.replace(" ", ""))


def test_sides_that_compute_something_else_are_not_compared(scripted):
    scripted(baseline=[figures(1.0, check=[1.0, -2.0])], ours=[figures(1.0, check=[1.0, -2.1])])
    with pytest.raises(ValueError, match="ours and baseline do not compute the same: outputs differ by 5.0e-02"):
        compare(SIDES, Run(), pairs=1)
    scripted(baseline=[figures(1.0, check=[1.0])], ours=[figures(1.0, check=[1.05], tolerance=0.1)])
    assert compare(SIDES, Run(), pairs=1)["ours"].keys() == {"seconds", "peak_mib", "speedup", "memory"}
    scripted(baseline=[figures(1.0, check=[1.0])], ours=[figures(1.0, check=[float("nan")])])
    with pytest.raises(ValueError, match="do not compute the same"):
        compare(SIDES, Run(), pairs=1)


def test_a_measurement_runs_in_a_process_of_its_own_with_its_threads_and_memory():
    found = measure_apart(Side("network:matrix_product", {"size": 8, "repeats": 1}), threads=1)
    assert found["gflops"] > 0 and 0 < found["peak_mib"] < 4096


def test_a_measurement_that_fails_says_why():
    with pytest.raises(ValueError, match="measure:nothing failed with exit status 1: AttributeError.*nothing"):
        measure_apart(Side("measure:nothing", {}), 1)


@dataclass(frozen=True)
class Steps:
    """What is counted.

    Attributes:
        first: where to begin.
        down: count down.
    """

    first: int
    down: bool = False

    def smallest(self):
        return replace(self, first=100)


@work
def counting(run: Run, steps: Steps, upto: int = 1, folder: str = ""):
    """Count.

    Args:
        run: how it is run.
        steps: what is counted.
        upto: how far.
        folder: not used.
    """
    for number in range(upto):
        value = steps.first + number * (-1 if steps.down else 1)
        yield Row(str(number), {"dice": (value, value - 0.123456, value + 1)}, "numbers", "ours")


def test_a_benchmark_has_the_options_of_its_parts_and_explains_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "RECORD", tmp_path / "record.jsonl")
    counting(2, first=3, down="TRUE", threads=1)
    assert "Dice 3.000 [2.877, 4.000]" in capsys.readouterr().out and not measure.RECORD.exists()
    counting(first=1, quick="true")
    assert "Dice 100.000" in capsys.readouterr().out
    with pytest.raises(TypeError, match="first"):
        counting()
    for option in ("upto: how far", "first: where to begin", "record: append"):
        assert option in counting.__doc__


def test_the_record_has_where_a_figure_comes_from_and_no_path_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RECORD", tmp_path / "record.jsonl")
    for _ in range(2):
        counting(first=0.123456789, folder=str(tmp_path / "DATA"), threads=1, record="true", note="beside other work")
    first, again = map(json.loads, measure.RECORD.read_text(encoding="utf-8").splitlines())
    assert first["figures"]["dice"][::2] == [0.12346, 1.1235]
    assert first["benchmark"] == "test_measure counting" and first["case"] == "0" and first["side"] == "ours"
    assert first["device"] and first["abilities"] and first["threads"] == 1 and first["note"] == "beside other work"
    assert (
        first["command"] == "python -m benchmarks.test_measure counting --folder DATA --first 0.123456789 --threads 1"
    )
    assert {"date", "commit", "cores", "load", "torch"} <= first.keys() and first["figures"] == again["figures"]
    with pytest.raises(ValueError, match="figures of --quick mean nothing"):
        counting(first=1, record=True, quick=True)


def test_figures_are_written_with_their_interval():
    assert shown({"gain": [0.1, -0.05, 0.2], "speedup": 2.0}) == "gain +0.100 [-0.050, +0.200]  times faster 2.00×"
