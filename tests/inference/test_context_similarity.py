"""What counts as unlike the contexts."""

import pytest
import torch
from monai.transforms import GaussianSmooth

from scripts.inference.context_similarity import ContextSimilarity


def scan(seed):
    """A bright body with a dark core on black, a little different for every seed, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    centre = 11.5 + torch.rand(3, generator=generator)
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij"), -1)
    distance = (grid - centre).norm(dim=-1)
    image = 0.8 * (distance < 9) - 0.5 * (distance < 4)
    image = image + (0.03 * torch.randn(24, 24, 24, generator=generator)).abs() * (distance < 9)
    return image.clamp(0, 1)[None]


@pytest.fixture(scope="module")
def contexts():
    return ContextSimilarity(torch.stack([scan(seed) for seed in range(8)]))


def test_scans_of_the_same_kind_are_not_flagged(contexts):
    for seed in range(20, 26):
        similarity, unlike = contexts(scan(seed))
        assert similarity > 0.95 and unlike == []


def test_a_context_itself_is_most_similar(contexts):
    assert contexts(scan(3)).similarity == pytest.approx(1, abs=1e-5)


def test_similarity_is_the_correlation_at_low_resolution():
    first, second = scan(1), torch.roll(scan(2), 3, dims=2)
    low = [image.reshape(12, 2, 12, 2, 12, 2).mean((1, 3, 5)).flatten() for image in (first, second)]
    expected = float(torch.corrcoef(torch.stack(low))[0, 1])
    assert ContextSimilarity(first[None])(second).similarity == pytest.approx(expected, abs=1e-3) and expected < 0.9


def test_another_layout(contexts):
    similarity, unlike = contexts(torch.roll(scan(20), 8, dims=1))
    assert similarity < 0.8 and "layout" in unlike


def test_another_contrast(contexts):
    image = scan(20)
    assert "intensities" in contexts(image**3).unlike
    assert {"layout", "intensities"} <= set(contexts((1 - image) * (image > 0)).unlike)


def test_noise_and_blur(contexts):
    image = scan(20)
    noisy = (image + 0.2 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).abs()).clamp(0, 1)
    assert "sharpness" in contexts(noisy).unlike
    assert "sharpness" in contexts(torch.as_tensor(GaussianSmooth(2.0)(image))).unlike


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_contexts_flag_nothing(count):
    similar = ContextSimilarity(torch.stack([scan(seed) for seed in range(count)]))
    similarity, unlike = similar(1 - scan(20))
    assert unlike == [] and similarity < 0


def test_constant_scan(contexts):
    similarity, unlike = contexts(torch.zeros(1, 24, 24, 24))
    assert similarity == 0 and "layout" in unlike
