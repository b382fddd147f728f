import csv
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from scripts.evaluation import Evaluation, generation_metrics, segmentation_metrics

SPACING_MM = (1.5, 1.0, 2.0)
AFFINE = np.diag([*SPACING_MM, 1.0])


def cube(start=(4, 4, 4), size=8, shape=(20, 20, 20), label=1):
    volume = np.zeros(shape, np.uint8)
    volume[tuple(slice(s, s + size) for s in start)] = label
    return volume


def save(folder, case, volume, affine=AFFINE, ending=".nii.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.MGHImage if ending == ".mgz" else nib.Nifti1Image
    nib.save(image(volume, affine), folder / f"{case}{ending}")


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "predictions", tmp_path / "references", tmp_path / "out"


def evaluate(folders, **options):
    return Evaluation(*folders, progress=False, num_bootstrap=200, **options).run()


def table(folders):
    with (folders[2] / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def surface_distances_mm(mask, other, spacing_mm):
    """Brute force: distance of every surface voxel of mask to the nearest surface voxel of other."""

    def surface(m):
        m = np.pad(m, 1)
        inside = m.copy()
        for axis in range(3):
            inside &= np.roll(m, 1, axis) & np.roll(m, -1, axis)
        return np.argwhere(m & ~inside) * spacing_mm

    return np.linalg.norm(surface(mask)[:, None] - surface(other)[None], axis=-1).min(axis=1)


# --- segmentation: known answers


def test_shifted_cubes_by_hand():
    reference, prediction = cube() > 0, cube((6, 4, 4)) > 0  # 2 voxels of 1.5 mm
    metrics = segmentation_metrics(prediction, reference, AFFINE)
    assert metrics["dice"] == pytest.approx(2 * 6 * 64 / (512 + 512))
    assert metrics["hd95_mm"] == pytest.approx(3.0)
    assert metrics["reference_volume_mm3"] == metrics["predicted_volume_mm3"] == pytest.approx(512 * 3.0)
    distances = [surface_distances_mm(a, b, SPACING_MM) for a, b in ((prediction, reference), (reference, prediction))]
    within = sum((d <= 1.0).sum() for d in distances) / sum(len(d) for d in distances)
    assert 0 < within < 1
    assert metrics["nsd_1mm"] == pytest.approx(within)


def test_hd95_along_another_axis_uses_that_spacing():
    metrics = segmentation_metrics(cube((4, 4, 7)) > 0, cube() > 0, AFFINE)
    assert metrics["hd95_mm"] == pytest.approx(6.0)


def test_random_blobs_match_brute_force():
    rng = np.random.default_rng(0)
    prediction, reference = rng.random((2, 7, 8, 9)) > 0.6
    metrics = segmentation_metrics(prediction, reference, AFFINE)
    distances = [surface_distances_mm(a, b, SPACING_MM) for a, b in ((prediction, reference), (reference, prediction))]
    assert metrics["dice"] == pytest.approx(2 * (prediction & reference).sum() / (prediction.sum() + reference.sum()))
    assert metrics["hd95_mm"] == pytest.approx(max(np.quantile(d, 0.95) for d in distances))
    joined = np.concatenate(distances)
    assert metrics["nsd_1mm"] == pytest.approx((joined <= 1.0).mean())


@pytest.mark.parametrize("start", [(0, 0, 0), (4, 5, 6), (12, 12, 12)])  # at the border too
def test_cropping_does_not_change_the_values(start):
    reference, prediction = cube(start) > 0, cube((4, 4, 4)) > 0
    whole = [torch.from_numpy(m)[None, None] for m in (prediction, reference)]
    on_surface = {"include_background": True, "spacing": SPACING_MM}
    metrics = segmentation_metrics(prediction, reference, AFFINE)
    assert metrics["nsd_1mm"] == compute_surface_dice(*whole, class_thresholds=[1.0], **on_surface).item()
    assert metrics["hd95_mm"] == compute_hausdorff_distance(*whole, percentile=95, **on_surface).item()


def test_one_mm_is_within_one_mm_whatever_the_header_rounds_to():
    masks = cube((5, 4, 4)) > 0, cube() > 0
    for spacing_mm in (1.0, 1.00002, 0.99998):
        assert segmentation_metrics(*masks, np.diag([spacing_mm] * 3 + [1]))["nsd_1mm"] == 1.0


def test_oblique_affine_keeps_volume_and_spacing():
    angle = 0.3
    rotation = np.eye(4)
    rotation[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    metrics = segmentation_metrics(cube((6, 4, 4)) > 0, cube() > 0, rotation @ AFFINE)
    assert metrics["hd95_mm"] == pytest.approx(3.0, abs=1e-5)
    assert metrics["reference_volume_mm3"] == pytest.approx(512 * 3.0)


def test_one_voxel_volume():
    metrics = segmentation_metrics(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool), AFFINE)
    assert (metrics["dice"], metrics["hd95_mm"], metrics["nsd_1mm"]) == (1, 0, 1)


# --- segmentation: whole runs


def test_run_writes_rows_and_summary(folders, capsys):
    for i, shift in enumerate((0, 1, 2, 3)):
        save(folders[1], f"case{i}", cube() + cube((12, 12, 12), 6, label=2))
        save(folders[0], f"case{i}", cube((4 + shift, 4, 4)) + cube((12, 12, 12), 6, label=2))
    (folders[0] / "report.json").write_text("{}")
    (folders[0] / "case0.png").write_bytes(b"")
    (folders[0] / ".case9.nii.gz").write_bytes(b"")
    summary = evaluate(folders)
    rows = table(folders)
    assert list(rows[0]) == ["case", "label", "dice", "hd95_mm", "nsd_1mm"] + [
        "reference_volume_mm3",
        "predicted_volume_mm3",
    ]
    assert [(r["case"], r["label"]) for r in rows] == [(f"case{i}", n) for i in range(4) for n in "12"]
    assert float(rows[2]["dice"]) == pytest.approx(7 / 8, abs=1e-5)

    dice = summary["labels"]["1"]["dice"]
    assert dice["mean"] == pytest.approx((1 + 7 / 8 + 6 / 8 + 5 / 8) / 4, abs=1e-5)
    assert dice["interval_95"][0] < dice["mean"] < dice["interval_95"][1]
    assert dice["num_cases"] == 4
    assert summary["labels"]["2"]["dice"]["interval_95"] == [1, 1]
    assert summary["mean"]["dice"]["mean"] == pytest.approx((dice["mean"] + 1) / 2, abs=1e-5)
    assert json.loads((folders[2] / "summary.json").read_text()) == summary
    assert sorted(p.name for p in folders[2].glob("[!.]*")) == ["metrics.csv", "summary.json"]

    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["label", "1", "2", "mean"]
    assert str(folders[2] / "metrics.csv") in printed


def test_interval_depends_only_on_the_seed(folders):
    for i in range(4):
        save(folders[1], f"case{i}", cube())
        save(folders[0], f"case{i}", cube((4 + i, 4, 4)))
    results = [evaluate(folders, overwrite=True, seed=seed)["mean"]["dice"]["interval_95"] for seed in (0, 0, 1)]
    assert results[0] == results[1]


def test_empty_and_missing_labels(folders):
    save(folders[1], "a", cube())
    save(folders[0], "a", cube())
    save(folders[1], "b", cube())  # missed
    save(folders[0], "b", cube() * 0)
    save(folders[1], "c", cube() * 0)  # nothing there, nothing found
    save(folders[0], "c", cube() * 0)
    save(folders[1], "d", cube() * 0)  # invented
    save(folders[0], "d", cube())
    summary = evaluate(folders)
    rows = {r["case"]: r for r in table(folders)}
    assert (rows["a"]["dice"], rows["a"]["hd95_mm"], rows["a"]["nsd_1mm"]) == ("1.0", "0.0", "1.0")
    for case in "bd":
        assert (rows[case]["dice"], rows[case]["hd95_mm"], rows[case]["nsd_1mm"]) == ("0.0", "", "0.0")
    assert (rows["c"]["dice"], rows["c"]["hd95_mm"], rows["c"]["nsd_1mm"]) == ("", "", "")
    assert (rows["b"]["reference_volume_mm3"], rows["b"]["predicted_volume_mm3"]) == ("1536.0", "0.0")
    label = summary["labels"]["1"]
    assert label["dice"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert (label["dice"]["num_cases"], label["hd95_mm"]["num_cases"], label["hd95_undefined"]) == (3, 1, 2)
    assert label["hd95_mm"] == {"mean": 0.0, "interval_95": None, "num_cases": 1}


def test_given_labels_only(folders):
    save(folders[1], "a", cube() + cube((12, 12, 12), 6, label=2))
    save(folders[0], "a", cube())
    summary = evaluate(folders, labels=[1, 7])
    assert list(summary["labels"]) == ["1", "7"]
    assert summary["labels"]["7"]["dice"] == {"mean": None, "interval_95": None, "num_cases": 0}
    assert [r["label"] for r in table(folders)] == ["1", "7"]


@pytest.mark.parametrize("options", [{"labels": [0, 1]}, {"labels": []}, {"task": "regression"}])
def test_bad_options(folders, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Evaluation(*folders, **options)


def test_nothing_to_score(folders):
    save(folders[0], "a", cube() * 0)
    save(folders[1], "a", cube() * 0)
    with pytest.raises(ValueError, match="no label above 0"):
        evaluate(folders)


# --- files


def test_every_faulty_case_is_named_and_nothing_written(folders):
    predictions, references, output = folders
    save(predictions, "good", cube())
    save(references, "good", cube())
    save(predictions, "alone", cube())
    save(predictions, "shape", cube(shape=(20, 20, 21)))
    save(references, "shape", cube())
    save(predictions, "moved", cube(), AFFINE + _shift_mm(0.1))
    save(references, "moved", cube())
    save(predictions, "broken", cube())
    save(references, "broken", cube())
    whole = (predictions / "broken.nii.gz").read_bytes()
    (predictions / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    save(predictions, "soft", cube().astype(np.float32) * 0.5)
    save(references, "soft", cube())
    save(predictions, "nan", np.full((20, 20, 20), np.nan, np.float32))
    save(references, "nan", cube())
    save(predictions, "twice", cube())
    save(predictions, "twice", cube(), ending=".nii")
    save(references, "twice", cube())
    save(predictions, "flat", np.ones((20, 20), np.uint8))
    save(references, "flat", cube())
    with pytest.raises(ValueError) as error:
        evaluate(folders)
    message = str(error.value)
    assert "\n" not in message and message.startswith("8 of 9 cases")
    for case in ("alone", "shape", "moved", "broken", "soft", "nan", "twice", "flat"):
        assert f"{case}: " in message
    assert "good" not in message
    assert not output.exists()


def _shift_mm(distance):
    shift = np.zeros((4, 4))
    shift[0, 3] = distance
    return shift


def test_affine_within_tolerance_is_accepted(folders):
    save(folders[0], "a", cube(), AFFINE + _shift_mm(5e-4))
    save(folders[1], "a", cube())
    assert evaluate(folders)["mean"]["dice"]["mean"] == 1


def test_endings_may_differ(folders):
    save(folders[0], "sub.01", cube()[..., None], ending=".nii")
    save(folders[1], "sub.01", cube(), ending=".mgz")
    assert evaluate(folders)["mean"]["dice"]["mean"] == 1


def test_nrrd(folders):
    nrrd = pytest.importorskip("nrrd")
    save(folders[0], "a", cube())
    folders[1].mkdir()
    directions = np.diag(SPACING_MM) * [[-1], [-1], [1]]  # nrrd says LPS
    header = {"space": "left-posterior-superior", "space directions": directions, "space origin": [0.0, 0.0, 0.0]}
    nrrd.write(str(folders[1] / "a.nrrd"), cube(), header)
    assert evaluate(folders)["mean"]["dice"]["mean"] == 1


def test_nrrd_without_its_reader(folders, monkeypatch):
    monkeypatch.setattr("scripts.data.volumes.optional_import", lambda name: (None, False))
    save(folders[0], "a", cube())
    folders[1].mkdir()
    (folders[1] / "a.nrrd").write_bytes(b"NRRD0004")
    with pytest.raises(ValueError, match="a: .*pip install pynrrd"):
        evaluate(folders)


def test_missing_folders_and_predictions(folders):
    with pytest.raises(FileNotFoundError, match="predictions"):
        evaluate(folders)
    folders[0].mkdir()
    save(folders[1], "a", cube())
    with pytest.raises(FileNotFoundError, match=r"no predictions.*--prediction_dir"):
        evaluate(folders)


def test_references_without_prediction_are_told(folders, capsys):
    save(folders[0], "a", cube())
    save(folders[1], "a", cube())
    save(folders[1], "b", cube())
    assert evaluate(folders)["references_without_prediction"] == ["b"]
    assert "1 reference has no prediction: b" in capsys.readouterr().out


def test_overwrite_is_refused_unless_asked(folders):
    save(folders[0], "a", cube((5, 4, 4)))
    save(folders[1], "a", cube())
    evaluate(folders)
    save(folders[0], "a", cube())
    with pytest.raises(FileExistsError, match="overwrite"):
        evaluate(folders)
    assert float(table(folders)[0]["dice"]) < 1
    evaluate(folders, overwrite=True)
    assert float(table(folders)[0]["dice"]) == 1


# --- generation


def test_generation_by_hand():
    rng = np.random.default_rng(0)
    reference = (rng.random((12, 11, 13)) * 500 + 20).astype(np.float32)
    prediction = reference + rng.normal(0, 10, reference.shape).astype(np.float32)
    metrics = generation_metrics(prediction, reference)
    error = prediction.astype(float) - reference
    data_range = float(reference.max() - reference.min())
    assert metrics["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert metrics["psnr_db"] == pytest.approx(10 * np.log10(data_range**2 / (error**2).mean()), abs=1e-3)
    assert 0 < metrics["ssim"] < 1
    scaled = generation_metrics(prediction * 3, reference * 3)
    assert scaled["ssim"] == pytest.approx(metrics["ssim"], abs=1e-4)
    assert scaled["psnr_db"] == pytest.approx(metrics["psnr_db"], abs=1e-3)


def test_ssim_of_one_window_by_hand():
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 5, 5, 5)).astype(np.float32)  # a 5-voxel window fits exactly once
    gauss = np.exp(-((np.arange(5) - 2) ** 2) / (2 * 1.5**2))
    gauss /= gauss.sum()
    weights = gauss[:, None, None] * gauss[:, None] * gauss
    c1, c2 = ((k * (y.max() - y.min())) ** 2 for k in (0.01, 0.03))
    mx, my = (weights * x).sum(), (weights * y).sum()
    moments = ((x, mx, x, mx), (y, my, y, my), (x, mx, y, my))
    vx, vy, cov = ((weights * (a - ma) * (b - mb)).sum() for a, ma, b, mb in moments)
    expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert generation_metrics(x, y)["ssim"] == pytest.approx(expected, abs=1e-4)


def test_degenerate_generation_volumes_are_nan_not_errors():
    one = np.full((1, 1, 1), 3, np.float32)
    flat = np.full((8, 8, 8), 3, np.float32)
    ramp = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    for volume in (one, flat):
        metrics = generation_metrics(volume + 1, volume)
        assert math.isnan(metrics["psnr_db"]) and math.isnan(metrics["ssim"]) and metrics["mae"] == 1
    same = generation_metrics(ramp, ramp)
    assert math.isnan(same["psnr_db"]) and same["ssim"] == pytest.approx(1) and same["mae"] == 0
    assert math.isnan(generation_metrics(ramp[:2] + 1, ramp[:2])["ssim"])


def test_generation_run_with_channel_names(folders):
    rng = np.random.default_rng(0)
    for i in range(3):
        reference = rng.random((8, 8, 8)).astype(np.float32)
        save(folders[1], f"case{i}_0000", reference)
        save(folders[0], f"case{i}", reference + 0.1 * (i + 1))
    save(folders[1], "case_0000", cube())
    summary = evaluate(folders, task="generation")
    rows = table(folders)
    assert list(rows[0]) == ["case", "psnr_db", "ssim", "mae"]
    assert len(rows) == 3
    assert summary["mean"]["mae"]["mean"] == pytest.approx(0.2, abs=1e-5)
    assert summary["mean"]["psnr_undefined"] == 0
    assert summary["references_without_prediction"] == ["case_0000"]
    assert "labels" not in summary


def test_channel_names_must_be_unique_and_are_for_generation_only(folders):
    save(folders[0], "a", cube())
    save(folders[1], "a_0000", cube())
    with pytest.raises(ValueError, match="a: no reference"):
        evaluate(folders)
    save(folders[1], "a_0001", cube())
    with pytest.raises(ValueError, match=r"a: several files.*a_0000.*a_0001"):
        evaluate(folders, task="generation")


def test_constant_volumes_give_null_in_the_summary(folders):
    save(folders[0], "a", np.ones((6, 6, 6), np.float32))
    save(folders[1], "a", np.zeros((6, 6, 6), np.float32))
    summary = evaluate(folders, task="generation")
    assert summary["mean"]["psnr_db"]["mean"] is None and summary["mean"]["psnr_undefined"] == 1
    assert "NaN" not in (folders[2] / "summary.json").read_text()
    assert table(folders)[0] == {"case": "a", "psnr_db": "", "ssim": "", "mae": "1.0"}


# --- one channel of an nnU-Net folder


@pytest.fixture
def two_channels(folders):
    """imagesTr of three cases: channel 1 is clean, channel 0 is off by 0.1, 0.2 and 0.3."""
    rng = np.random.default_rng(0)
    images = folders[0].parent / "Dataset500_Test" / "imagesTr"
    for i in range(3):
        clean = rng.random((8, 8, 8)).astype(np.float32)
        save(images, f"case{i}_0000", clean + 0.1 * (i + 1))
        save(images, f"case{i}_0001", clean)
    return images


def test_one_channel_against_another(folders, two_channels):
    options = {"task": "generation", "prediction_channel": 0, "reference_channel": 1}
    summary = evaluate((two_channels, two_channels, folders[2]), **options)
    rows = table(folders)
    assert [row["case"] for row in rows] == ["case0", "case1", "case2"]
    assert [float(row["mae"]) for row in rows] == pytest.approx([0.1, 0.2, 0.3], abs=1e-5)
    assert summary["references_without_prediction"] == []


def test_a_reference_channel_settles_which_reference(folders, two_channels):
    save(folders[0], "case1", nib.load(two_channels / "case1_0001.nii.gz").get_fdata())
    where = (folders[0], two_channels, folders[2])
    with pytest.raises(ValueError, match="case1: several files"):
        evaluate(where, task="generation")
    summary = evaluate(where, task="generation", reference_channel=1)
    assert summary["mean"]["mae"]["mean"] == 0
    assert summary["references_without_prediction"] == ["case0", "case2"]


def test_with_a_channel_only_its_files_count(folders, two_channels):
    save(two_channels, "case3", np.ones((8, 8, 8), np.float32))
    save(two_channels, "_0001", np.ones((8, 8, 8), np.float32))
    summary = evaluate(
        (two_channels, two_channels, folders[2]), task="generation", prediction_channel=1, reference_channel=1
    )
    assert summary["num_cases"] == 3


def test_channels_of_segmentations(folders):
    save(folders[0], "a_0002", cube())
    save(folders[1], "a", cube())
    with pytest.raises(ValueError, match="a_0002: no reference in"):
        evaluate(folders)
    assert evaluate(folders, prediction_channel=2)["mean"]["dice"]["mean"] == 1


def test_a_channel_that_is_not_there_is_named(folders, two_channels):
    where = (two_channels, two_channels, folders[2])
    with pytest.raises(FileNotFoundError, match="no predictions of channel 0003"):
        evaluate(where, task="generation", prediction_channel=3, reference_channel=1)
    with pytest.raises(ValueError, match="3 of 3 cases.*case0: no reference of channel 0003 in"):
        evaluate(where, task="generation", prediction_channel=0, reference_channel=3)


def test_with_a_channel_a_case_has_exactly_its_name(folders):
    save(folders[0], "a", cube())
    save(folders[1], "a_0002_0001", cube())
    with pytest.raises(ValueError, match="a: no reference of channel 0001"):
        evaluate(folders, task="generation", reference_channel=1)


@pytest.mark.parametrize("name", ["prediction_channel", "reference_channel"])
@pytest.mark.parametrize("value", [-1, 10000, 0.5, "0000"])
def test_channels_must_be_channel_numbers(folders, name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        Evaluation(*folders, **{name: value})


def test_the_configuration_hands_the_channels_on(folders, two_channels):
    workflow = ConfigWorkflow(
        "configs/evaluate.json",
        workflow_type=None,
        prediction_dir=str(two_channels),
        reference_dir=str(two_channels),
        output_dir=str(folders[2]),
        task="generation",
        prediction_channel="0000",
        reference_channel=1,
    )
    workflow.initialize()
    workflow.run()
    assert [float(row["mae"]) for row in table(folders)] == pytest.approx([0.1, 0.2, 0.3], abs=1e-5)
