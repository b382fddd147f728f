"""The benchmark of second passes runs, and its fields hold what they should."""

import json

import numpy as np
import pytest
import torch

from benchmarks.refine_gain import embedded, refine_gain, summarised, table, write_fields
from scripts.data.nnunet import find_targets
from scripts.networks import Neuroverse3D


def test_a_scan_in_a_field_keeps_its_structures():
    rng = np.random.default_rng(0)
    image, label = rng.uniform(50, 90, (16, 14, 12)).astype(np.float32), np.zeros((16, 14, 12), np.uint8)
    label[4:9, 5:8, 3:9], label[9:12, 5:8, 3:9] = 1, 2
    field, answer = embedded(image, label, (30, 10, 24), rng)
    assert field.shape == answer.shape == (30, 14, 24) and field.min() == 0
    assert np.array_equal(np.bincount(answer.ravel())[1:], np.bincount(label.ravel())[1:])
    offset = image[label > 0] - field[answer > 0]
    assert np.ptp(offset) < 1e-3, "structures keep their intensities, but for a constant"
    around = field[answer == 0]
    assert abs(around.mean() + offset.mean() - image.mean()) < image.std()
    assert 0.5 < around.std() / image.std() < 2


def test_structures_are_summed_up_by_their_size():
    one = {"kept": None, "global_mm": 2.0, "refined_mm": 1.0, "alone": 0.9}
    rows = [
        one | {"volume_mm3": 500.0, "global": 0.5, "refined": 0.7},
        one | {"volume_mm3": 700.0, "global": 0.6, "refined": 0.5},
        one | {"volume_mm3": 1500.0, "global": 0.8, "refined": 0.8, "kept": "why", "refined_mm": None},
    ]
    small, large = summarised(rows)
    assert (small["structures"], small["gain"], small["worse"], small["kept"]) == (2, 0.05, 1, 0)
    assert small["standard_error"] == pytest.approx(0.15) and large["standard_error"] is None
    assert (large["size"], large["gain"], large["kept"], large["refined_mm"]) == (">= 1 cm3", 0, 1, None)
    assert len(table([{"part": "whole", "field": 2, **record} for record in (small, large)]).splitlines()) == 3


def test_it_runs_and_writes_data_to_train_on(make_dataset, tmp_path, capsys):
    data = make_dataset(tmp_path, cases=4)
    names = [f"case_{i:02d}" for i in range(4)]
    (tmp_path / "splits.json").write_text(json.dumps({"train": {data.name: names[:2]}, "test": {data.name: names[2:]}}))
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), tmp_path / "model.pt")
    files = [str(data), *(str(tmp_path / name) for name in ("model.pt", "splits.json"))]
    refine_gain(*files, targets=1, context_size=2, fields=(2.0,), parts=("whole",))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(record["part"], record["field"], record["structures"]) for record in found] == [("whole", 2.0, 2)]
    assert found[0]["global_mm"] >= 1.9 and 0 <= found[0]["alone"] <= 1
    write_fields(files[0], files[2], str(tmp_path / "fields"), (1.0, 2.0))
    for folder in ("Dataset901_Field1", "Dataset902_Field2"):
        assert [case["case"] for case in find_targets(str(tmp_path / "fields" / folder))] == names[:2]
    with pytest.raises(FileExistsError):
        write_fields(files[0], files[2], str(tmp_path / "fields"))
