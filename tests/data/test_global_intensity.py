from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts.data.global_intensity import GlobalIntensityNonlinear
from scripts.data.synthesis.cohort import synthesize_cohort

gin = GlobalIntensityNonlinear(unit_range=False)


@pytest.fixture(scope="module")
def images():
    return synthesize_cohort(5, 3, 16)[0]


def norms(images):
    return images.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 2**63 - 2])
def test_keeps_norm_shape_and_type(images, seed):
    shown = gin(images, seed)
    assert shown.shape == images.shape and shown.dtype == images.dtype and type(shown) is torch.Tensor
    assert shown.isfinite().all() and not shown.requires_grad
    assert torch.allclose(norms(shown), norms(images), rtol=1e-4)
    assert not torch.allclose(shown, images, atol=0.01)


def test_one_network_for_all_members(images):
    shown = gin(images, 7)
    for member in range(3):
        assert torch.allclose(gin(images[member : member + 1], 7), shown[member : member + 1], atol=1e-6)
    equal = gin(images[:1].repeat(3, 1, 1, 1, 1), 7)
    assert torch.equal(equal[0], equal[1]) and torch.equal(equal[0], equal[2])


def test_a_seed_is_a_network(images):
    shown = [gin(images, seed) for seed in (3, 3, 4, 5)]
    assert torch.equal(shown[0], shown[1])
    assert not torch.allclose(shown[0], shown[2], atol=0.01) and not torch.allclose(shown[2], shown[3], atol=0.01)


def test_contrast_changes_in_many_ways(images):
    """Over seeds some contrasts are inverted and others are not."""
    signs = {
        torch.corrcoef(torch.stack((gin(images, seed)[0].flatten(), images[0].flatten())))[0, 1].sign().item()
        for seed in range(20)
    }
    assert signs == {-1.0, 1.0}


def test_kernels_of_one_voxel_make_a_curve_of_intensity():
    image = torch.linspace(0, 1, 64).repeat(8).reshape(1, 1, 8, 8, 8)
    shown = GlobalIntensityNonlinear(kernel_sizes=(1,), unit_range=False)(image, 1).reshape(8, 64)
    assert torch.allclose(shown, shown[:1].expand_as(shown), atol=1e-5)


def test_kernel_sizes_are_drawn_per_layer(images, monkeypatch):
    convolve, sizes, batches = F.conv3d, [], []

    def record(x, weight, *args, **kwargs):
        sizes.append(weight.shape[2])
        batches.append(len(x))
        assert weight.shape[:2] in {(10, 1), (10, 10), (1, 10)}
        return convolve(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv3d", record)
    for seed in range(20):
        gin(images[:2], seed)
    assert len(sizes) == 20 * 2 * 4 and set(batches) == {1}  # one member at a time
    per_network = {tuple(sizes[i : i + 4]) for i in range(0, len(sizes), 8)}
    assert set(sizes) == {1, 3} and len(per_network) > 5


def test_alpha_weighs_the_network(images):
    assert torch.allclose(GlobalIntensityNonlinear(alpha=(0, 0), unit_range=False)(images, 1), images, atol=1e-6)
    network = GlobalIntensityNonlinear(alpha=(1, 1), unit_range=False)(images, 1)
    half = GlobalIntensityNonlinear(alpha=(0.5, 0.5), unit_range=False)(images, 1)
    assert (half - images).norm() > 0 and (network - images).norm() > (half - images).norm()


def test_alpha_lies_in_its_range():
    drawn = [gin._draw(seed, torch.device("cpu"))[1] for seed in range(100)]
    assert 0.7 <= min(drawn) < 0.73 and 0.97 < max(drawn) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(images, dtype):
    shown = gin(images.to(dtype), 3)
    assert shown.dtype == dtype and shown.isfinite().all()
    assert torch.allclose(shown.float(), gin(images, 3), atol=0.05)


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-20])
def test_flat_images_stay_finite(value):
    shown = gin(torch.full((2, 1, 6, 7, 8), value), 3)
    assert shown.isfinite().all() and shown.shape == (2, 1, 6, 7, 8)
    assert value != 0 or not shown.any()


def test_leaves_arguments_gradients_and_random_state_alone(images):
    source = images.clone().requires_grad_()
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    shown = gin(source, 1)
    assert torch.equal(source, images) and not shown.requires_grad
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_network_on_the_gpu(images):
    shown = gin(images.cuda(), 3)
    assert shown.device.type == "cuda" and torch.allclose(shown.cpu(), gin(images, 3), atol=0.01)


@pytest.mark.parametrize("bad", [torch.zeros(1, 8, 8, 8), torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8).int()])
def test_refuses_other_tensors(bad):
    with pytest.raises(ValueError, match=r"images must be \(N, 1, H, W, D\)"):
        gin(bad, 0)


def test_refuses_the_seed_of_no_gin(images):
    with pytest.raises(ValueError, match="seed must not be negative"):
        gin(images, -1)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"layers": 0}, "layers"),
        ({"channels": 0}, "channels"),
        ({"kernel_sizes": (1, 2)}, "kernel_sizes"),
        ({"kernel_sizes": ()}, "kernel_sizes"),
        ({"alpha": (0.7, 1.1)}, "alpha"),
        ({"alpha": (0.9, 0.7)}, "alpha"),
        ({"alpha": (-0.1, 0.7)}, "alpha"),
    ],
)
def test_refuses_bad_settings(kwargs, name):
    with pytest.raises(ValueError, match=name):
        GlobalIntensityNonlinear(**kwargs)


@pytest.mark.parametrize("seed", range(5))
def test_answers_have_the_range_of_all_inputs(seed):
    images = torch.rand(3, 1, 12, 12, 12)
    shown, free = GlobalIntensityNonlinear()(images, seed), gin(images, seed)
    for member, plain in zip(shown, free, strict=True):
        assert (member.min(), member.max()) == (0, pytest.approx(1))
        assert torch.allclose(member, (plain - plain.min()) / (plain.max() - plain.min()), atol=1e-5)
