"""Between a scan's voxels and a grid along its axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy import ndimage

from scripts.data.resampling import ScanSlabs, grid_axes, sample_labels, sample_linear, spline_coefficients


def grid_over(shape, zooms, spacing):
    return grid_axes(np.diag([*zooms, 1.0]), shape, [(0, n) for n in shape], spacing)


@pytest.mark.parametrize("spacing", [0.8, 1.3, 2.7])
def test_values_are_those_of_monais_spacing(spacing):
    scan, zooms = torch.rand(13, 11, 9), (1.0, 0.7, 1.9)
    axes, counts = grid_over(scan.shape, zooms, spacing)
    found = sample_linear(scan, axes, counts)
    monai = Spacing((spacing,) * 3, mode="bilinear", padding_mode="border")
    expected = monai(MetaTensor(scan[None], affine=torch.diag(torch.tensor([*zooms, 1.0]))))[0]
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected.as_tensor(), atol=1e-3, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    zooms=st.tuples(*[st.sampled_from([0.5, 1.0, 1.7, 6.0])] * 3),
    spacing=st.floats(0.6, 4.0),
    seed=st.integers(0, 99),
)
def test_labels_are_those_with_the_largest_interpolated_share(shape, zooms, spacing, seed):
    labels = torch.as_tensor(np.random.default_rng(seed).choice([0, 2, 5, 300], shape).astype(np.float32))
    axes, counts = grid_over(shape, zooms, spacing)
    found = sample_labels(labels, axes, counts)
    values = torch.tensor([0, 2, 5, 300])
    shares = torch.stack([sample_linear((labels == value).float(), axes, counts) for value in values])
    chosen = shares[torch.searchsorted(values, found.long()), *np.indices(found.shape)]
    torch.testing.assert_close(chosen, shares.max(0).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flips", itertools.product((1, -1), repeat=3))
def test_only_the_box_is_on_the_grid(flips):
    scan = torch.zeros(9, 8, 7)
    scan[2:5, 3:7, 1:4] = torch.rand(3, 4, 3) + 1
    box = [(2, 5), (3, 7), (1, 4)]
    axes, counts = grid_axes(np.diag([*flips, 1.0]), scan.shape, box, 1.0)
    expected = scan[2:5, 3:7, 1:4].flip([d for d in range(3) if flips[d] < 0])
    assert torch.equal(sample_linear(scan, axes, counts), expected)
    assert torch.equal(sample_labels(scan, axes, counts), expected)


@pytest.mark.parametrize("size", [(6, 7, 5), (1, 4, 2), (3, 1, 1)])
def test_splines_are_scipys(size):
    axes, _ = grid_over((9, 8, 7), (1.0, 0.8, 1.1), 1.4)
    grid_map = torch.rand(size)
    slabs, coefficients = ScanSlabs(axes, size, order=3), spline_coefficients(grid_map)
    (part,) = slabs
    found = slabs.interpolate(coefficients, part)
    places = np.meshgrid(*[np.arange(n) / a.step for n, a in zip(found.shape, axes, strict=True)], indexing="ij")
    places = [p.clip(0, n - 1) for p, n in zip(places, size, strict=True)]
    expected = ndimage.map_coordinates(grid_map.double().numpy(), places, order=3, mode="mirror")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == slabs.shape_of(part)
    region = slabs.region(coefficients > 0.6, part)
    torch.testing.assert_close(slabs.interpolate(coefficients, part, region), found[region])
    found[region] = 0
    assert found.max() <= 0.6 + 1e-6 and slabs.region(coefficients > 9, part) is None
