from __future__ import annotations

import pytest
import torch

from scripts.losses import SmoothL3L1Loss


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
