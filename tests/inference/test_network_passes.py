"""Passes over windows: the same answers as the plain network, with less work."""

import pytest
import torch

from scripts.inference.network_passes import Passes
from scripts.inference.tensor_cache import TensorCache
from scripts.networks import Neuroverse3D


class FewPairs:
    """A context set of random pairs with two labels."""

    def __init__(self, count=5, size=16):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 1, size, size, size, generator=generator)
        self.labels = torch.randint(0, 3, self.images.shape, generator=generator)

    def episode(self, numbers, value):
        numbers = list(numbers)
        return self.images[numbers], (self.labels[numbers] == value).float()

    def shown(self, window, value):
        return window


MEMBERS = {1: [0, 1, 2, 3, 4], 2: [1, 3], 7: []}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Neuroverse3D(channels=(8, 16), spatial_size=16).eval()


@torch.no_grad()
def plain(network, context, window):
    scores = []
    for value, chosen in MEMBERS.items():
        images, wanted = context.episode(chosen, value)
        scores.append(network(window, images[None], wanted[None]) if chosen else torch.zeros_like(window))
    return torch.cat(scores, 1)


@pytest.mark.parametrize("cache_mb", [0, 0.3, None], ids=["none", "some", "all"])
@pytest.mark.parametrize("mini_context_size", [1, 2, None])
@torch.no_grad()
def test_scores_are_those_of_the_network_for_every_target(network, cache_mb, mini_context_size):
    context = FewPairs()
    passes = Passes(network, context, mini_context_size, cache_mb)
    told = []
    for seed in range(3):
        window = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
        scores = passes.scores(window, MEMBERS, lambda *progress: told.append(progress))
        torch.testing.assert_close(scores, plain(network, context, window), atol=1e-6, rtol=1e-5)
    assert told[:3] == [(1, 1, 3), (2, 2, 3), (7, 3, 3)]


@torch.no_grad()
def test_target_and_stems_are_encoded_once(network, monkeypatch):
    calls = {"encode_target": 0, "encode_stems": 0}
    for name in calls:
        method = getattr(network, name)

        def counted(x, name=name, method=method):
            calls[name] += 1
            return method(x)

        monkeypatch.setattr(network, name, counted)
    passes = Passes(network, FewPairs(), mini_context_size=2)
    for _ in range(4):
        passes.scores(torch.rand(1, 1, 16, 16, 16), MEMBERS)
    assert calls == {"encode_target": 4, "encode_stems": 4}  # stems: three pieces of label 1, one of label 2


@torch.no_grad()
def test_out_of_memory_halves_the_mini_context_and_tries_once_more(network, monkeypatch, caplog):
    context = FewPairs()
    window = torch.rand(1, 1, 16, 16, 16)
    expected = plain(network, context, window)
    read = network.read_contexts

    def small_only(features, pairs, *rest, **options):
        if pairs.shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(features, pairs, *rest, **options)

    monkeypatch.setattr(network, "read_contexts", small_only)
    passes = Passes(network, context, mini_context_size=4)
    torch.testing.assert_close(passes.scores(window, MEMBERS), expected, atol=1e-6, rtol=1e-5)
    assert passes.mini_context_size == 2 and "mini-context size of 2" in caplog.text
    with pytest.raises(RuntimeError, match="out of memory.*--amp true"):
        Passes(network, context, mini_context_size=8).scores(window, MEMBERS)

    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(network, "read_contexts", broken)
    with pytest.raises(RuntimeError, match="something else"):
        Passes(network, context, 1).scores(window, MEMBERS)


@torch.no_grad()
def test_a_window_is_encoded_once_or_once_for_each_way_it_is_shown(network, monkeypatch):
    context, window = FewPairs(), torch.rand(1, 1, 16, 16, 16)
    encoded, encode = [], network.encode_target
    monkeypatch.setattr(network, "encode_target", lambda x: encoded.append(x) or encode(x))
    Passes(network, context).scores(window, MEMBERS)
    assert len(encoded) == 1
    monkeypatch.setattr(context, "shown", lambda window, value: window / value)
    scores = Passes(network, context).scores(window, MEMBERS)
    assert len(encoded) == 3
    for channel, value in enumerate((1, 2)):
        images, wanted = context.episode(MEMBERS[value], value)
        expected = network(window / value, images[None], wanted[None])
        torch.testing.assert_close(scores[:, channel : channel + 1], expected, atol=1e-6, rtol=1e-5)


def test_cache_keeps_to_its_budget():
    cache = TensorCache(100)
    cache.put("a", torch.zeros(15))
    assert not cache.has_room(60) and cache.has_room(40)
    cache.put("b", torch.zeros(20))  # 80 bytes more: no room
    cache.put("c", torch.zeros(10))
    assert cache.get("b") is None and cache.get("a").numel() == 15 and len(cache) == 2 and cache.used_bytes == 100
    cache.clear()
    assert len(cache) == 0 and cache.has_room(100)


@pytest.mark.parametrize(("mini_context_size", "encoded"), [(1, 2), (2, 5)])
@torch.no_grad()
def test_stems_of_pairs_that_are_the_same_are_taken_over(network, monkeypatch, mini_context_size, encoded):
    context = FewPairs()
    earlier = Passes(network, context, mini_context_size)
    window = torch.rand(1, 1, 16, 16, 16)
    earlier.scores(window, {1: [0, 1, 2, 3]})
    turned = FewPairs()
    turned.images, turned.labels = turned.images.flip(0), turned.labels.flip(0)  # number n is 4 - n
    calls = []
    encode = network.encode_stems
    monkeypatch.setattr(network, "encode_stems", lambda pairs: calls.append(pairs.shape[1]) or encode(pairs))
    later = Passes(network, turned, mini_context_size)
    later.take_over(earlier, {1: 3, 2: 2, 3: 1})  # 0 has changed, and 4 is new
    scores = later.scores(window, {1: [0, 1, 2, 3, 4]})
    images, wanted = turned.episode(range(5), 1)
    torch.testing.assert_close(scores, network(window, images[None], wanted[None]), atol=1e-6, rtol=1e-5)
    assert sum(calls) == encoded  # pieces of two hang together otherwise, (2, 3) became (2, 1)
    other = Passes(Neuroverse3D(channels=(8, 16), spatial_size=16).eval(), turned, mini_context_size)
    other.take_over(earlier, {1: 3})
    other.scores(window, {1: [3]})
    assert sum(calls) == encoded  # that network encodes by itself
