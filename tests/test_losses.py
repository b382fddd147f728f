from __future__ import annotations

import pytest
import torch

from scripts.losses import MaskImageLoss, SmoothL3L1Loss


def value(error, **options):
    return SmoothL3L1Loss(**options)(torch.tensor([float(error)]), torch.zeros(1)).item()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("error", "beta", "expected"),
    [
        (0.0, 1.0, 0.0),
        (0.5, 1.0, 0.333 * 0.125),
        (1.0, 1.0, 0.333),
        (3.0, 1.0, 2.333),
        (0.5, 2.0, 0.333 * 0.125 / 4),
        (3.0, 2.0, 3.0 + 0.333 * 8 - 2.0),
    ],
)
def test_values(error, beta, expected, sign):
    assert value(sign * error, beta=beta) == pytest.approx(expected, rel=1e-6)


def test_mean_and_weight():
    pred, target = torch.rand(2, 1, 4, 4, 4) * 4, torch.rand(2, 1, 4, 4, 4)
    single = torch.stack([torch.tensor(value(e)) for e in (pred - target).flatten()])
    torch.testing.assert_close(SmoothL3L1Loss()(pred, target), single.mean())
    torch.testing.assert_close(SmoothL3L1Loss(weight=50.0)(pred, target), 50 * single.mean())


def test_gradient_is_cubic_then_constant_and_finite():
    error = torch.tensor([0.0, 0.5, -0.5, 3.0, -1e6], requires_grad=True)
    SmoothL3L1Loss()(error, torch.zeros(5)).backward()
    expected = torch.tensor([0.0, 0.999 * 0.25, -0.999 * 0.25, 1.0, -1.0]) / 5
    torch.testing.assert_close(error.grad, expected)


def test_smaller_for_the_better_prediction():
    target = (torch.rand(1, 1, 4, 4, 4) > 0.5).float()
    loss = SmoothL3L1Loss()
    assert loss(target, target) == 0
    assert loss(0.9 * target, target) < loss(0.5 * target, target) < loss(1 - target, target)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 1, 4, 4, 4\) and \(1, 4, 4, 4\)"):
        SmoothL3L1Loss()(torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("beta", [0, -1.0])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be > 0, got"):
        SmoothL3L1Loss(beta=beta)


def mask():
    return (torch.rand(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.8).float()


def test_dice_counts_for_masks_and_absolute_error_for_images():
    target, pred = mask(), torch.full((2, 1, 6, 6, 6), 0.4)
    plain, both = SmoothL3L1Loss(weight=10.0), MaskImageLoss(weight=10.0, dice_weight=2.0, image_weight=3.0)
    overlap = [(2 * 0.4 * t.sum() + 1) / (0.4 * t.numel() + t.sum() + 1) for t in target]
    torch.testing.assert_close(both(pred, target), plain(pred, target) + 2 * (1 - torch.stack(overlap).mean()))
    image = 0.9 * target + 0.05
    absolute = 3 * (pred - image).abs().flatten(1).mean(1)
    torch.testing.assert_close(both(pred, image), plain(pred, image) + absolute.mean())
    mixed = torch.cat([target[:1], image[:1]])
    torch.testing.assert_close(both(pred, mixed), plain(pred, mixed) + (2 * (1 - overlap[0]) + absolute[0]) / 2)


def test_dice_of_right_and_of_empty_masks_is_zero():
    loss, empty = MaskImageLoss(), torch.zeros(1, 1, 6, 6, 6)
    assert loss(mask(), mask()) == 0
    assert loss(empty, empty) == 0
    assert loss(empty + 0.3, empty) > loss(empty + 0.1, empty) > 0


def test_dice_does_not_reward_outputs_beyond_a_mask():
    target = mask()
    loss = MaskImageLoss(weight=0.0)
    assert loss(3 * target - 1, target) == loss(target, target)


def test_dice_prefers_an_uncertain_structure_to_none():
    """Where a structure is at one of three places, the cubic loss leaves its values below the threshold."""
    places = torch.eye(3)[:, None, :, None, None]
    levels = [torch.full((3, 1, 3, 1, 1), level / 10) for level in range(11)]

    def best(loss):
        return min(range(11), key=lambda i: loss(levels[i], places).item()) / 10

    assert best(SmoothL3L1Loss()) < 0.5
    assert best(MaskImageLoss(dice_weight=1.0, weight=0.1)) > 0.5


def test_group_weight_counts_for_dice_too():
    target, pred = mask(), torch.full((2, 1, 6, 6, 6), 0.4)
    loss = MaskImageLoss()
    singles = torch.stack([loss(p[None], t[None]) for p, t in zip(pred, target, strict=True)])
    weight = torch.tensor([1.0, 0.25])
    torch.testing.assert_close(loss(pred, target, weight), (singles * weight).mean())
