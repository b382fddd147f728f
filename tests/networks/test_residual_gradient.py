"""The residual unit's own backward pass against that of autograd."""

import pytest
import torch
import torch.nn.functional as F

from scripts.networks import streamed
from scripts.networks.blocks import ResidualUnit


@pytest.mark.parametrize("winograd_voxels", [0, 10**9])
@pytest.mark.parametrize("convs", [1, 2, 3])
@pytest.mark.parametrize(("channels", "size", "batch"), [(16, (8, 5, 6), 2), (5, (6, 3, 4), 1), (16, (4, 4, 4), 3)])
def test_gradients_equal_those_of_autograd(channels, size, batch, convs, winograd_voxels, monkeypatch):
    monkeypatch.setattr(streamed, "WINOGRAD_VOXELS", winograd_voxels)
    unit = ResidualUnit(channels, convs)
    x = torch.randn(batch, channels, *size, requires_grad=True)
    inputs = [x, *unit.parameters()]
    y = unit.convs[0](x)
    for conv in unit.convs[1:]:
        y = conv(F.gelu(y))
    plain = F.gelu(x + y)
    weight = torch.randn_like(plain)
    assert "ResidualGradient" in type(unit.before_gelu(x).grad_fn).__name__
    ours = torch.autograd.grad((unit(x) * weight).sum(), inputs)
    by_autograd = torch.autograd.grad((plain * weight).sum(), inputs)
    for a, b in zip(ours, by_autograd, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_an_input_without_gradient_is_none():
    unit = ResidualUnit(4)
    unit(torch.randn(1, 4, 4, 4, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unit.parameters())
