"""Every task: what it changes, what a group shares, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import GaussianSmooth
from scipy.ndimage import label as connected

from scripts.data.preprocessing import Preprocessing
from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.data.tasks import (
    TASKS,
    BiasCorrection,
    GaussianDenoising,
    Inpainting,
    SaltPepperDenoising,
    SlicesToVolume,
    SuperResolution,
    find_task,
    perlin_noise,
)
from scripts.data.volumes import load_volume

CORRUPTIONS = [name for name, task in TASKS.items() if task.reads == "image"]
GRIDS = [(24, 24, 24), (16, 24, 40)]


def rng(seed=0):
    return np.random.default_rng(seed)


def clean_image(size=(24, 24, 24), seed=0):
    """A smooth body with some texture within [0.3, 1], and air (exactly 0) around it."""
    axes = [np.linspace(-1, 1, n) for n in size]
    depth = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    texture = GaussianSmooth(1.0)(torch.from_numpy(rng(seed).normal(size=(1, *size))).float())
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    return torch.where(torch.from_numpy(depth)[None] < 0.9, 0.3 + 0.7 * torch.as_tensor(texture), 0.0).float()


def arguments(task, size=(24, 24, 24), seed=0):
    """Image, other and a setting that the task can work with."""
    image = clean_image(size, seed)
    setting = task.setting(rng(seed))
    if task.reads == "label":
        return image, (image > 0.5).to(torch.uint8) + 2 * (image > 0.7).to(torch.uint8), setting | {"values": [1]}
    return image, 1 - image if task.reads == "output" else None, setting


def means_painted(labels, seed, noise=0.02):
    """Image of a label map: every label has a mean of its own, which depends on the seed."""
    values, index = labels.unique(return_inverse=True)
    means = torch.from_numpy(rng(seed).uniform(0.1, 1, len(values))).float()
    means[0] = 0
    image = means[index] + noise * torch.from_numpy(rng(seed + 1).normal(size=tuple(labels.shape))).float()
    return (image - image.min()) / (image.max() - image.min())


# --- all tasks


def test_the_tasks_have_their_names():
    assert set(TASKS) == {
        "segmentation",
        "modality_transfer",
        "bias_correction",
        "gaussian_denoising",
        "salt_pepper_denoising",
        "inpainting",
        "super_resolution",
        "2d_to_3d",
        "skull_stripping",
    }
    assert all(TASKS[name].name == name and find_task(name) is TASKS[name] for name in TASKS)
    assert [name for name, task in TASKS.items() if not task.generation] == ["segmentation"]
    assert {task.reads for task in TASKS.values()} == {"label", "output", "image"}


@pytest.mark.parametrize(
    ("typed", "meant"), [("inpaint", "inpainting"), ("2d-to-3d", "2d_to_3d"), ("superresolution", "super_resolution")]
)
def test_an_unknown_task_names_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown task '{typed}': did you mean {meant}"):
        find_task(typed)


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("name", TASKS)
def test_shapes_types_ranges_and_arguments_left_alone(name, size):
    task = TASKS[name]
    image, other, setting = arguments(task, size)
    before = image.clone(), None if other is None else other.clone(), json.dumps(setting)
    made = task(image, other, setting, rng())
    kinds = torch.float32, torch.float32 if task.generation else torch.uint8
    for volume, kind in zip(made, kinds, strict=True):
        assert volume.shape == (1, *size) and volume.dtype == kind and type(volume) is torch.Tensor
        assert volume.isfinite().all() and volume.min() >= 0 and volume.max() <= 1
    assert torch.equal(image, before[0]) and json.dumps(setting) == before[2]
    assert other is None or torch.equal(other, before[1])


@pytest.mark.parametrize("name", TASKS)
def test_meta_tensors_become_plain_ones(name):
    task = TASKS[name]
    image, other, setting = arguments(task)
    made = task(MetaTensor(image), None if other is None else MetaTensor(other), setting, rng())
    expected = task(image, other, setting, rng())
    for volume, same in zip(made, expected, strict=True):
        assert type(volume) is torch.Tensor and torch.equal(volume, same)


@pytest.mark.parametrize("name", TASKS)
def test_the_generator_alone_decides(name):
    task = TASKS[name]
    image, other, setting = arguments(task)
    torch.manual_seed(1)
    np.random.seed(1)
    first = task(image, other, setting, rng(5))
    torch.manual_seed(2)
    np.random.seed(2)
    second = task(image, other, setting, rng(5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert task.setting(rng(5)) == task.setting(rng(5))


@pytest.mark.parametrize("shape", [(24, 24, 24), (2, 24, 24, 24), (1, 24, 24), (1, 1, 24, 24, 24)])
@pytest.mark.parametrize("name", TASKS)
def test_images_of_other_shapes_are_refused(name, shape):
    image, setting = torch.zeros(shape), TASKS[name].setting(rng()) | {"values": [1]}
    with pytest.raises(ValueError, match=rf"{name}: the image must be \(1, H, W, D\), got"):
        TASKS[name](image, image, setting, rng())


@pytest.mark.parametrize("name", [n for n in TASKS if n not in CORRUPTIONS])
def test_what_a_task_reads_must_be_there_and_fit(name):
    image, other, setting = arguments(TASKS[name])
    with pytest.raises(ValueError, match=f"{name} needs a (label map|second image) besides the image, got None"):
        TASKS[name](image, None, setting, rng())
    with pytest.raises(ValueError, match=r"of the image's shape \(1, 24, 24, 24\), got \(1, 23, 24, 24\)"):
        TASKS[name](image, other[:, 1:], setting, rng())


# --- tasks whose output is in the data


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_segmentation_merges_the_values(kind):
    image = clean_image()
    label = torch.from_numpy(rng().integers(0, 5, image.shape)).to(kind)
    given, mask = TASKS["segmentation"](image, label, {"values": [1, 3]}, rng())
    assert torch.equal(given, image)
    assert torch.equal(mask, ((label == 1) | (label == 3)).float())


def test_a_value_beyond_the_label_map_s_type_is_just_not_there():
    image = clean_image()
    label = torch.full(image.shape, 2, dtype=torch.uint8)
    assert not TASKS["segmentation"](image, label, {"values": [258]}, rng())[1].any()


def test_skull_stripping_keeps_the_image_inside():
    image = clean_image()
    label = torch.from_numpy(rng().integers(0, 4, image.shape)).to(torch.int16)
    given, stripped = TASKS["skull_stripping"](image, label, {"values": [2, 3]}, rng())
    brain = label >= 2
    assert torch.equal(given, image)
    assert torch.equal(stripped[brain], image[brain]) and not stripped[~brain].any() and stripped.any()


@pytest.mark.parametrize("name", ["segmentation", "skull_stripping"])
def test_label_tasks_need_values(name):
    image, other, _ = arguments(TASKS[name])
    with pytest.raises(ValueError, match=f"{name}: the setting needs 'values'"):
        TASKS[name](image, other, {}, rng())
    with pytest.raises(ValueError, match=f"{name}: the setting's 'values' is empty"):
        TASKS[name](image, other, {"values": []}, rng())


@pytest.fixture(scope="module", params=["cohort", "brain"])
def label_map(request):
    if request.param == "cohort":
        return synthesize_cohort(0, 1, (32, 24, 32))[1][0].int()
    path = request.getfixturevalue("shared_dir") / "data" / "brain_label_maps" / "brain_01.nii.gz"
    return load_volume(path).as_tensor()[:, 4::8, 4::8, 4::8].int()


def test_modality_transfer_of_two_contrasts_of_one_anatomy(label_map):
    first, second = means_painted(label_map, 0), means_painted(label_map, 10)
    assert not torch.allclose(first, second, atol=0.05)
    given, wanted = TASKS["modality_transfer"](first, second, TASKS["modality_transfer"].setting(rng()), rng())
    assert torch.equal(given, first) and torch.equal(wanted, second)


def test_skull_stripping_of_a_label_map(label_map):
    image = means_painted(label_map, 0)
    values = [int(v) for v in label_map.unique() if 0 < v < 500]  # extra-cerebral tissue is numbered from 500
    _, stripped = TASKS["skull_stripping"](image, label_map, {"values": values}, rng())
    assert not stripped[(label_map == 0) | (label_map >= 500)].any()
    assert torch.equal(stripped[(label_map > 0) & (label_map < 500)], image[(label_map > 0) & (label_map < 500)])


# --- corruptions: what all have in common


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_input_is_spoilt_and_the_output_clean(name, size):
    task, image = TASKS[name], clean_image(size)
    for seed in range(5):
        corrupted, clean = task(image, None, task.setting(rng(seed)), rng(seed))
        assert torch.equal(clean, image)
        assert (corrupted - image).abs().mean() > 1e-3
        assert corrupted.min() == 0 and corrupted.max() == 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_settings_differ_between_groups_and_stay_in_their_ranges(name):
    task = TASKS[name]
    drawn = [task.setting(rng(seed)) for seed in range(200)]
    assert all(json.loads(json.dumps(setting)) == setting for setting in drawn)
    for key, (low, high) in task.ranges.items():
        values = np.array([setting[key] for setting in drawn])
        assert low <= values.min() and values.max() <= high
        if isinstance(low, int):
            assert set(values) == set(range(low, high + 1))
        else:  # uniform: mean and quartiles within four standard errors or so
            assert np.quantile(values, [0.25, 0.5, 0.75]) == pytest.approx(
                low + (high - low) * np.array([0.25, 0.5, 0.75]), abs=0.15 * (high - low)
            )


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("super_resolution", "2d_to_3d")])
def test_members_of_a_group_get_realisations_of_their_own(name):
    task, image = TASKS[name], clean_image()
    setting = task.setting(rng(0))
    first, second = (task(image, None, setting, rng(member))[0] for member in (1, 2))
    assert (first != second).float().mean() > 0.01


@pytest.mark.parametrize("name", ["super_resolution", "2d_to_3d"])
def test_members_of_a_group_lose_the_same_sampling(name):
    task, image = TASKS[name], clean_image()
    setting = task.setting(rng(0))
    first, second = (task(image, None, setting, rng(member))[0] for member in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_constant_images_give_finite_inputs(name, value):
    image = torch.full((1, 16, 16, 16), value)
    corrupted, clean = TASKS[name](image, None, TASKS[name].setting(rng()), rng())
    assert corrupted.isfinite().all() and torch.equal(clean, image)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_settings_out_of_range_are_refused(name):
    task, image = TASKS[name], clean_image()
    good = task.setting(rng())
    for key, (low, high) in task.limits.items():
        for bad in (low - 1, high + 1, float("nan"), "1", None, True):
            with pytest.raises(ValueError, match=f"{name}: the setting's {key} must be from"):
                task(image, None, good | {key: bad}, rng())
        with pytest.raises(ValueError, match=f"{name}: the setting needs '{key}'"):
            task(image, None, {k: v for k, v in good.items() if k != key}, rng())


@pytest.mark.parametrize(
    ("kind", "name", "bounds"),
    [
        (BiasCorrection, "strength", (-0.1, 0.2)),
        (BiasCorrection, "degree", (1, 2.5)),
        (BiasCorrection, "degree", (0, 2)),
        (GaussianDenoising, "sigma", (0.2, 0.1)),
        (GaussianDenoising, "sigma", 0.1),
        (GaussianDenoising, "sigma", (0.1, float("nan"))),
        (GaussianDenoising, "sigma", (0.1, 0.2, 0.3)),
        (GaussianDenoising, "sigma", ("0.1", "0.2")),
        (SaltPepperDenoising, "fraction", (0.1, 1.1)),
        (SaltPepperDenoising, "salt", (-1, 1)),
        (Inpainting, "fraction", (0.5, 1.0)),
        (Inpainting, "frequency", (0.0, 4.0)),
        (SuperResolution, "factor", (0.5, 2.0)),
        (SlicesToVolume, "every", (1, 4)),
        (SlicesToVolume, "axis", (0, 3)),
        (SlicesToVolume, "axis", (False, True)),
    ],
)
def test_severity_ranges_are_checked(kind, name, bounds):
    with pytest.raises(ValueError, match=f"{kind.name}: {name} must be two (whole )?numbers"):
        kind(**{name: bounds})


@pytest.mark.parametrize("value", [-0.1, 1.1, "1", None, float("nan")])
def test_isotropic_probability_is_checked(value):
    with pytest.raises(ValueError, match="isotropic_prob must be from 0 to 1"):
        SuperResolution(isotropic_prob=value)


def test_a_range_of_one_value_is_drawn_as_it_is():
    assert GaussianDenoising(sigma=[0.25, 0.25]).setting(rng()) == {"sigma": 0.25}
    assert SlicesToVolume(every=(4, 4), axis=(2, 2)).setting(rng()).items() >= {"every": 4, "axis": 2}.items()


# --- corruptions, one by one


def test_bias_field_is_smooth_positive_and_multiplicative():
    task, image = BiasCorrection(strength=(0.3, 0.3)), clean_image((32, 24, 32))
    corrupted, _ = task(image, None, task.setting(rng()), rng())
    body = image > 0
    assert not corrupted[~body].any()
    log_field = torch.where(body, (corrupted / image.clamp(min=0.1)).clamp(min=1e-6).log(), 0.0)
    inside = body[:, 1:] & body[:, :-1]
    steps = (log_field[:, 1:] - log_field[:, :-1])[inside].abs()
    assert log_field[body].std() > 0.05 and steps.max() < 0.5 * log_field[body].std() + 0.1
    image_steps = (image[:, 1:] - image[:, :-1])[inside].abs()
    assert steps.mean() < 0.5 * image_steps.mean(), "the texture is not in the field"


def test_bias_field_grows_with_its_strength():
    image, seeds = clean_image(), range(10)
    errors = [
        np.mean(
            [
                (BiasCorrection()(image, None, {"strength": s, "degree": 3}, rng(i))[0] - image).abs().mean()
                for i in seeds
            ]
        )
        for s in (0.05, 0.2, 0.8)
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_training_shows_the_scale_that_a_corrupted_file_gets(name):
    task, image = find_task(name), clean_image((32, 24, 32)).clamp(min=1e-6)
    setting = task.setting(rng(1))
    shown, _ = task(image, None, setting, rng(2))
    file = MetaTensor(task.corrupt(image, setting, rng(2)), affine=torch.eye(4))
    read = Preprocessing((32, 24, 32), 1.0).target(file)
    held = [side > file.min() for axis in (1, 2, 3) for side in (file.select(axis, 0), file.select(axis, -1))]
    if all(side.any() for side in held):  # else empty slices at the border were cropped
        assert torch.allclose(shown, read.as_tensor(), atol=1e-5)
    assert shown.min() == 0 and shown.max() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_padding_stays_empty_and_has_no_say(name):
    task, scan = find_task(name), clean_image((24, 20, 24)).clamp(min=1e-6)
    padded = torch.nn.functional.pad(scan, (4, 4, 0, 6, 2, 0))
    setting = task.setting(rng(1))
    alone, _ = task(scan, None, setting, rng(2))
    spoilt, clean = task(padded, None, setting, rng(2))
    assert torch.equal(spoilt[:, 2:, :20, 4:28], alone) and torch.equal(clean, padded)
    assert spoilt.sum() == pytest.approx(alone.sum().item(), rel=1e-5)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3])
def test_gaussian_noise_is_white_and_of_the_drawn_sigma(sigma):
    image = clean_image((32, 24, 32)).clamp(min=1e-6)  # no padding
    corrupted = GaussianDenoising().corrupt(image, {"sigma": sigma}, rng())
    noise = corrupted - image
    assert noise.std() == pytest.approx(sigma, rel=0.05)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(3, abs=0.2)
    for axis in (1, 2, 3):
        assert abs((noise * noise.roll(1, axis)).mean() / noise.var()) < 0.05


@pytest.mark.parametrize(("fraction", "salt"), [(0.02, 0.5), (0.15, 0.2), (0.15, 1.0), (0.15, 0.0)])
def test_salt_and_pepper_in_their_shares(fraction, salt):
    image = clean_image((32, 24, 32))
    image = torch.where(image > 0, 0.4 + image / 4, 0.2)  # no voxel is 0 or 1 of itself but these two
    image[0, 0, 0, 0], image[0, 0, 0, 1] = 0, 1
    corrupted = SaltPepperDenoising().corrupt(image, {"fraction": fraction, "salt": salt}, rng())
    hit = corrupted != image
    assert hit.float().mean() == pytest.approx(fraction, rel=0.15)
    assert (corrupted[hit] == 1).float().mean() == pytest.approx(salt, abs=0.05)
    assert ((corrupted[hit] == 0) | (corrupted[hit] == 1)).all()
    assert (hit & hit.roll(1, 1)).float().mean() == pytest.approx(fraction**2, abs=0.01), "single voxels"


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("fraction", [0.1, 0.35])
@pytest.mark.parametrize("frequency", [2.0, 8.0])
def test_holes_cover_what_was_drawn_and_are_blobs(size, fraction, frequency):
    image = clean_image(size)
    for seed in range(3):
        setting = {"fraction": fraction, "frequency": frequency}
        corrupted = Inpainting().corrupt(image, setting, rng(seed))
        hole = (corrupted == 0) & (image > 0)
        assert hole.sum() / (image > 0).sum() == pytest.approx(fraction, abs=0.01)
        kept = (image > 0) & ~hole
        assert torch.equal(corrupted[kept], image[kept]), "what is left is the image"
        scattered = (image > 0) & (torch.from_numpy(rng(seed).random(tuple(image.shape))) < fraction)
        assert connected(hole[0].numpy())[1] < 0.1 * connected(scattered[0].numpy())[1]
        assert surface(hole) < 0.6 * surface(scattered)


def surface(mask):
    """Faces between the mask and the rest, per voxel of the mask."""
    return sum((mask != mask.roll(1, axis)).sum() for axis in (1, 2, 3)) / mask.sum()


def test_a_higher_frequency_makes_smaller_holes():
    image = torch.ones(1, 32, 32, 32)
    image[0, 0, 0, 0] = 0
    roughness = [
        np.mean(
            [surface(Inpainting().corrupt(image, {"fraction": 0.2, "frequency": f}, rng(i)) == 0) for i in range(5)]
        )
        for f in (1.0, 3.0, 8.0)
    ]
    assert roughness[0] < roughness[1] < roughness[2]


def test_nothing_to_hide_is_nothing_hidden():
    image = clean_image()
    assert torch.equal(Inpainting().corrupt(image, {"fraction": 0.0, "frequency": 4.0}, rng()), image)


def high_frequency_share(volume, axis):
    """Share of the power above a quarter of the sampling rate along an axis, the mean left out."""
    power = torch.fft.rfft(volume[0] - volume.mean(), dim=axis).abs().square()
    power = power.movedim(axis, 0).flatten(1).sum(1)
    return (power[len(power) // 2 :].sum() / power.sum()).item()


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 1, 2]])
@pytest.mark.parametrize("factor", [2.0, 3.3, 4.0])
def test_detail_is_lost_along_the_coarse_axes_only(size, axes, factor):
    image = torch.from_numpy(rng().random((1, *size))).float()
    corrupted = SuperResolution().corrupt(image, {"factor": factor, "axes": axes}, rng())
    for axis in range(3):
        before, after = high_frequency_share(image, axis), high_frequency_share(corrupted, axis)
        assert after < 0.4 * before if axis in axes else after > 0.8 * before


def test_low_resolution_stays_in_place():
    image = torch.zeros(1, 24, 24, 24)
    image[0, 8:16, 8:16, 8:16] = 1
    corrupted = SuperResolution().corrupt(image, {"factor": 4.0, "axes": [0, 1, 2]}, rng())
    assert torch.allclose(corrupted, corrupted.flip(1, 2, 3), atol=1e-5)


def test_one_axis_or_all():
    drawn = [tuple(SuperResolution().setting(rng(seed))["axes"]) for seed in range(400)]
    assert set(drawn) == {(0,), (1,), (2,), (0, 1, 2)}
    assert drawn.count((0, 1, 2)) / 400 == pytest.approx(0.25, abs=0.09)
    assert SuperResolution(isotropic_prob=1).setting(rng())["axes"] == [0, 1, 2]
    assert len(SuperResolution(isotropic_prob=0).setting(rng())["axes"]) == 1


@pytest.mark.parametrize("axes", [[], [3], [-1], [0, 5], None])
def test_coarse_axes_must_be_axes(axes):
    with pytest.raises(ValueError, match="super_resolution: the setting's axes must be some of 0, 1, 2"):
        SuperResolution()(clean_image(), None, {"factor": 2.0, "axes": axes}, rng())


@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize(("axis", "every", "offset"), [(0, 2, 1), (1, 5, 0), (2, 16, 15)])
def test_every_kth_slice_is_kept(size, axis, every, offset):
    image = torch.from_numpy(rng().random((1, *size))).float()
    setting = {"axis": axis, "every": every, "offset": offset}
    sparse = SlicesToVolume().corrupt(image, setting, rng()).movedim(axis + 1, 0)
    slices = image.movedim(axis + 1, 0)
    kept = torch.arange(len(slices)) % every == offset
    assert torch.equal(sparse[kept], slices[kept])
    assert not sparse[~kept].any() and kept.any()


def test_the_first_slice_is_drawn_too():
    drawn = [SlicesToVolume(every=(3, 3)).setting(rng(seed)) for seed in range(60)]
    assert {setting["offset"] for setting in drawn} == {0, 1, 2}


@pytest.mark.parametrize("offset", [-1, 4, 1.0, None])
def test_the_first_slice_must_lie_within_the_first_k(offset):
    with pytest.raises(ValueError, match="2d_to_3d: the setting's offset must be from 0 to 3"):
        SlicesToVolume()(clean_image(), None, {"axis": 0, "every": 4, "offset": offset}, rng())


# --- Perlin noise


def test_perlin_noise_by_its_definition():
    size, cell = (5, 7, 4), 3.0
    drawn = rng(3)
    starts = []
    for n in size:
        starts.append((np.arange(n) + 0.5) / cell + drawn.random())
    nodes = [int(start[-1]) + 2 for start in starts]
    directions = drawn.standard_normal((3, *nodes), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    expected = np.zeros(size)
    for voxel in np.ndindex(*size):
        place = np.array([starts[axis][voxel[axis]] for axis in range(3)])
        for corner in np.ndindex(2, 2, 2):  # the eight nodes of the voxel's cell
            node = np.floor(place).astype(int) + corner
            near = 1 - np.abs(place - node)
            expected[voxel] += directions[:, *node] @ (place - node) * np.prod(3 * near**2 - 2 * near**3)
    assert perlin_noise(size, cell, rng(3)) == pytest.approx(expected, abs=1e-5)


def test_perlin_noise_is_balanced_bounded_and_smooth():
    noise = np.stack([perlin_noise((32, 24, 40), 8.0, rng(seed)) for seed in range(8)])
    assert noise.shape == (8, 32, 24, 40) and noise.dtype == np.float32
    assert abs(noise.mean()) < 0.05 and 0.1 < noise.std() and np.abs(noise).max() < 1
    steps = [np.abs(np.diff(noise, axis=axis)).mean() for axis in (1, 2, 3)]
    assert max(steps) < 0.3 * noise.std()
    assert max(steps) < 1.3 * min(steps), "as smooth along every axis, also of a grid that is no cube"
