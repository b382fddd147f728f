"""To the network's grid and back."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data import Preprocessing, preprocessing, resampling
from scripts.data.preprocessing import LoadCase, PlacedScores, fit_spacing
from scripts.data.volumes import VolumeError, load_volume

ORIENTATIONS = [
    np.stack([order, flips], 1)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def volume(voxels, affine=None):
    """``(1, H, W, D)`` as the reader gives it."""
    affine = np.eye(4) if affine is None else affine
    return MetaTensor(
        torch.as_tensor(np.array(voxels))[None].float(), affine=torch.as_tensor(np.array(affine)).double()
    )


def affine_of(zooms=(1, 1, 1), degrees=0.0, origin=(0, 0, 0)):
    """Voxel to mm, turned about the first and then the last axis."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return nib.affines.from_matvec(turn @ np.diag(np.float64(zooms)), origin)


def oriented(voxels, affine, orientation):
    """The same volume, stored in another order and direction of its axes."""
    image = nib.Nifti1Image(voxels, affine).as_reoriented(orientation)
    return np.asanyarray(image.dataobj), image.affine


def noise(size, seed=0):
    """Every voxel above the minimum but one, so that nothing is cropped away."""
    voxels = np.random.default_rng(seed).uniform(10, 200, size).astype(np.float32)
    voxels[(0,) * len(size)] = 0
    return voxels


def ball(size, centre, radius_mm, zooms=(1, 1, 1)):
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) * np.asarray(zooms)
    return np.linalg.norm(grid - np.asarray(centre), axis=-1) <= radius_mm


# --- onto the grid


@pytest.mark.parametrize("grid, spacing", [((16, 16, 16), 1.0), ((16, 24, 32), 0.7), ((8, 8, 8), 3.1)])
def test_a_pair_has_the_grids_shape_and_range(grid, spacing):
    label = ball((20, 18, 22), (10, 9, 11), 5) * 3
    image, label = Preprocessing(grid, spacing).pair(volume(noise((20, 18, 22))), volume(label))
    assert image.shape == label.shape == (1, *grid)
    assert image.dtype == torch.float32 and label.dtype == torch.uint8
    assert type(image) is type(label) is torch.Tensor
    assert 0 <= image.min() < 0.05 and 0.95 < image.max() <= 1
    assert set(label.unique().tolist()) == {0, 3}


def test_a_target_is_in_range_and_at_least_as_large_as_the_grid():
    process = Preprocessing((8, 8, 8), 2.0)
    target = process.target(volume(noise((21, 12, 10))))
    assert target.shape == (1, 11, 8, 8), "padded where it is smaller, whole where it is larger"
    assert target.dtype == torch.float32 and target.min() == 0 and target.max() == 1
    image = process.image(volume(noise((21, 12, 10))))
    assert torch.equal(image, target.as_tensor()[:, 1:9])


def test_outliers_are_clipped():
    voxels = noise((16, 16, 16))
    voxels[3, 3, 3] = 1e6
    target = Preprocessing((16, 16, 16), 1.0).target(volume(voxels))
    assert target.median() > 0.3


@pytest.mark.parametrize("spacing", [0.6, 1.0, 1.7, 3.0])
def test_no_new_label_values(spacing):
    label = np.random.default_rng(1).choice([0, 1, 4, 9, 200], (17, 16, 15))
    _, found = Preprocessing((24, 24, 24), spacing).pair(volume(noise(label.shape)), volume(label))
    assert set(found.unique().tolist()) <= {0, 1, 4, 9, 200} and len(found.unique()) > 3


def test_large_label_numbers_survive():
    label = ball((16, 16, 16), (8, 8, 8), 4) * 1035
    _, found = Preprocessing((16, 16, 16), 1.0).pair(volume(noise((16, 16, 16))), volume(label))
    assert found.dtype == torch.int32 and set(found.unique().tolist()) == {0, 1035}


@pytest.mark.parametrize("value", [0.0, 7.0, -1000.0])
def test_constant_image(value):
    process = Preprocessing((16, 16, 16), 1.5)
    flat = volume(np.full((12, 10, 8), value))
    target = process.target(flat)
    assert torch.isfinite(target).all() and 0 <= target.min() and target.max() <= 1
    assert process.to_native(target.as_tensor(), target).shape == flat.shape
    image, _ = process.pair(flat, volume(ball((12, 10, 8), (6, 5, 4), 2)))
    assert torch.isfinite(image).all() and 0 <= image.min() and image.max() <= 1


def test_a_thin_foreground_does_not_vanish():
    voxels = np.zeros((12, 12, 12))
    voxels[4, 5, 2:9] = 3
    process = Preprocessing((16, 16, 16), 4.0)
    target = process.target(volume(voxels))
    assert min(target.shape) == 1
    assert process.to_native(target.as_tensor(), target).shape == (1, 12, 12, 12)


def test_labels_outside_of_the_images_foreground_are_kept():
    image, label = np.zeros((16, 16, 16)), np.zeros((16, 16, 16))
    image[2:6, 2:6, 2:6], label[10:12, 2:6, 2:6] = 5, 1
    _, found = Preprocessing((16, 16, 16), 1.0).pair(volume(image), volume(label))
    assert found.sum() == label.sum()


def test_size_in_mm_is_kept():
    zooms, size = (1.0, 1.0, 2.5), (30, 30, 12)
    inside = ball(size, (15, 15, 13.75), 10, zooms)
    _, found = Preprocessing((32, 32, 32), 1.25).pair(
        volume(noise(size), affine_of(zooms)), volume(inside, affine_of(zooms))
    )
    box = [int(v.max() - v.min() + 1) for v in found[0].nonzero().T]
    assert box[:2] == pytest.approx([20 / 1.25] * 2, abs=1)
    assert box[2] == pytest.approx(20 / 1.25, abs=2.5 / 1.25)
    assert float(found.sum()) * 1.25**3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.1)


def test_a_larger_image_is_cropped_about_its_centre():
    voxels, label = noise((20, 22, 24)), ball((20, 22, 24), (10, 11, 12), 6)
    whole, whole_label = Preprocessing((20, 22, 24), 1.0).pair(volume(voxels), volume(label))
    image, found = Preprocessing((16, 16, 16), 1.0).pair(volume(voxels), volume(label))
    assert torch.equal(image, whole[:, 2:18, 3:19, 4:20])
    assert torch.equal(found, whole_label[:, 2:18, 3:19, 4:20])


def test_a_smaller_image_is_padded_about_its_centre():
    voxels = noise((10, 12, 14))
    image, label = Preprocessing((16, 16, 16), 1.0).pair(volume(voxels), volume(np.ones((10, 12, 14))))
    assert torch.all(label[:, 3:13, 2:14, 1:15] == 1) and label.sum() == voxels.size
    assert image[:, 3:13, 2:14, 1:15].count_nonzero() == image.count_nonzero() > 0


def test_data_on_the_grid_stay_as_they_are():
    voxels = noise((16, 16, 16))
    label = np.random.default_rng(0).integers(0, 3, (16, 16, 16))
    spacing = fit_spacing([{"extent_mm": [16.0] * 3, "voxel_mm": [1.0] * 3}], (16, 16, 16))
    image, found = Preprocessing((16, 16, 16), spacing).pair(volume(voxels), volume(label))
    low, high = np.percentile(voxels, (0.5, 99.5))
    np.testing.assert_allclose(image[0], np.clip((voxels - low) / (high - low), 0, 1), atol=1e-5)
    assert np.array_equal(found[0], label)


@pytest.mark.parametrize("settings", [((16, 16), 1.0), ((16, 16, 0), 1.0), ((16,) * 3, 0.0), ((16,) * 3, float("nan"))])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValueError, match="three sizes and a positive spacing"):
        Preprocessing(*settings)


# --- spacing that fits


@pytest.mark.parametrize("voxel", [0.5, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("count", [5, 16, 17, 24, 31, 32])
def test_the_fitting_spacing_fills_the_grid_and_no_more(voxel, count):
    voxels = noise((count, 4, 4))
    spacing = fit_spacing([{"extent_mm": [count * voxel, 4 * voxel, 4 * voxel], "voxel_mm": [voxel] * 3}], (12, 12, 12))
    target = Preprocessing((12, 12, 12), spacing).target(volume(voxels, affine_of([voxel] * 3)))
    assert 11 <= target.shape[1] <= 12


def test_the_largest_case_and_axis_decide():
    small, large = {"extent_mm": [10.0, 10.0, 10.0]}, {"extent_mm": [10.0, 30.0, 31.0]}
    assert fit_spacing([small, large], (10, 10, 20)) == pytest.approx(3.0)


# --- and back


def test_answers_reach_as_far_as_the_grid():
    voxels = np.zeros((20, 20, 20), np.float32)
    voxels[5:15, 4:12, 6:13] = noise((10, 8, 7)) + 1
    for spacing, edge in ((1.3, 16 * 1.3), (0.5, 10)):
        process = Preprocessing((16, 16, 16), spacing)
        target = process.target(volume(voxels))
        native = process.to_native(torch.ones(1, *target.shape[1:]), target)[0].as_tensor()
        assert torch.all(native[5:15, 4:12, 6:13] == 1), "the foreground box is always on it"
        assert set(native.unique().tolist()) == {0, 1}
        assert native.sum() ** (1 / 3) == pytest.approx(edge, abs=2.5)


def test_a_target_serves_many_times():
    process = Preprocessing((16, 16, 16), 1.3)
    target = process.target(volume(noise((12, 10, 9))))
    scores = torch.rand(2, *target.shape[1:])
    placed = {value: PlacedScores(part, target) for value, part in zip((1, 300), scores, strict=True)}
    first, labels = process.to_native(scores, target), process.to_native_labels(placed)
    assert torch.equal(first.as_tensor(), process.to_native(scores, target).as_tensor())
    assert labels.dtype == torch.int16 and set(labels.unique().tolist()) == {0, 1, 300}


def test_slabs_make_no_difference(monkeypatch):
    process, scan = Preprocessing((16, 16, 16), 1.3), volume(noise((12, 10, 9)))
    target = process.target(scan)
    scores = torch.rand(2, *target.shape[1:])
    placed = {value: PlacedScores(part, target) for value, part in enumerate(scores, 1)}
    maps, labels = process.to_native(scores, target), process.to_native_labels(placed)
    monkeypatch.setattr(resampling, "SLAB_VOXELS", 1)
    assert torch.equal(process.target(scan).as_tensor(), target.as_tensor())
    torch.testing.assert_close(process.to_native(scores, target).as_tensor(), maps.as_tensor())
    again = process.to_native_labels(placed)
    assert (again.as_tensor() == labels.as_tensor()).float().mean() > 0.999, "but for rounding"


def test_scores_that_do_not_fit():
    process = Preprocessing((8, 8, 8), 1.0)
    target = process.target(volume(noise((8, 8, 8))))
    with pytest.raises(ValueError, match=r"scores of \(8, 8, 7\) voxels do not fit a target of \(8, 8, 8\)"):
        process.to_native(torch.zeros(1, 8, 8, 7), target)
    with pytest.raises(ValueError, match=r"scores of \(8, 8, 7\) voxels do not fit a target of \(8, 8, 8\)"):
        process.to_native_labels({1: PlacedScores(torch.zeros(8, 8, 7), target)})
    with pytest.raises(ValueError, match=r"does not come from Preprocessing\.target"):
        process.to_native(torch.zeros(1, 8, 8, 8), volume(noise((8, 8, 8))))


def test_a_pair_is_the_same_in_every_orientation():
    """What is so of targets and predictions is in tests/test_geometry.py."""
    voxels, affine = noise((9, 12, 10), seed=5), affine_of((1.5, 1.5, 1.5), origin=(4, -20, 7))
    labels = np.random.default_rng(2).integers(0, 3, voxels.shape).astype(np.int16)
    process = Preprocessing((16, 16, 16), 1.5)
    expected_image, expected_label = process.pair(volume(voxels, affine), volume(labels, affine))
    for orientation in ORIENTATIONS:
        stored, stored_affine = oriented(voxels, affine, orientation)
        stored_labels, _ = oriented(labels, affine, orientation)
        image, label = process.pair(volume(stored, stored_affine), volume(stored_labels, stored_affine))
        torch.testing.assert_close(image, expected_image)
        assert torch.equal(label, expected_label)


# --- generation


def test_image_pair_scales_both_alike_in_place():
    first = noise((16, 16, 16))
    second = 3000 - 2 * first
    image, output = Preprocessing((16, 16, 16), 1.0).image_pair(volume(first), volume(second))
    assert image.shape == output.shape == (1, 16, 16, 16)
    assert image.dtype == output.dtype == torch.float32
    assert 0 <= min(image.min(), output.min()) and max(image.max(), output.max()) <= 1
    torch.testing.assert_close(output, 1 - image, atol=1e-4, rtol=0)


def test_image_pair_crops_to_what_either_shows():
    first, second = np.zeros((16, 16, 16)), np.zeros((16, 16, 16))
    first[4:8, 4:8, 4:8], second[6:12, 4:8, 4:8] = 5, 7
    image, output = Preprocessing((16, 16, 16), 1.0).image_pair(volume(first), volume(second))
    assert (image > 0).sum() == 4**3 and (output > 0).sum() == 6 * 4 * 4


def test_image_pair_of_unequal_shapes():
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 8, 8, 8\), \(1, 8, 8, 9\)"):
        Preprocessing((16, 16, 16), 1.0).image_pair(volume(noise((8, 8, 8))), volume(noise((8, 8, 9))))


def test_intensity_range_undoes_the_scaling():
    # a small foreground in much air, as in any skull-stripped head
    first, second = np.zeros((30, 30, 30), np.float32), np.zeros((30, 30, 30), np.float32)
    first[10:18, 10:18, 10:18] = noise((8, 8, 8)) + 1
    second[10:18, 10:18, 10:18] = noise((8, 8, 8), seed=1) * 4 + 1
    process = Preprocessing((8, 8, 8), 1.0)
    _, output = process.image_pair(volume(first), volume(second))
    low, high = process.intensity_range(volume(first), volume(second))
    inside = second[10:18, 10:18, 10:18]
    np.testing.assert_allclose(low + (high - low) * output[0], np.clip(inside, low, high), atol=0.01)
    assert (low, high) == pytest.approx(np.percentile(inside, (0.5, 99.5)), abs=0.1)


# --- settings and files


def test_fingerprint_changes_with_every_setting(monkeypatch):
    known = {
        Preprocessing(grid, spacing).fingerprint
        for grid in ((16, 16, 16), (16, 16, 32), (32, 16, 16))
        for spacing in (1.0, 1.001)
    }
    assert len(known) == 6
    assert Preprocessing([16, 16, 16], 1).fingerprint in known
    monkeypatch.setattr(preprocessing, "PERCENTILES", (1.0, 99.0))
    assert Preprocessing((16, 16, 16), 1.0).fingerprint not in known


def test_files_are_read_with_their_affine(write_nifti, tmp_path):
    voxels, affine = noise((8, 9, 10)), affine_of((1, 2, 3), 10, (4, 5, 6))
    read = load_volume(str(write_nifti(tmp_path / "a b.nii.gz", voxels, affine)))
    assert read.shape == (1, 8, 9, 10) and read.dtype == torch.float32
    np.testing.assert_allclose(read.affine, affine, atol=1e-5)
    assert np.array_equal(read[0], voxels)


def test_load_pair_reads_a_case(write_nifti, tmp_path):
    case = {
        "image": str(write_nifti(tmp_path / "i.nii.gz", noise((8, 8, 8)))),
        "label": str(write_nifti(tmp_path / "l.nii.gz", ball((8, 8, 8), (4, 4, 4), 2).astype(np.uint8))),
    }
    load = LoadCase(Preprocessing((8, 8, 8), 1.0))
    pair = load(case)
    assert set(pair) == {"image", "label"} and pair["label"].sum() == ball((8, 8, 8), (4, 4, 4), 2).sum()
    alone = load({"image": case["image"]})
    assert set(alone) == {"image"} and alone["image"].shape == (1, 8, 8, 8) and alone["image"].max() == 1
    both = load({"image": case["image"], "output": case["image"]})
    assert torch.equal(both["image"], both["label"]) and both["label"].dtype == torch.float32


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_an_unreadable_file_is_named(write_nifti, tmp_path, damage):
    path = tmp_path / "scan of P7.nii.gz"
    if damage == "text":
        path.write_text("not an image")
    elif damage == "truncated":
        write_nifti(path, noise((8, 8, 8)))
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(VolumeError, match=r"scan of P7\.nii\.gz (is missing|cannot be read)"):
        load_volume(str(path))


def test_a_series_is_no_volume(write_nifti, tmp_path):
    path = write_nifti(tmp_path / "series.nii.gz", noise((8, 8, 8, 3)))
    with pytest.raises(VolumeError, match=r"series\.nii\.gz must be one 3D volume, got shape \(8, 8, 8, 3\)"):
        load_volume(str(path))
    single = write_nifti(tmp_path / "single.nii.gz", noise((8, 8, 8))[..., None])
    assert load_volume(str(single)).shape == (1, 8, 8, 8)
