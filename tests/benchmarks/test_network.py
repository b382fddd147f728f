"""Every benchmark of speed and memory runs at tiny sizes and says what it should; no figure is held against a clock."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import baseline_network, loading, network
from benchmarks.measure import FIGURES
from benchmarks.network import FULL, Case, PeakMemory, forward_flops

COMPARISONS = [network.forward, network.step, network.labels, loading.groups]


@pytest.mark.parametrize("benchmark", COMPARISONS, ids=lambda one: one.__name__)
def test_a_comparison_gives_time_memory_and_ratios(benchmark, rows):
    sides = {}
    for row in rows(benchmark):
        assert row.case and row.data and row.figures.keys() <= FIGURES.keys()
        sides.setdefault(row.case, {})[row.side] = row.figures
    for found in sides.values():
        assert {"baseline", "ours"} <= found.keys() and "speedup" not in found["baseline"]
        for side, figures in found.items():
            wanted = {"seconds", "peak_mib"} | ({"speedup", "memory"} if side.startswith("ours") else set())
            assert all(figures[name] > 0 for name in wanted)
    if benchmark is network.forward:
        assert found["ours"]["share_of_matrix_product"] > 0


def test_sides_that_differ_are_found_out(rows, monkeypatch):
    monkeypatch.setattr(baseline_network.Fusion, "forward", lambda self, context, target, added_to: added_to)
    with pytest.raises(ValueError, match="ours and baseline do not compute the same"):
        rows(network.forward)


def test_growth_of_memory_is_stated_with_the_contexts_on_disk(rows):
    least, most = rows(network.memory)
    assert (least.side, most.side) == ("L=2", "L=4")
    assert most.figures["growth"] == pytest.approx(most.figures["peak_mib"] / least.figures["peak_mib"] - 1)


def test_peak_memory_sees_what_was_freed_again():
    found = []
    for mib in (0, 64):
        with PeakMemory("cpu") as memory:
            for _ in range(20):
                block = torch.ones(mib * 2**18 + 1)
                del block
                time.sleep(0.005)
        found.append(memory.peak_mib)
    assert found[1] - found[0] > 48


def test_waiting_for_the_loader_is_a_share(rows):
    waiting = {row.side: row.figures["waiting_share"] for row in rows(loading.wait)}
    assert waiting["loader alone"] > 0.9 and waiting["training alone"] < 0.1 and 0 < waiting["together"] < 1


def test_the_full_network_is_as_much_work_as_the_description_says():
    giga = [forward_flops(Case(FULL, (128,) * 3, pairs)) / 2e9 for pairs in (1, 2)]
    assert giga[1] - giga[0] == pytest.approx(527, rel=0.01)  # multiply-adds of a pair
    assert giga[0] == pytest.approx(643 + 527, rel=0.01)
