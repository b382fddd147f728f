"""The yardstick computes the same function as ours, and as the authors' network."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.baseline_network import BaselineNetwork
from benchmarks.network import Case, make_episode, make_network, probe
from scripts.checkpoint import authors_key, from_authors, network_from_state, read_checkpoint
from scripts.losses import SmoothL3L1Loss

WIDTHS = [(2, 4), (4, 6, 8), (4, 4, 8)]


def both(channels):
    return (make_network(kind, Case(channels, (16, 16, 16), 1)).eval() for kind in ("baseline", "ours"))


def episode(context_size):
    return make_episode(Case((), (8, 8, 8), context_size))


@torch.no_grad()
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("mini_context_size", [1, 2, 5])
def test_it_computes_what_ours_does(channels, mini_context_size):
    baseline, ours = both(channels)
    target, images, masks = episode(5)
    expected = baseline(target, images, masks, mini_context_size)
    torch.testing.assert_close(ours(target, images, masks, mini_context_size), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3
    assert not torch.allclose(baseline(target, images, 1 - masks, mini_context_size), expected, atol=1e-4)


@torch.no_grad()
def test_a_batch_does_not_mix():
    baseline, _ = both((2, 4))
    target, images, masks = torch.rand(2, 1, 8, 8, 8), torch.rand(2, 3, 1, 8, 8, 8), torch.rand(2, 3, 1, 8, 8, 8)
    whole = baseline(target, images, masks, 2)
    for i in range(2):
        torch.testing.assert_close(whole[[i]], baseline(target[[i]], images[[i]], masks[[i]], 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mini_context_size", [2, 3])
def test_gradients_are_those_of_ours(mini_context_size):
    gradients = []
    for network in both((2, 4)):
        network(*episode(3), mini_context_size).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("fixture", ["tiny_conv_down", "tiny_maxpool_down"])
def test_it_computes_what_the_authors_network_does(fixture, shared_dir):
    source = shared_dir / "reference" / f"{fixture}.ckpt"
    ours = network_from_state(from_authors(read_checkpoint(source), str(source)))
    baseline = BaselineNetwork(channels=ours.channels, convs_per_block=ours.convs_per_block)
    baseline.load_state_dict(ours.state_dict())
    with np.load(source.with_suffix(".npz")) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    inputs = [arrays[key] for key in ("target_in", "context_in", "context_out")]
    with torch.no_grad():
        for size in (1, 3):
            torch.testing.assert_close(baseline(*inputs, size), arrays[f"pred_l{size}"], atol=1e-5, rtol=0)
    SmoothL3L1Loss(weight=50.0)(baseline(*inputs, 2), arrays["target_out"]).backward()
    norms = json.loads((source.parent / f"{fixture}.grad_norms_l2.json").read_text())
    expected = {key.removeprefix("net."): norm for key, norm in norms.items()}
    for name, parameter in baseline.named_parameters():
        norm = expected[authors_key(name, len(ours.channels))]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-9), name


def test_weights_depend_on_the_names_alone():
    baseline, ours = both((2, 4))
    state = ours.state_dict()
    assert list(baseline.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in baseline.state_dict().items())


def test_a_probe_sees_a_change_anywhere_along_the_output():
    output = torch.arange(100.0).view(1, 1, 4, 5, 5)
    assert probe(output, 3) == [0.0, 49.0, 99.0]
