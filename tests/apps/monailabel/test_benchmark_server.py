"""The benchmark of docs/monailabel.md, on few small scans."""

import json

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

from benchmarks.apps import label  # noqa: E402
from benchmarks.measure import Run  # noqa: E402
from tests.apps.monailabel.server import SHIM  # noqa: E402


def test_a_row_for_each_number_of_annotations(tmp_path, make_dataset, weights, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SHIM))
    dataset = make_dataset(tmp_path, cases=5)
    split = tmp_path / "splits.json"
    names = [f"case_{number:02d}" for number in range(5)]
    split.write_text(json.dumps({"train": {dataset.name: names[:3]}, "val": {dataset.name: names[3:]}}))
    given = {"dataset_dir": str(dataset), "split_file": str(split)}
    up, *rows = label.__wrapped__(Run(), checkpoint=str(weights), context_sizes=(2, 1), **given)
    assert up.figures["seconds"] > 0 and [row.case for row in rows] == ["1 annotations", "2 annotations"]
    for row in rows:
        assert 0 <= row.figures["dice"][0] <= 1
        assert row.figures["cold_seconds"] > 0 and row.figures["warm_seconds"] > 0
    with pytest.raises(RuntimeError, match="no weights at .*none.pt"):
        list(label.__wrapped__(Run(), checkpoint=str(tmp_path / "none.pt"), **given))
