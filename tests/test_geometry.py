"""Scans of any geometry: what comes out lies where the scan is, whatever way its file stores it.

The network is left out: the scores are simple functions of the preprocessed target, so that what the answer should be
is known, and every prediction has a foreground of 1 to 50 %.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, decollate_batch, list_data_collate
from scipy.ndimage import convolve1d, gaussian_filter
from scipy.spatial.transform import Rotation

from scripts.data.preprocessing import PlacedScores, Preprocessing
from scripts.data.resampling import closest_axes, grid_axes, sample_linear
from scripts.data.volumes import NIFTI_SPACE_FIELDS, load_volume
from scripts.inference.native_nifti import native_nifti
from scripts.inferer import ICLInferer

ORIENTATIONS = [
    np.stack([order, flips], 1)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
VALUES = [3, 7]


class Grid(torch.nn.Module):
    """Stands where a network is asked for its grid only."""

    grid = torch.tensor([16, 24, 20])


def predictor(task="segmentation", spacing=1.9):
    """With one context that has the labels 3 and 7; for generation its output runs from -200 to 1500."""
    image = torch.rand(1, 12, 14, 10)
    label = torch.zeros_like(image)
    label[:, 2:5, 2:5, 2:5], label[:, 6:9, 6:9, 6:9] = VALUES
    if task == "generation":
        label = -200 + 1700 * torch.linspace(0, 1, image.numel()).reshape(image.shape)
    made = ICLInferer(Grid(), device="cpu", task=task, spacing=spacing, align="off")
    made.set_context([MetaTensor(image)], [MetaTensor(label)])
    return made


def affine_of(zooms, rotation=(0, 0, 0), origin=(0, 0, 0)):
    """Voxel to mm: voxels of ``zooms``, turned by a rotation vector in radians."""
    return nib.affines.from_matvec(Rotation.from_rotvec(rotation).as_matrix() @ np.diag(np.float64(zooms)), origin)


def smooth(shape, seed=0):
    """A scan whose structures are a few voxels in size, without background."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2, mode="nearest")
    return (100 + 800 * (field - field.min()) / max(np.ptp(field), 1e-9)).astype(np.float32)


def as_volume(voxels, affine):
    voxels = torch.as_tensor(np.array(voxels, dtype=np.float32))[None]
    return MetaTensor(voxels, affine=torch.as_tensor(np.array(affine)).double())


def oriented(voxels, affine, orientation):
    """The same volume, stored in another order and direction of its axes."""
    image = nib.Nifti1Image(voxels, affine).as_reoriented(orientation)
    return np.asanyarray(image.dataobj), image.affine


def bright_and_dark(target, process, bright=0.15, dark=0.15):
    """Scores that put about these parts of the scan above 0.5."""
    inside = process.to_native(target.as_tensor(), target, order=3).numpy()
    high, low = np.quantile(inside, [1 - bright, dark])
    return 8 * torch.cat([target.as_tensor() - float(high), float(low) - target.as_tensor()]) + 0.5


def scored(made, target, scores):
    """The prediction of a target with these scores."""
    made.prepare_views(target)
    target.scores = [scores]
    return made.to_native(target).prediction


def answer_of(made, volume):
    target = made.target(volume)
    return scored(made, target, bright_and_dark(target.image, made.context.preprocessing))


def native_labels(process, scores, target, values):
    placed = {value: PlacedScores(score, target) for value, score in zip(values, scores, strict=True)}
    return process.to_native_labels(placed)


def labels_of(process, scores, target, values):
    return native_labels(process, scores, target, values)[0].numpy()


def foreground(answer):
    return float((answer.as_tensor() > 0).float().mean())


def dice(a, b):
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


# --- files of any kind


def write_nrrd(path, voxels, affine):
    nrrd = pytest.importorskip("nrrd")
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T, "space origin": lps[:3, 3]}
    nrrd.write(str(path), voxels, header)


def write_scan(path, voxels, affine, slope=None):
    if path.suffix == ".nrrd":
        write_nrrd(path, voxels, affine)
    elif path.suffix == ".mgz":
        nib.save(nib.MGHImage(voxels, affine), path)
    else:
        image = nib.Nifti1Image(voxels, affine)
        if slope:
            image.header.set_slope_inter(*slope)
        nib.save(image, path)


@pytest.mark.parametrize("rotation", [(0, 0, 0), (0.3, -0.5, 0.2)], ids=["straight", "oblique"])
@pytest.mark.parametrize(
    "name, dtype, slope",
    [
        ("scan.nii", np.int16, None),
        ("scan.nii.gz", np.uint16, None),
        ("scan.nii.gz", np.float32, None),
        ("scan.nii", np.float64, None),
        ("scan.nii.gz", np.int16, (0.25, -1024.0)),
        ("scan.nii", np.uint8, (3.5, 20.0)),
        ("scan.mgz", np.int16, None),
        ("scan.mgz", np.float32, None),
        ("scan.nrrd", np.int16, None),
        ("scan.nrrd", np.float32, None),
    ],
)
def test_answers_lie_on_files_of_every_kind(tmp_path, name, dtype, slope, rotation):
    affine = affine_of((1.1, 0.8, 2.5), rotation, (-31, 12.5, 70))
    voxels = (smooth((17, 21, 9)) / (4 if dtype == np.uint8 else 1)).astype(dtype)
    write_scan(tmp_path / name, voxels, affine, slope)
    made, volume = predictor(), load_volume(tmp_path / name)
    scale, offset = slope or (1, 0)
    np.testing.assert_allclose(volume[0], voxels.astype(np.float32) * scale + offset, rtol=1e-6)
    answer = answer_of(made, volume)
    nib.save(native_nifti(answer), tmp_path / "CASE.nii.gz")
    read = nib.load(tmp_path / "CASE.nii.gz")
    assert read.shape == voxels.shape and read.get_data_dtype() == np.uint8
    assert np.isnan(read.header["scl_slope"]) or read.header["scl_slope"] in (0, 1)
    for found in (read.affine, read.get_qform(), read.get_sform()):
        np.testing.assert_allclose(found, affine, atol=1e-4)
    assert np.array_equal(np.asanyarray(read.dataobj), answer[0]) and 0.01 < foreground(answer) < 0.5
    assert set(np.unique(answer)) == {0, *VALUES}


@pytest.mark.parametrize("codes", itertools.product((0, 1, 4), (0, 1, 2)), ids=str)
@pytest.mark.parametrize("units", ["mm", "unknown"])
def test_answers_have_the_scans_own_sform_and_qform(tmp_path, codes, units):
    sform, qform = affine_of((1.3, 1.0, 2.2), (0.1, 0, 0), (5, 6, 7)), affine_of((1, 1, 2), (0, 0, 0.4), (-80, 3, 1))
    source = nib.Nifti1Image(smooth((12, 10, 8)), None)
    source.header.set_xyzt_units(units)
    source.header.set_sform(sform, code=codes[0])
    source.header.set_qform(qform, code=codes[1])
    nib.save(source, tmp_path / "scan.nii.gz")
    source = nib.load(tmp_path / "scan.nii.gz")
    volume = load_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(volume.affine, source.affine, atol=1e-9)
    answer = answer_of(predictor(), volume)
    nib.save(native_nifti(answer), tmp_path / "answer.nii.gz")
    read = nib.load(tmp_path / "answer.nii.gz")
    for field in NIFTI_SPACE_FIELDS:
        assert np.array_equal(read.header[field], source.header[field]), field
    assert np.array_equal(read.affine, source.affine) and read.shape == source.shape
    assert 0.01 < foreground(answer) < 0.5


def test_space_is_remembered_through_collation(tmp_path, write_nifti):
    affine = affine_of((1, 2, 1.5), (0.2, 0.1, 0), (4, 5, 6))
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", smooth((9, 11, 7)), affine))
    made = predictor()
    target = made.target(volume)
    (passed,) = decollate_batch(list_data_collate([{"image": target.image}]))
    scores = bright_and_dark(target.image, made.context.preprocessing)
    direct, later = scored(made, target, scores), scored(made, replace(target, image=passed["image"], views=[]), scores)
    assert torch.equal(direct.as_tensor(), later.as_tensor()) and torch.equal(direct.affine, later.affine)
    assert str(native_nifti(direct).header) == str(native_nifti(later).header)


def test_an_answer_that_was_moved_does_not_keep_the_scans_header(tmp_path, write_nifti):
    volume = load_volume(write_nifti(tmp_path / "a.nii.gz", smooth((9, 11, 7)), affine_of((1, 2, 1.5))))
    answer = answer_of(predictor(), volume)
    answer.affine = torch.as_tensor(affine_of((3, 2, 1), origin=(9, 9, 9)))
    np.testing.assert_allclose(native_nifti(answer).affine, answer.affine)


def test_a_sheared_affine_goes_into_the_sform_alone():
    affine = np.eye(4)
    affine[0, 2] = 0.3  # as of a tilted gantry; a qform has no shear
    image = native_nifti(answer_of(predictor(), as_volume(smooth((10, 12, 14)), affine)))
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    assert image.header["qform_code"] == 0 and image.header["sform_code"] == 1


@pytest.mark.parametrize("thin", [0, 1, 2])
@pytest.mark.parametrize("zoom", [0.3, 1.0, 6.0])
def test_scans_of_one_slice(thin, zoom, tmp_path):
    shape, zooms = [18, 18, 18], [1.0, 1.0, 1.0]
    shape[thin], zooms[thin] = 1, zoom
    volume = as_volume(smooth(shape), affine_of(zooms))
    answer = answer_of(predictor(), volume)
    nib.save(native_nifti(answer), tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").shape == tuple(shape) and 0.01 < foreground(answer) < 0.5


# --- orientation


@pytest.mark.parametrize("kind", ["sform", "qform", "45 degrees", "thick slices"])
def test_a_reoriented_file_gives_the_reoriented_answer(tmp_path, kind):
    rotation = {"45 degrees": (0, 0, np.pi / 4), "qform": (0.31, -0.2, 0.17)}.get(kind, (0.2, 0.3, -0.1))
    zooms = (0.9375, 0.9375, 5.5) if kind == "thick slices" else (0.7324219, 1.015625, 1.2)
    affine, made = affine_of(zooms, rotation, (-93.7, 11.3, 45.1)), predictor(spacing=1.44)
    expected = expected_target = None
    for orientation in ORIENTATIONS:
        voxels, stored = oriented(smooth((17, 14, 12)), affine, orientation)
        image = nib.Nifti1Image(voxels, None)
        if kind == "qform":  # the header holds a quaternion, which rounds differently for each orientation
            image.header.set_qform(stored, code=1)
        else:
            image.header.set_sform(stored, code=1)
        nib.save(image, tmp_path / "scan.nii")
        volume = load_volume(tmp_path / "scan.nii")
        target, answer = made.target(volume).image, answer_of(made, volume)
        if expected is None:  # the first orientation changes nothing
            expected, expected_target = answer[0].numpy(), target.as_tensor()
            assert all(0.01 < (expected == value).mean() < 0.5 for value in VALUES)
        assert torch.equal(target.as_tensor(), expected_target)
        assert np.array_equal(answer[0].numpy(), oriented(expected, affine, orientation)[0])


@pytest.mark.parametrize("rotation", [(0, 0, np.pi / 4), (np.pi / 4, 0, 0), (0.6, 0.6, 0.6), (0, -np.pi / 4, 0)])
def test_axes_are_told_apart_alike_for_every_orientation(rotation):
    affine = affine_of((1, 1, 1), rotation)
    first = None
    for orientation in ORIENTATIONS:
        _, stored = oriented(np.zeros((3, 4, 5), np.uint8), affine, orientation)
        noise = 1 + 1e-7 * np.random.default_rng(int(orientation[0, 0])).normal(size=(3, 3))
        axes = closest_axes(nib.affines.from_matvec(stored[:3, :3] * noise))
        in_ras = np.stack([stored[:3, np.flatnonzero(axes[:, 0] == a)[0]] for a in range(3)], 1)
        in_ras = in_ras * [axes[np.flatnonzero(axes[:, 0] == a)[0], 1] for a in range(3)]
        first = in_ras if first is None else first
        np.testing.assert_allclose(in_ras, first, atol=1e-9)


# --- any geometry at all

geometries = {
    "shape": st.tuples(*[st.integers(5, 22)] * 3),
    "zooms": st.tuples(*[st.floats(0.3, 6.0)] * 3),
    "rotation": st.tuples(*[st.floats(-3.0, 3.0)] * 3),
    "origin": st.tuples(*[st.floats(-300, 300)] * 3),
    "spacing": st.floats(0.7, 4.0),
    "seed": st.integers(0, 999),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(orientation=st.sampled_from(range(48)), share=st.floats(0.02, 0.2), **geometries)
def test_any_geometry(shape, zooms, rotation, origin, spacing, seed, orientation, share):
    extent = np.array(shape) * zooms
    assume(extent.max() / spacing < 60)  # keeps the example small
    affine = affine_of(zooms, rotation, origin)
    process = Preprocessing((12, 16, 8), spacing)  # an unequal grid, of which most scans are larger on some axis
    voxels = smooth(shape, seed)

    def run(stored, stored_affine):
        target = process.target(as_volume(stored, stored_affine))
        scores = bright_and_dark(target, process, share, share)
        return scores, target, native_labels(process, scores, target, VALUES)

    scores, target, answer = run(voxels, affine)
    assert answer.shape == (1, *shape) and answer.dtype == torch.uint8
    np.testing.assert_array_equal(answer.affine, affine)
    assert 0.01 <= foreground(answer) <= 0.5
    maps = process.to_native(scores, target, order=3).as_tensor()
    best, channel = maps.max(0, keepdim=True)
    second = maps.min(0, keepdim=True).values
    alone = best > 0.5 * (1 - torch.where(second > 0.05, second, 0))
    expected = torch.where(alone, torch.tensor(VALUES)[channel], 0).to(torch.uint8)
    assert (answer.as_tensor() == expected).float().mean() > 0.99, "but for rounding"
    centre = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    grid_centre = nib.affines.apply_affine(np.asarray(target.affine), (np.array(target.shape[1:]) - 1) / 2)
    assert np.linalg.norm(centre - grid_centre) <= 1.5 * spacing + 0.5 * max(zooms), "the grid lies about the scan"
    turned, turned_affine = oriented(voxels, affine, ORIENTATIONS[orientation])
    _, _, other = run(turned, turned_affine)
    assert np.array_equal(oriented(answer[0].numpy(), affine, ORIENTATIONS[orientation])[0], other[0].numpy())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    point=st.tuples(*[st.floats(0.1, 0.9)] * 3),
    **{key: geometries[key] for key in ("shape", "zooms", "rotation", "origin", "spacing")},
)
def test_grid_voxels_lie_where_their_affine_says(shape, zooms, rotation, origin, spacing, point):
    # a scan that is linear in space is linear on the grid, at the very same places
    assume(max(np.array(shape) * zooms) / spacing < 60)
    affine = affine_of(zooms, rotation, origin)
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    direction = np.array(point) / np.linalg.norm(point)
    scan = as_volume(places @ direction, affine)
    axes, counts = grid_axes(affine, shape, [(0, n) for n in shape], spacing)
    found = sample_linear(scan[0].as_tensor(), axes, counts).numpy()
    target = Preprocessing((1, 1, 1), spacing).target(scan)
    assert target.shape[1:] == found.shape
    expected = nib.affines.apply_affine(np.asarray(target.affine), np.moveaxis(np.indices(counts), 0, -1)) @ direction
    within = tuple(slice(0, max(n - 1, 1)) for n in counts)  # the last may lie beyond the scan's last centre
    np.testing.assert_allclose(found[within], expected[within], atol=2e-2)


# --- how much of a border survives


def covered(mask, affine, spacing):
    """What a perfect network answers for a mask ``(H, W, D)``: the part of each grid voxel that it covers.

    Voxels finer than the grid's are averaged over the width of a grid voxel.
    """
    part = mask.astype(np.float64)
    for axis, width in enumerate(spacing / nib.affines.voxel_sizes(affine)):
        reach = max(0, int(np.ceil((width - 1) / 2)))
        weights = np.clip((width + 1) / 2 - np.abs(np.arange(-reach, reach + 1)), 0, 1)
        part = convolve1d(part, weights / weights.sum(), axis, mode="constant")
    axes, counts = grid_axes(affine, mask.shape, [(0, n) for n in mask.shape], spacing)
    return sample_linear(torch.as_tensor(part), axes, counts)


def structure(stretch, zooms, rotation, seed):
    """A ball or ellipsoid of 1 cm³ at a random place, in two halves, in a scan of 2 cm about it."""
    shape = np.ceil(26 / np.array(zooms)).astype(int)
    affine = affine_of(zooms, rotation)
    rng = np.random.default_rng(seed)
    places = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    centre = nib.affines.apply_affine(affine, (shape - 1) / 2 + rng.uniform(-0.5, 0.5, 3))
    radii = 6.25 * np.array(stretch) / np.prod(stretch) ** (1 / 3)
    inside = np.linalg.norm((places - centre) / radii, axis=-1) <= 1
    assert inside.sum() * np.prod(zooms) == pytest.approx(1000, rel=0.1)
    return inside, inside & ((places - centre) @ rng.normal(size=3) > 0), affine


@pytest.mark.parametrize("spacing", [0.9, 1.0, 1.25, 1.44])
@pytest.mark.parametrize("stretch", [(1, 1, 1), (1.5, 1, 0.8)], ids=["ball", "ellipsoid"])
@pytest.mark.parametrize("zooms", [(1, 1, 1), (0.7, 0.7, 0.7), (0.4, 0.4, 1.2)], ids=str)
@pytest.mark.parametrize("rotation", [(0, 0, 0), (0.3, -0.2, 0.5)], ids=["straight", "oblique"])
def test_structures_of_1_cm3_survive_the_way_there_and_back(spacing, stretch, zooms, rotation):
    whole, half, affine = structure(stretch, zooms, rotation, seed=int(100 * spacing))
    process = Preprocessing((1, 1, 1), spacing)  # pads nothing
    target = process.target(as_volume(noise(whole.shape), affine))
    halves = torch.stack([covered(part, affine, spacing) for part in (half, whole & ~half)])
    answer = labels_of(process, halves.sum(0, keepdim=True), target, [1])
    assert dice(answer > 0, whole) >= 0.98
    answer = labels_of(process, halves, target, VALUES)  # no gap between labels that touch
    apart = labels_of(process, halves[:1], target, VALUES[:1]) > 0
    apart |= labels_of(process, halves[1:], target, VALUES[1:]) > 0
    assert dice(answer > 0, whole) >= max(0.965, dice(apart, whole))
    assert all(dice(answer == v, part) >= 0.95 for v, part in zip(VALUES, (half, whole & ~half), strict=True))


def test_label_numbers_on_the_grid_keep_less():
    # a border that is known to a voxel only; training and contexts have no more
    found = []
    for seed in range(6):
        whole, _, affine = structure((1, 1, 1), (1, 1, 1), (0, 0, 0), seed)
        scan = as_volume(noise(whole.shape), affine)
        target = Preprocessing((1, 1, 1), 1.44).target(scan)
        process = Preprocessing(target.shape[1:], 1.44)
        numbers = process.pair(scan, as_volume(whole, affine))[1]
        found.append(dice(labels_of(process, numbers.float(), target, [1]) > 0, whole))
    assert 0.88 < np.mean(found) < 0.98


def noise(shape):
    """Every voxel above the minimum but one, so that nothing is cropped away."""
    voxels = np.random.default_rng(0).uniform(10, 200, shape)
    voxels[0, 0, 0] = 0
    return voxels


# --- generation


@pytest.mark.parametrize("number", [0, 11, 29, 46])
def test_generated_images_are_in_the_units_of_the_contexts_outputs(number):
    made = predictor("generation", spacing=1.3)
    affine = affine_of((1.2, 0.9, 2.0), (0.1, 0.2, 0.3), (3, 4, 5))
    ramp = np.indices((14, 16, 9)).sum(0).astype(np.float32)
    voxels, affine = oriented(ramp, affine, ORIENTATIONS[number])
    target = made.target(as_volume(voxels, affine))
    low, high = made.context.output_range
    assert low == pytest.approx(-200, abs=50) and high == pytest.approx(1500, abs=150)
    answer = scored(made, target, target.image.as_tensor())
    assert answer.shape == (1, *voxels.shape) and answer.dtype == torch.float32
    np.testing.assert_array_equal(answer.affine, affine)
    limits = np.percentile(ramp, (0.5, 99.5))
    expected = low + (high - low) * np.clip((voxels - limits[0]) / np.ptp(limits), 0, 1)
    assert np.abs(answer[0].numpy() - expected)[2:-2, 2:-2, 2:-2].max() < 0.05 * (high - low)
    assert low <= answer.min() < answer.max() <= high
    image = native_nifti(answer)
    assert image.get_data_dtype() == np.float32 and image.shape == voxels.shape


def test_generated_values_stay_within_the_range():
    made = predictor("generation")
    target = made.target(as_volume(smooth((12, 12, 12)), np.eye(4)))
    answer = scored(made, target, 3 * target.image.as_tensor() - 1)  # a network's output is not bounded
    low, high = made.context.output_range
    assert answer.min() == pytest.approx(low) and answer.max() == pytest.approx(high)


def test_nothing_is_lost_where_a_scans_slices_are_blank():
    # as in 2D-to-3D: every fourth slice is there, the first and the last are not
    voxels = np.zeros((14, 14, 15), np.float32)
    voxels[..., 3:13:4] = smooth((14, 14, 3))
    made = predictor(spacing=1.0)
    target = made.target(as_volume(voxels, np.eye(4)))
    answer = scored(made, target, torch.ones(2, *target.image.shape[1:]))
    assert torch.all(answer == VALUES[0])
