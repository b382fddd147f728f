"""Where there is an axis of pairs, maps and gradients still lie in memory as everywhere else."""

import pytest
import torch

from scripts.networks.blocks import Fusion, mean_over_pairs

PAIRS = 3


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last_3d).requires_grad_()


def lies_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_over_pairs(dtype):
    x = channels_last(2 * PAIRS, 4, 2, 3, 5, dtype=dtype)
    mean = mean_over_pairs(x, PAIRS)
    torch.testing.assert_close(mean, x.float().unflatten(0, (2, PAIRS)).mean(1).to(mean.dtype))
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    mean.square().sum().backward()
    assert lies_channels_last(mean) and lies_channels_last(x.grad)


def test_into_context():
    part = Fusion(4)
    context, target = channels_last(2 * PAIRS, 4, 2, 3, 5), channels_last(2, 4, 2, 3, 5)
    fused = part.into_context(context, target, PAIRS)
    both = torch.cat((context, target.repeat_interleave(PAIRS, 0)), 1)
    torch.testing.assert_close(fused, torch.nn.functional.gelu(context + part.conv(both)))
    fused.square().sum().backward()
    assert all(map(lies_channels_last, (fused, context.grad, target.grad)))
