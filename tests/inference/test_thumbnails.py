"""Thumbnails and their correlation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.inference.thumbnails import correlation, thumbnail


def test_a_thumbnail_is_of_block_means():
    image = torch.rand(1, 32, 48, 16)
    small = thumbnail(image, (32, 48, 16))
    assert small.shape == (16, 16, 16) and small.dtype == torch.uint8
    blocks = image.reshape(16, 2, 16, 3, 16, 1).mean((1, 3, 5))
    torch.testing.assert_close(small.float() / 255, blocks, atol=0.5 / 255 + 1e-6, rtol=0)
    assert thumbnail(torch.rand(1, 8, 8, 8), (8, 8, 8)).shape == (8, 8, 8)
    assert thumbnail(image, (32, 48, 16), 4).float().mean() / 255 == pytest.approx(float(image.mean()), abs=1e-2)


@pytest.mark.parametrize("size", [(10, 40, 21), (32, 32, 32)])
def test_scans_of_any_size_are_brought_to_the_grid(size):
    image = torch.zeros(1, *size)
    image[:, size[0] // 2 - 4 : size[0] // 2 + 4, size[1] // 2 - 4 : size[1] // 2 + 4, size[2] // 2 - 4 :] = 1
    assert thumbnail(image, (32, 32, 32)).shape == (16, 16, 16)
    assert thumbnail(image, (32, 32, 32))[6:10, 6:10, 7:9].float().mean() > 150


def test_correlation_is_pearsons():
    many, one = torch.randint(0, 256, (5, 4, 4, 4)), torch.randint(0, 256, (4, 4, 4))
    expected = [np.corrcoef(x.flatten(), one.flatten())[0, 1] for x in many.numpy()]
    np.testing.assert_allclose(correlation(many.byte(), one.byte()).numpy(), expected, atol=1e-5)
    assert correlation(many, many[3])[3] == pytest.approx(1) and correlation(many, 255 - many[3])[3] == pytest.approx(
        -1
    )


def test_constant_thumbnails_are_like_nothing():
    many = torch.stack([torch.full((4, 4, 4), 7), torch.arange(64).reshape(4, 4, 4)])
    assert correlation(many, many[0]).tolist() == [0, 0]
    assert correlation(many, many[1]).tolist() == pytest.approx([0, 1])
