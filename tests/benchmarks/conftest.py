"""Measurements in this process instead of fresh ones: quick, and their figures mean nothing."""

from __future__ import annotations

import json

import pytest

from benchmarks import paired


@pytest.fixture
def measured_here(monkeypatch):
    """Measure without starting processes; arguments go through JSON all the same."""
    monkeypatch.setattr(
        paired,
        "measure_apart",
        lambda side, conditions: paired.call(side.function, json.loads(json.dumps(dict(side.arguments)))),
    )


@pytest.fixture
def records(tmp_path):
    """``records(benchmark, **options) -> list``: what a quick run of a benchmark appends to its results file."""

    def run(benchmark, **options):
        path = tmp_path / "results.jsonl"
        benchmark(quick=True, output=str(path), **options)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return run
