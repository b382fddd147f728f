"""Members of an ensemble: which contexts, which mirrors."""

import pytest
import torch

from scripts.inference.ensemble import Mirrored, draw_members, mirrored


class Ramp(torch.nn.Module):
    """Answers the target plus a ramp that rises along each axis, so that a mirror shows."""

    def forward(self, target, images, labels, mini_context_size):
        ramps = torch.meshgrid(
            *(torch.arange(n).float() * 10**i for i, n in enumerate(target.shape[2:])), indexing="ij"
        )
        return target + sum(ramps) + labels.mean(1)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_mirror_turns_the_network_and_not_the_target(axes):
    torch.manual_seed(0)
    target, images, labels = torch.rand(1, 1, 2, 3, 4), torch.rand(1, 2, 1, 2, 3, 4), torch.rand(1, 2, 1, 2, 3, 4)
    ramp = Ramp()(torch.zeros_like(target), images, torch.zeros_like(labels), 1)
    expected = target + labels.mean(1) + ramp.flip([axis + 2 for axis in axes])
    assert torch.allclose(Mirrored(Ramp(), axes)(target, images, labels, mini_context_size=1), expected)


def test_without_axes_the_network_stays_itself():
    network = Ramp()
    assert mirrored(network, ()) is network and isinstance(mirrored(network, (1,)), Mirrored)


def test_every_label_keeps_half_of_its_contexts():
    chosen = {1: [0, 1, 2, 3, 4], 2: [4, 5], 3: [6]}
    members = draw_members(chosen, 20)
    assert len(members) == 20
    for member in members:
        assert len({*chosen[1]} & {*member.among}) >= 3 and {*chosen[2]} & {*member.among} and 6 in member.among
        assert member.flips == ()
    assert len({tuple(member.among) for member in members}) > 5


def test_draws_follow_the_seed():
    chosen = {1: list(range(8))}
    assert draw_members(chosen, 5, (0, 1), 3) == draw_members(chosen, 5, (0, 1), 3)
    assert draw_members(chosen, 5, (0, 1), 3) != draw_members(chosen, 5, (0, 1), 4)


def test_only_given_axes_are_mirrored():
    flips = {member.flips for member in draw_members({1: [0, 1]}, 40, (0, 2))}
    assert flips == {(), (0,), (2,), (0, 2)}


@pytest.mark.parametrize("chosen", [{1: [0]}, {1: [0], 2: [3]}, {1: []}, {}])
def test_nothing_to_draw_from(chosen):
    assert draw_members(chosen, 4) == []


def test_a_single_context_can_still_be_mirrored():
    assert all(member.among == [0] for member in draw_members({1: [0]}, 4, (0,)))
