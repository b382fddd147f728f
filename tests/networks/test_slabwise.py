"""In slabs, the parts of the network compute what the modules compute."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from scripts.networks import Neuroverse3D, execution, slabwise
from scripts.networks.blocks import Down, Fusion, ResidualUnit, UpMerge


def assert_close(ours, plain, atol=2e-5):
    torch.testing.assert_close(ours, plain, atol=atol, rtol=1e-5)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.fixture(params=[1, 5, 100])
def slab_rows(request, monkeypatch):
    """Slabs of a few rows, or of all: a result must not depend on where a map is cut."""
    monkeypatch.setattr(slabwise, "SLAB_BYTES", 0)
    monkeypatch.setattr(slabwise, "FEWEST_ROWS", request.param)


@pytest.fixture(params=[0, 10**9], ids=["winograd", "plain"])
def winograd(request, monkeypatch):
    monkeypatch.setattr(slabwise, "WINOGRAD_VOXELS", request.param)


def plain_residual(unit, x):
    y = unit.convs[0](x)
    for conv in unit.convs[1:]:
        y = conv(F.gelu(y))
    return F.gelu(x + y)


@pytest.mark.usefixtures("slab_rows", "winograd")
@pytest.mark.parametrize("convs", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", [(16, 16, 5, 4), (16, 12, 3, 3), (5, 6, 4, 2), (4, 1, 2, 3), (16, 2, 1, 1)])
@torch.no_grad()
def test_residual_unit(shape, count, convs):
    unit = ResidualUnit(shape[0], convs)
    x = channels_last(torch.randn(count, *shape))
    plain = plain_residual(unit, x)
    assert_close(slabwise.residual(unit, x), plain)


@pytest.mark.usefixtures("slab_rows")
@pytest.mark.parametrize("widths", [(4, 8), (4, 4)], ids=["strided conv", "max-pool"])
@pytest.mark.parametrize("size", [(8, 6, 4), (2, 2, 2), (12, 4, 2)])
@torch.no_grad()
def test_down(widths, size):
    part = Down(*widths)
    x = channels_last(torch.randn(2, widths[0], *size))
    assert_close(slabwise.down(part, x), part(x))


@pytest.mark.usefixtures("slab_rows")
@pytest.mark.parametrize("size", [(4, 3, 2), (1, 1, 1), (6, 2, 5)])
@torch.no_grad()
def test_merge_up(size):
    part = UpMerge(8, 4)
    x, skip = torch.randn(2, 8, *size), channels_last(torch.randn(2, 4, *(2 * n for n in size)))
    plain = part(x, skip)
    assert_close(slabwise.merge_up(part, channels_last(x), skip, torch.empty_like(skip)), plain)
    assert_close(slabwise.merge_up(part, channels_last(x), skip, skip), plain)


@torch.no_grad()
def test_fuse():
    part = Fusion(4)
    context, target = torch.randn(6, 4, 3, 4, 5), torch.randn(2, 4, 3, 4, 5)
    into_context = slabwise.fuse(part, slabwise.rows_of(context), True, slabwise.rows_of(target))
    assert_close(into_context.movedim(-1, 1), part.into_context(context, target, 3))
    mean = torch.randn_like(target)
    into_target = slabwise.fuse(part, slabwise.rows_of(target), False, slabwise.rows_of(mean))
    assert_close(into_target.movedim(-1, 1), part.into_target(target, mean))


def network_and_episode(channels=(16, 32, 16, 16), length=5, batch=2, size=16):
    torch.manual_seed(1)
    network = Neuroverse3D(channels=channels, spatial_size=size).eval()
    target = torch.rand(batch, 1, size, size, size)
    images = torch.rand(batch, length, 1, size, size, size)
    return network, target, images, (images > 0.5).float()


@pytest.mark.usefixtures("slab_rows", "winograd")
@pytest.mark.parametrize("mini_context_size", [1, 5])
def test_prediction_equals_that_with_gradients(mini_context_size):
    network, *episode = network_and_episode()
    modules = network(*episode, 5).detach()  # gradients are on: the modules themselves
    with torch.no_grad():
        assert_close(network(*episode, mini_context_size), modules, atol=1e-6)


def test_encoded_parts_serve_again():
    network, target, images, labels = network_and_episode(length=3)
    pairs = torch.cat((images, labels), 2)
    with torch.no_grad():
        plain = network(target, images, labels, 2)
        maps, stems = network.encode_target(target), [network.encode_stems(p) for p in pairs.split(2, 1)]
        kept = [x.clone() for x in (*maps, *stems)]
        for _ in range(2):
            features = []
            for stem in stems:
                features = network.read_contexts(features, stem, maps, 3, from_stems=True)
            assert_close(network.decode(maps, features, keep_target=True), plain, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*maps, *stems), strict=True))


def test_gradients_do_not_depend_on_how_the_other_mini_contexts_run(monkeypatch):
    network, *episode = network_and_episode(length=3, batch=1)
    gradients = []
    for in_slabs in (True, False):
        if not in_slabs:
            monkeypatch.setattr(execution, "slabwise", None)
        network.zero_grad()
        network(*episode, 1).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-6)


def test_predictions_in_float32_and_bfloat16_on_a_cpu_run_in_slabs():
    network, target, *_ = network_and_episode(channels=(4, 8))
    part = network.target_encoder
    assert execution.slabwise_for(part, target) is None  # gradients are on
    with torch.no_grad():
        assert execution.slabwise_for(part, target) == (slabwise, part)
        with torch.autocast("cpu", torch.bfloat16):
            assert execution.slabwise_for(part, target)[0] is slabwise
        with torch.autocast("cpu", torch.float16):
            assert execution.slabwise_for(part, target) is None
        assert execution.slabwise_for(part, target.to("meta")) is None
        assert execution.slabwise_for(network.bfloat16().target_encoder, target) is None
        network.float().compile_parts(backend="aot_eager")
        assert execution.slabwise_for(part, target) is None


def test_weights_are_cast_once_and_again_when_they_change():
    network, target, *_ = network_and_episode(channels=(4, 8))
    decoder = network.target_decoder
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, cast = execution.slabwise_for(decoder, target)
        assert execution.slabwise_for(decoder, target)[1] is cast
        assert cast.head.convs[0].weight.dtype == torch.bfloat16 and cast.output.weight.dtype == torch.float32
        decoder.head.convs[0].weight.mul_(2)
        _, again = execution.slabwise_for(decoder, target)
    assert torch.equal(again.head.convs[0].weight, 2 * cast.head.convs[0].weight)


@pytest.mark.usefixtures("slab_rows")
@pytest.mark.parametrize("mini_context_size", [1, 4])
def test_autocast_stores_maps_in_16_bits_and_stays_near_float32(mini_context_size):
    network, *episode = network_and_episode(length=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in network.encode_target(episode[0])} == {torch.bfloat16}
        coarse = network(*episode, mini_context_size)
        again = network(*episode, 5 - mini_context_size)
    assert coarse.dtype == torch.float32 and torch.equal(coarse, again)  # pairs go one by one, sums are in float32
    with torch.no_grad():
        exact = network(*episode, mini_context_size)
    assert 0 < (coarse - exact).abs().max() < 0.03 * exact.abs().max()


def test_without_its_file_the_network_runs_and_trains():
    script = """
import sys
sys.modules["scripts.networks.slabwise"] = None  # importing it fails
import torch
from scripts.networks import Neuroverse3D, execution
assert execution.slabwise is None
torch.manual_seed(1)
network = Neuroverse3D(channels=(4, 8), spatial_size=8).eval()
episode = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8, 8)
with torch.no_grad():
    print(network(*episode, 2).flatten()[:5].tolist())
network(*episode, 2).mean().backward()
assert all(p.grad is not None for p in network.parameters())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(1)
    network = Neuroverse3D(channels=(4, 8), spatial_size=8).eval()
    episode = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(json.loads(done.stdout)), network(*episode, 2).flatten()[:5], atol=1e-6, rtol=0
        )


def test_activation_checkpointing_keeps_the_gradients():
    network, *episode = network_and_episode(length=3, batch=1)
    gradients = []
    for checkpointing in (False, True):
        for part in network.parts():
            part.activation_checkpointing = checkpointing
        network.zero_grad()
        network(*episode, 2).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-7)
