"""The benchmark of docs/monailabel.md, on few small scans."""

import json

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed: .ci/label-test runs these")

from benchmarks.monailabel import monailabel  # noqa: E402
from tests.apps.monailabel.server import SHIM  # noqa: E402


def test_a_row_for_each_number_of_annotations(tmp_path, make_dataset, weights, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(SHIM))
    dataset = make_dataset(tmp_path, cases=5)
    split = tmp_path / "splits.json"
    names = [f"case_{number:02d}" for number in range(5)]
    split.write_text(json.dumps({"train": {dataset.name: names[:3]}, "val": {dataset.name: names[3:]}}))
    rows_file = tmp_path / "rows.json"
    monailabel(str(weights), str(dataset), str(split), context_sizes=(2, 1), output_file=str(rows_file))
    rows = json.loads(rows_file.read_text())["rows"]
    assert [row["annotations"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["dice"] <= 1 and len(row["dice_of_labels"]) == 2
        assert row["cold_seconds"] > 0 and row["warm_seconds"] > 0 and row["cold_to_warm"] > 0
    assert capsys.readouterr().out.count("cold_seconds") == 2
    with pytest.raises(RuntimeError, match="no weights at .*none.pt"):
        monailabel(str(tmp_path / "none.pt"), str(dataset), str(split))
