"""The table and the figures that are made of results."""

from __future__ import annotations

import json

import pytest

from benchmarks.table import GOALS, table

CONDITIONS = {"quick": False}


def record(benchmark, case, speedup=2.0, memory=0.4, **more):
    sides = {"baseline": {"seconds": 5.0, "peak_mib": 1000.0}, "ours": {"seconds": 2.5, "peak_mib": 400.0}}
    sides["ours"]["share_of_matrix_product"] = 0.5
    ratios = {"ours": {"speedup": speedup, "memory": memory}}
    whole = {"benchmark": benchmark, "case": case, "sides": sides, "ratios": ratios, "conditions": CONDITIONS}
    return whole | {"machine": {"device": "a processor"}} | more


@pytest.fixture
def results(tmp_path):
    def write(*lines):
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write


def row(text, work):
    return next(line for line in text.splitlines() if line.startswith(f"| {work} |"))


def test_the_table_holds_every_goal_and_tells_met_from_missed(results, capsys):
    table(results(record("forward", "64^3 L=3", speedup=1.9), record("forward", "128^3 L=1", memory=0.45)))
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 2 + len(GOALS)
    assert row(text, "forward 64³ L=3").split(" | ")[2:4] == ["1.90×", "no"]
    assert row(text, "peak memory, forward 128³ L=1").split(" | ")[2:4] == ["0.45×", "yes"]
    assert "baseline: 5 s, 1000 MiB; ours: 2.5 s, 400 MiB" in row(text, "forward 64³ L=3")
    assert row(text, "peak memory, L=8 to L=64").split(" | ")[2] == "–"  # not measured


def test_the_latest_record_of_a_case_counts(results, capsys):
    table(results(record("forward", "64^3 L=3", speedup=1.9), record("forward", "64^3 L=3", speedup=2.6)))
    assert row(capsys.readouterr().out, "forward 64³ L=3").split(" | ")[2:4] == ["2.60×", "yes"]


def test_figures_are_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import plots

    curve = [record("context_curve", f"64^3 L={n}", context_size=n) for n in (1, 8)]
    path = results(*curve, record("forward", "64^3 L=3"))
    plots(path, str(tmp_path / "figures"))
    for name in ("context_curve", "against_baseline"):
        content = (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 100_000
    with pytest.raises(ValueError, match="has no results of context_curve"):
        plots(results(record("startup", "until the first step")), str(tmp_path))
