from __future__ import annotations

import inspect
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_erosion

from scripts.data import augmentation
from scripts.data.augmentation import NO_GIN, GroupAugmentation
from scripts.data.synthesis.cohort import synthesize_cohort

DEFAULTS = {
    "flip_prob": 0.1,
    "rotate90_prob": 0.1,
    "member_rotate90_prob": 0.0,
    "low_resolution_prob": 0.15,
    "shift_prob": 0.2,
    "scale_prob": 0.2,
    "noise_prob": 0.1,
    "elastic_prob": 0.05,
    "image_invert_prob": 0.05,
    "label_invert_prob": 0.05,
    "sobel_prob": 0.05,
    "morphology_prob": 0.05,
    "gin_prob": 0.05,
}
MASK_ONLY = ("label_invert_prob", "sobel_prob", "morphology_prob")
GEOMETRY = ("flip_prob", "rotate90_prob", "low_resolution_prob", "elastic_prob")
SHARED = {name: 1.0 for name in DEFAULTS if name not in ("noise_prob", "member_rotate90_prob")}


def only(**probabilities):
    return GroupAugmentation(**(dict.fromkeys(DEFAULTS, 0.0) | probabilities))


def applied(augment, image, label, seed=0, generation=False):
    return augment(image, label, generation, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def group():
    """Three subjects: image, and a mask of two of their structures."""
    images, labels, _ = synthesize_cohort(11, 3, 32)
    return images, ((labels == 1) | (labels == 2)).float()


@pytest.fixture(scope="module")
def small():
    """Two members of 8³ without any symmetry."""
    image = torch.rand((2, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    label = torch.zeros_like(image)
    label[:, :, 1:5, 2:7, 3:8] = 1
    return image, label


def ball(size=24, radius=7.0):
    axes = torch.meshgrid(*(torch.arange(size) - size / 2 + 0.3,) * 3, indexing="ij")
    return (sum(axis**2 for axis in axes) < radius**2).float()[None, None]


def ramps(size):
    """Voxel coordinates as a group (3, 1, *size)."""
    return torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij")).unsqueeze(1)


def dice(a, b):
    return (2 * (a * b).sum() / (a.sum() + b.sum())).item()


# --- the interface


def test_defaults_are_those_of_the_recipe():
    parameters = inspect.signature(GroupAugmentation).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == DEFAULTS


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_refuses_what_is_no_probability(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a number from 0 to 1, got"):
        GroupAugmentation(**{name: value})


@pytest.mark.parametrize(
    ("image", "label"),
    [((2, 1, 8, 8, 8), (2, 1, 8, 8, 7)), ((2, 8, 8, 8), (2, 8, 8, 8)), ((2, 2, 8, 8, 8), (2, 2, 8, 8, 8))],
)
def test_refuses_what_is_no_group(image, label):
    with pytest.raises(ValueError, match="must both be"):
        applied(GroupAugmentation(), torch.zeros(image), torch.zeros(label))


@pytest.mark.parametrize("generation", [False, True])
def test_without_probability_nothing_changes(group, generation):
    for seed in range(20):
        image, label, gin_seed = applied(only(), *group, seed, generation)
        assert torch.equal(image, group[0]) and torch.equal(label, group[1]) and gin_seed == NO_GIN == -1


@pytest.mark.parametrize("generation", [False, True])
def test_same_state_same_group(small, generation):
    augment = GroupAugmentation(**dict.fromkeys(DEFAULTS, 0.5))
    results = []
    for seed in (0, 0, 1, 2):
        torch.rand(1)
        np.random.rand()
        results.append(applied(augment, *small, seed, generation))
    first, again, *others = results
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]
    assert all(not torch.equal(first[0], other[0]) for other in others)


def test_global_random_state_is_neither_used_nor_touched(small):
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    applied(GroupAugmentation(**dict.fromkeys(DEFAULTS, 1.0)), *small)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.parametrize("generation", [False, True])
def test_arguments_are_not_written_to_and_results_are_plain(small, generation):
    copies = [volume.clone() for volume in small]
    for name in DEFAULTS:
        image, label, _ = applied(only(**{name: 1.0}), *small, 0, generation)
        assert torch.equal(small[0], copies[0]) and torch.equal(small[1], copies[1]), name
        assert type(image) is type(label) is torch.Tensor, name
        assert image.dtype == label.dtype == torch.float32 and image.shape == label.shape == small[0].shape, name


@pytest.mark.parametrize("name", DEFAULTS)
def test_masks_of_bytes_change_as_those_of_floats_do(small, name):
    image, label = small
    for seed in range(3):
        expected = applied(only(**{name: 1.0}), image, label, seed)
        found = applied(only(**{name: 1.0}), image, label.to(torch.uint8), seed)
        assert found[1].dtype == torch.uint8
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1].float(), expected[1])


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(*(st.integers(6, 12),) * 3),
    members=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.001, 0.02, 0.5, 0.995, 1.0]),
    probability=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_masks_stay_binary_and_keep_their_foreground(size, members, density, probability, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((members, 1, *size), generator=generator)
    label = (torch.rand((members, 1, *size), generator=generator) < density).float()
    augment = GroupAugmentation(**dict.fromkeys(DEFAULTS, probability))
    new_image, new_label, _ = applied(augment, image, label, seed)
    assert new_image.isfinite().all() and new_image.shape == new_label.shape == image.shape
    assert set(new_label.unique().tolist()) <= {0.0, 1.0}
    had, has = (masks.flatten(1).any(dim=1) for masks in (label, new_label))
    assert (has | ~had).all()


# --- one draw for all members


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (24, 32, 24)])
def test_equal_members_stay_equal(group, generation, size):
    image, label = (volume[:1, :, : size[0], : size[1], : size[2]].repeat(3, 1, 1, 1, 1) for volume in group)
    for seed in range(3):
        for result in applied(only(**SHARED), image, label, seed, generation)[:2]:
            assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])


def test_a_member_does_not_depend_on_the_others(group):
    together = applied(only(**SHARED), *group, 4)
    alone = applied(only(**SHARED), group[0][1:2], group[1][1:2], 4)
    assert torch.allclose(together[0][1:2], alone[0], atol=1e-6) and torch.equal(together[1][1:2], alone[1])
    assert together[2] == alone[2]


# --- how often


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", DEFAULTS)
def test_happens_as_often_as_asked(small, name, generation):
    probability, runs = 0.4, 120
    expected = {
        "flip_prob": 1 - 0.6**3,
        "rotate90_prob": 1 - 0.6**3,
        "member_rotate90_prob": 1 - 0.6**2,
        "noise_prob": 1 - 0.6 * 0.8 * 0.9 if generation else probability,
    }.get(name, 0.0 if generation and name in MASK_ONLY else probability)
    augment, changed = only(**{name: probability}), 0
    for seed in range(runs):
        image, label, gin_seed = applied(augment, *small, seed, generation)
        changed += not (torch.equal(image, small[0]) and torch.equal(label, small[1]) and gin_seed == NO_GIN)
    assert abs(changed / runs - expected) <= 4 * (expected * (1 - expected) / runs) ** 0.5


# --- each alone


def test_flips_every_axis_on_its_own(small):
    image, label, gin_seed = applied(only(flip_prob=1.0), *small)
    assert torch.equal(image, small[0].flip(2, 3, 4)) and torch.equal(label, small[1].flip(2, 3, 4))
    assert gin_seed == NO_GIN
    seen = set()
    for seed in range(60):
        image = applied(only(flip_prob=0.5), *small, seed)[0]
        for axes in product((0, 1), repeat=3):
            if torch.equal(image, small[0].flip([2 + i for i in range(3) if axes[i]])):
                seen.add(axes)
    assert len(seen) == 8


def test_turns_by_right_angles(small):
    """Whatever the turns: distances from the grid's centre and the values stay, image and label go together."""
    centred = ramps((8, 8, 8)) - 3.5
    distance = centred.norm(dim=0, keepdim=True).expand(2, -1, -1, -1, -1)
    results = {}
    for seed in range(30):
        image, moved, _ = applied(only(rotate90_prob=1.0), small[0], small[0], seed)
        assert torch.equal(image, moved)
        kept = applied(only(rotate90_prob=1.0), distance, distance, seed)[0]
        assert torch.equal(kept, distance)
        results[image.numpy().tobytes()] = image
    assert len(results) > 10
    for image in results.values():
        assert torch.equal(image.flatten().sort().values, small[0].flatten().sort().values)


def test_turns_only_planes_with_equal_sides():
    image = torch.rand(2, 1, 10, 6, 10)
    augment = only(rotate90_prob=1.0)
    for seed in range(10):
        turned = applied(augment, image, image, seed)[0]
        assert any(torch.equal(turned, torch.rot90(image, k, (2, 4))) for k in (1, 2, 3))
    image = torch.rand(2, 1, 10, 6, 8)
    for augment in (only(rotate90_prob=1.0), only(member_rotate90_prob=1.0)):
        assert torch.equal(applied(augment, image, image)[0], image)


def test_turns_members_apart():
    volume = torch.rand(1, 1, 8, 8, 8)
    image = volume.repeat(4, 1, 1, 1, 1)
    turns = [torch.rot90(volume[0, 0], k, plane) for plane in ((0, 1), (0, 2), (1, 2)) for k in (1, 2, 3)]
    apart = 0
    for seed in range(10):
        turned, label, _ = applied(only(member_rotate90_prob=1.0), image, image, seed)
        assert torch.equal(turned, label)
        for member in turned[:, 0]:
            assert any(torch.equal(member, turn) for turn in turns)
        apart += any(not torch.equal(turned[0], other) for other in turned[1:])
    assert apart >= 9


@pytest.mark.parametrize("generation", [False, True])
def test_low_resolution_is_of_one_axis(generation):
    stripes = ramps((24, 16, 20)) % 2  # member i alternates along axis i
    label = stripes if generation else (ramps((24, 16, 20)) % 5 > 1).float()
    seen = set()
    for seed in range(30):
        image, coarse, _ = applied(only(low_resolution_prob=1.0), stripes, label, seed, generation)
        (axis,) = (i for i in range(3) if not torch.allclose(image[i], stripes[i], atol=1e-5))
        seen.add(axis)
        others = [i for i in range(3) if i != axis]
        assert torch.allclose(coarse[others], label[others], atol=1e-5)
        assert not torch.allclose(coarse[axis], label[axis], atol=1e-5)
        assert image[axis].diff(dim=1 + axis).abs().mean() < 0.5  # 1 before
        assert generation or coarse.unique().tolist() == [0, 1]
    assert seen == {0, 1, 2}


def test_low_resolution_is_by_two_to_four():
    mask = (torch.rand((2, 1, 24, 24, 24), generator=torch.Generator().manual_seed(1)) < 0.3).float()
    seen = set()
    for seed in range(40):
        label = applied(only(low_resolution_prob=1.0), mask, mask, seed)[1]
        slices = [1 + label.diff(dim=axis).movedim(axis, 0).flatten(1).any(dim=1).sum().item() for axis in (2, 3, 4)]
        assert sorted(slices)[1:] == [24, 24]
        seen.add(min(slices))
    assert seen == {12, 8, 6}


def test_low_resolution_keeps_image_and_label_together(group):
    for seed in range(6):
        image, label, _ = applied(only(low_resolution_prob=1.0), group[1], group[1], seed)
        assert dice((image > 0.5).float(), label) > 0.95
        image, label, _ = applied(only(low_resolution_prob=1.0), *(group[0],) * 2, seed, True)
        assert torch.equal(image, label)


@pytest.mark.parametrize("generation", [False, True])
def test_shift_adds_one_number(group, generation):
    shifts = []
    for seed in range(40):
        image, label, _ = applied(only(shift_prob=1.0), *group, seed, generation)
        shift = (image - group[0]).mean()
        assert torch.allclose(image - group[0], shift, atol=1e-5)
        assert torch.allclose(label, group[1] + shift * generation, atol=1e-5)
        shifts.append(shift.item())
    assert -0.2 <= min(shifts) < -0.15 and 0.15 < max(shifts) <= 0.2


@pytest.mark.parametrize("generation", [False, True])
def test_scale_multiplies_by_one_number(group, generation):
    factors = []
    for seed in range(40):
        image, label, _ = applied(only(scale_prob=1.0), *group, seed, generation)
        factor = image.sum() / group[0].sum()
        assert torch.allclose(image, group[0] * factor, atol=1e-5)
        assert torch.allclose(label, group[1] * (factor if generation else 1), atol=1e-5)
        factors.append(factor.item())
    assert 0.9 <= min(factors) < 0.93 and 1.07 < max(factors) <= 1.1


def test_noise_of_segmentation(group):
    strengths = []
    for seed in range(40):
        image, label, _ = applied(only(noise_prob=1.0), *group, seed)
        noise = (image - group[0]).flatten(1)
        assert torch.equal(label, group[1])
        assert torch.allclose(noise.std(dim=1), noise.std(), rtol=0.05)  # one strength
        assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.05  # but noise of their own
        strengths.append(noise.std().item())
    assert 0.015 < max(strengths) < 0.0205


def test_noise_of_generation_has_three_tiers(small, monkeypatch):
    drawn = []
    monkeypatch.setattr(augmentation, "_add_noise", lambda image, std, rng: drawn.append(std) or image)
    runs = 1500
    for seed in range(runs):
        applied(GroupAugmentation(**(dict.fromkeys(DEFAULTS, 0.0) | {"noise_prob": 1.0})), *small, seed, True)
    assert len(drawn) / runs == pytest.approx(1.75, abs=0.06)
    for above, expected in ((0.025, 0.5 / 2 + 0.25 * 2 / 3), (0.05, 0.25 / 3)):
        assert sum(std > above for std in drawn) / runs == pytest.approx(expected, abs=0.05)
    assert max(drawn) <= 0.075


def test_noise_of_generation_is_on_the_input_alone(group):
    for seed in range(5):
        image, label, _ = applied(only(noise_prob=1.0), *group, seed, True)
        assert not torch.equal(image, group[0]) and torch.equal(label, group[1])


def test_noise_is_new_to_every_member_even_of_equal_ones(small):
    image = small[0][:1].repeat(2, 1, 1, 1, 1)
    noisy = applied(only(noise_prob=1.0), image, small[1])[0]
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize("generation", [False, True])
def test_inverts_the_image_alone(group, generation):
    image, label, gin_seed = applied(only(image_invert_prob=1.0), *group, 0, generation)
    assert torch.equal(image, 1 - group[0]) and torch.equal(label, group[1]) and gin_seed == NO_GIN


def test_inverts_a_mask(group):
    image, label, _ = applied(only(label_invert_prob=1.0), *group)
    assert torch.equal(label, 1 - group[1]) and torch.equal(image, group[0])


@pytest.mark.parametrize("name", MASK_ONLY)
def test_output_images_are_not_treated_as_masks(group, name):
    image, label, _ = applied(only(**{name: 1.0}), *group, 0, True)
    assert torch.equal(image, group[0]) and torch.equal(label, group[1])


def test_edges_lie_on_both_sides_of_the_border(group):
    masks = torch.cat((ball(32, 9.0), group[1]))
    image, edges, _ = applied(only(sobel_prob=1.0), torch.zeros_like(masks), masks)
    assert edges.unique().tolist() == [0, 1] and not image.any()
    for mask, edge in zip(masks[:, 0].bool().numpy(), edges[:, 0].bool().numpy(), strict=True):
        box = np.ones((3, 3, 3))
        near = binary_dilation(mask, box) & ~binary_erosion(mask, box, border_value=1)
        assert not (edge & ~near).any()
        cross = near & (binary_dilation(mask) & ~binary_erosion(mask, border_value=1))
        assert (edge & cross).sum() > 0.9 * cross.sum()
        assert (edge & mask).any() and (edge & ~mask).any()


def test_dilates_or_erodes_by_a_voxel(group):
    box, seen = np.ones((3, 3, 3)), set()
    for seed in range(12):
        image, label, _ = applied(only(morphology_prob=1.0), *group, seed)
        grown = np.stack([binary_dilation(mask, box) for mask in group[1][:, 0].numpy()])
        shrunk = np.stack([binary_erosion(mask, box, border_value=1) for mask in group[1][:, 0].numpy()])
        grew, shrank = (np.array_equal(label[:, 0].numpy(), wanted) for wanted in (grown, shrunk))
        assert grew or shrank
        assert torch.equal(image, group[0])
        seen.add(grew)
    assert seen == {True, False}


def test_gin_is_a_seed(group):
    seeds = set()
    for seed in range(30):
        image, label, gin_seed = applied(only(gin_prob=1.0), *group, seed)
        assert torch.equal(image, group[0]) and torch.equal(label, group[1])
        assert isinstance(gin_seed, int) and 0 <= gin_seed < 2**63
        assert torch.tensor(gin_seed).item() == gin_seed
        seeds.add(gin_seed)
    assert len(seeds) == 30


# --- elastic


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 32, 32), (24, 40, 32)])
@pytest.mark.parametrize("generation", [False, True])
def test_deforms_without_folding(size, generation):
    where = torch.cat((ramps(size), torch.ones((1, 1, *size))))
    for seed in range(8):
        moved = applied(only(elastic_prob=1.0), where, torch.ones_like(where), seed, generation)[0]
        inside = moved[3, 0, :-1, :-1, :-1] > 0.999  # interpolated from voxels of the grid alone
        inside &= (moved[3, 0, 1:, :-1, :-1] > 0.999) & (moved[3, 0, :-1, 1:, :-1] > 0.999)
        inside &= moved[3, 0, :-1, :-1, 1:] > 0.999
        jacobian = torch.stack(
            [moved[:3, 0].diff(dim=1 + i)[:, : size[0] - 1, : size[1] - 1, : size[2] - 1] for i in range(3)]
        )
        determinants = torch.linalg.det(jacobian.permute(2, 3, 4, 0, 1))[inside]
        assert inside.float().mean() > 0.3
        assert determinants.min() > 0.2 and determinants.max() < 3
        assert not torch.allclose(moved, where, atol=0.1)


def test_deforms_every_grid_by_about_the_same_share(monkeypatch):
    monkeypatch.setattr(augmentation, "_ELASTIC_ROTATION", 0.0)
    monkeypatch.setattr(augmentation, "_ELASTIC_SCALE_GENERATION", 0.0)
    shares = []
    for size in ((16,) * 3, (32,) * 3, (48,) * 3, (24, 40, 32)):
        coordinates, middle = ramps(size), tuple(slice(n // 4, n - n // 4) for n in size)
        squares = []
        for seed in range(4):
            moved = applied(only(elastic_prob=1.0), coordinates, coordinates, seed, True)[0]
            squares.append((moved - coordinates)[:, 0][(slice(None), *middle)].square().mean())
        shares.append((torch.stack(squares).mean().sqrt() / np.prod(size) ** (1 / 3)).item())
    assert all(0.002 < share < 0.01 for share in shares)  # 0.25 to 1.3 voxels of 128


def test_elastic_keeps_image_and_label_together(group):
    for seed in range(8):
        image, label, _ = applied(only(elastic_prob=1.0), group[1], group[1], seed)
        assert label.unique().tolist() == [0, 1]
        assert dice((image > 0.5).float(), label) > 0.9
        assert dice(label, group[1]) < 0.98
        image, label, _ = applied(only(elastic_prob=1.0), *(group[0],) * 2, seed, True)
        assert torch.equal(image, label)


def test_elastic_scales_generation_less(monkeypatch):
    monkeypatch.setattr(augmentation, "_ELASTIC_ROTATION", 0.0)
    widths = {}
    for generation in (False, True):
        volumes = [
            applied(only(elastic_prob=1.0), ball(), ball(), seed, generation)[1].sum() / ball().sum()
            for seed in range(30)
        ]
        widths[generation] = torch.stack(volumes).log().std()
    assert widths[False] > 1.4 * widths[True]


# --- what would empty a mask is not done to any member


def test_erosion_spares_a_group_with_a_thin_member():
    masks = torch.cat((ball(), torch.zeros_like(ball()), ball()))
    masks[1, 0, 5, 5, 5:9] = 1
    outcomes = set()
    for seed in range(12):
        label = applied(only(morphology_prob=1.0), masks, masks, seed)[1]
        outcomes.add("kept" if torch.equal(label, masks) else "grown")
        assert (label >= masks).all()
    assert outcomes == {"kept", "grown"}


def test_a_full_mask_is_neither_inverted_nor_outlined():
    masks = torch.cat((ball(), torch.ones_like(ball())))
    for name in ("label_invert_prob", "sobel_prob"):
        assert torch.equal(applied(only(**{name: 1.0}), masks, masks)[1], masks)


def test_single_voxels_survive_low_resolution_and_deformation():
    masks = torch.zeros(2, 1, 16, 16, 16)
    masks[0, 0, 0, 0, 0] = masks[1, 0, 7, 8, 9] = 1
    for name in ("low_resolution_prob", "elastic_prob"):
        spared = 0
        for seed in range(20):
            image, label, _ = applied(only(**{name: 1.0}), masks, masks, seed)
            assert label.flatten(1).any(dim=1).all()
            spared += torch.equal(label, masks) and torch.equal(image, masks)
        assert spared


def test_an_empty_member_does_not_stop_the_others():
    masks = torch.cat((ball(), torch.zeros_like(ball())))
    for name in ("sobel_prob", "morphology_prob", "elastic_prob", "low_resolution_prob"):
        label = applied(only(**{name: 1.0}), masks, masks, 3)[1]
        assert not torch.equal(label[0], masks[0]) and not label[1].any()
