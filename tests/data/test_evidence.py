"""Evidence: intensities as the part of them that lies inside of a structure."""

import torch

from scripts.data.evidence import BINS, SURROUNDINGS, evidence, evidence_table

SIZE = 24


def scene(inside, outside, beyond=0.0, noise=0.02, seed=0):
    """Image and mask (2, 1, H, W, D) of a cube; ``beyond`` is what lies farther from it than its surroundings."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2, 1, SIZE, SIZE, SIZE)
    mask[..., 9:15, 9:15, 9:15] = 1
    low, high = 9 - SURROUNDINGS, 15 + SURROUNDINGS
    image = torch.full_like(mask, beyond)
    image[..., low:high, low:high, low:high] = outside
    image = torch.where(mask > 0, torch.tensor(inside), image)
    return (image + noise * torch.randn(mask.shape, generator=generator)).clamp(0, 1), mask


def test_a_structure_is_bright_and_its_surroundings_are_dark_in_any_contrast():
    for inside, outside in ((0.8, 0.3), (0.3, 0.8), (0.5, 0.7), (1.0, 0.9)):
        image, mask = scene(inside, outside)
        shown = evidence(image, evidence_table(image, mask))
        assert shown[mask > 0].mean() > 0.9 and shown[image.sub(outside).abs() < 0.05].mean() < 0.1


def test_an_intensity_that_says_nothing_is_half():
    image, mask = scene(0.5, 0.5)
    table = evidence_table(image, mask)
    assert table.shape == (BINS,) and abs(float(table[round(0.5 * (BINS - 1))]) - 0.5) < 0.1
    assert torch.allclose(table[[0, -1]], torch.tensor(0.5)), "nowhere seen"


def test_what_lies_far_away_does_not_count():
    near, mask = scene(0.8, 0.3, beyond=0.3)
    far, _ = scene(0.8, 0.3, beyond=0.8)
    assert torch.allclose(evidence_table(near, mask), evidence_table(far, mask), atol=0.02)


def test_where_there_is_no_scan_nothing_counts():
    image, mask = scene(0.8, 0.3)
    padded = torch.where(torch.arange(SIZE).view(SIZE, 1, 1) < 12, image, torch.zeros(()))
    assert torch.allclose(evidence_table(padded, mask)[12:20], evidence_table(image, mask)[12:20], atol=0.05)


def test_without_a_structure_nothing_speaks_for_it():
    image, mask = scene(0.8, 0.3)
    shown = evidence(image, evidence_table(image, torch.zeros_like(mask)))
    assert torch.allclose(shown, torch.tensor(0.5)), "nor against it, for nothing is around it"
    table = evidence_table(image, torch.ones_like(mask))
    assert table.isfinite().all() and evidence(image, table).mean() > 0.9


def test_tables_are_read_between_their_bins_and_at_both_ends():
    table = torch.linspace(0, 1, 5)
    values = torch.tensor([-1.0, 0.0, 0.125, 0.5, 0.9, 1.0, 2.0])
    assert torch.allclose(evidence(values, table), values.clamp(0, 1), atol=1e-6)
