"""The 3³ convolution with fewer multiplications computes the same sums."""

import pytest
import torch
import torch.nn.functional as F

from scripts.networks.winograd import ROWS, winograd_conv, winograd_weights


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("rows", "width", "depth"), [(4, 6, 5), (8, 3, 7), (12, 1, 4)])
@pytest.mark.parametrize("channels", [(3, 5), (16, 16)])
def test_equals_the_plain_convolution(count, rows, width, depth, channels):
    entering, leaving = channels
    x = torch.randn(count, entering, rows + 2, width, depth, dtype=torch.float64)
    weight = torch.randn(leaving, entering, 3, 3, 3, dtype=torch.float64)
    bias = torch.randn(leaving, dtype=torch.float64)
    ours = winograd_conv(x.movedim(1, -1).contiguous(), winograd_weights(weight), bias).movedim(-1, 1)
    torch.testing.assert_close(ours, F.conv3d(x, weight, bias, padding=(0, 1, 1)), atol=1e-11, rtol=0)


def test_rounding_stays_near_that_of_the_plain_convolution():
    x, weight = torch.rand(1, 32, ROWS + 2, 16, 16), torch.randn(32, 32, 3, 3, 3)
    exact = F.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    plain = F.conv3d(x, weight, padding=(0, 1, 1))
    ours = winograd_conv(x.movedim(1, -1).contiguous(), winograd_weights(weight), None).movedim(-1, 1)
    assert (ours - exact).abs().max() < 5 * (plain - exact).abs().max()
