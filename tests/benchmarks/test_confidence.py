"""The benchmark of expected against real Dice runs and counts right."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from benchmarks.confidence import DEGRADATIONS, correlations, expected, wrong_context
from scripts.networks import Neuroverse3D


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_degradations_change_the_image_and_keep_the_label_on_it(degradation, strength):
    image = np.random.default_rng(0).random((16, 17, 18)).astype(np.float32)
    label = np.zeros(image.shape, np.uint8)
    label[6:10, 6:10, 6:10] = 2
    image[label > 0] += 1
    spoilt, moved = degradation(image, label, strength, np.random.default_rng(1))
    assert spoilt.shape == moved.shape and np.isfinite(spoilt).all()
    assert spoilt.shape != image.shape or not np.allclose(spoilt, image)
    assert set(np.unique(moved)) <= {0, 2} and moved.any()
    beside = binary_dilation(moved > 0, iterations=2) & (moved == 0)
    inside, outside = spoilt[moved > 0].mean(), spoilt[beside].mean()
    assert inside < outside if degradation.__name__ == "inverted" else inside > outside


def row(case, degradation, expected, real, flags=""):
    return {
        "case": case,
        "degradation": degradation,
        "label": 1,
        "expected_dice": expected,
        "real_dice": real,
        "flags": flags,
    }


def test_correlations():
    rows = [row(f"case {i}", "none", x, 2 * x - 0.5) for i, x in enumerate((0.5, 0.6, 0.7))]
    rows += [row(f"case {i}", "noise", x, -x, "flagged") for i, x in enumerate((0.5, 0.6, 0.7))]
    found = correlations(rows)
    plain, degraded = found["as acquired"], found["degraded"]
    assert plain["correlation"] == pytest.approx(1) == plain["rank_correlation"]
    assert plain["mean_absolute_error"] == pytest.approx(0.1) and degraded["correlation"] == pytest.approx(-1)
    assert [found[group]["cases"] for group in ("all", "as acquired", "degraded")] == [6, 3, 3]
    assert [found[group]["flagged"] for group in ("all", "as acquired", "degraded")] == [3, 0, 3]
    assert correlations([row("a", "none", 0.5, 0.1), row("b", "none", 0.5, 0.2)]) == {}, "nothing to correlate"


def test_all_cases_are_scored_as_they_are_and_degraded(make_dataset, tmp_path, rows):
    pytest.importorskip("matplotlib")
    data = make_dataset(tmp_path, cases=5)
    names = [f"case_{i:02d}" for i in range(5)]
    split = {"train": {data.name: names[:3]}, "val": {data.name: names[3:4]}, "test": {data.name: names[4:]}}
    (tmp_path / "splits.json").write_text(json.dumps(split))
    torch.manual_seed(0)
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), tmp_path / "model.pt")
    given = {"dataset_dir": str(data), "split_file": str(tmp_path / "splits.json")}
    given |= {"checkpoint": str(tmp_path / "model.pt"), "context_size": 3}
    table = tmp_path / "out" / "expected_quality.csv"
    out = {"output_dir": str(tmp_path / "out"), "align": "off"}

    rows(expected, **given, **out)
    found = list(csv.DictReader(table.open()))
    assert [(r["case"], r["label"], r["degradation"]) for r in found[:4]] == [
        (n, v, "none") for n in names[3:] for v in "12"
    ]
    assert [r["degradation"] for r in found[4:]] == ["noise"] * 2 + ["low_resolution"] * 2
    assert table.with_suffix(".png").stat().st_size > 1000

    right, wrong = rows(wrong_context, **given)
    assert 0 <= right.figures["out_of_line"] <= 3 and 0 <= wrong.figures["worst"] <= 3
