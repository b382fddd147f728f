from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scripts.checkpoint import authors_key, from_authors, network_from_state, read_checkpoint
from scripts.losses import SmoothL3L1Loss
from scripts.networks import Neuroverse3D
from scripts.networks.blocks import Fusion, ResidualUnit, UpMerge

FIXTURES = ("tiny_conv_down", "tiny_maxpool_down")
TINY = (4, 6, 8)


def tiny(channels=TINY, **options):
    """A network whose weights are large enough for every input to matter to the output."""
    network = Neuroverse3D(channels=channels, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.7)
    return network


def episode(batch=1, length=5, size=(8, 8, 8), in_channels=1, out_channels=1):
    target = torch.rand(batch, in_channels, *size)
    images = torch.rand(batch, length, in_channels, *size)
    labels = (torch.rand(batch, length, out_channels, *size) > 0.5).float()
    return target, images, labels


def assert_close(a, b, atol=1e-5, rtol=0.0):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# --- parity with the authors' network ---------------------------------------------------------------------


@pytest.fixture(params=FIXTURES)
def authors(request, shared_dir):
    folder = shared_dir / "reference"
    source = folder / f"{request.param}.ckpt"
    with np.load(folder / f"{request.param}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    return SimpleNamespace(
        network=network_from_state(from_authors(read_checkpoint(source), str(source))),
        inputs=[arrays[key] for key in ("target_in", "context_in", "context_out")],
        arrays=arrays,
        grad_norms=json.loads((folder / f"{request.param}.grad_norms_l2.json").read_text()),
    )


def test_outputs_match_the_authors(authors):
    for size in (1, 2, 3, 5):
        with torch.no_grad():
            pred = authors.network(*authors.inputs, mini_context_size=size)
        assert_close(pred, authors.arrays[f"pred_l{size}"])


def test_loss_and_gradients_match_the_authors(authors):
    pred = authors.network(*authors.inputs, mini_context_size=2)  # in eval mode: in order
    loss = SmoothL3L1Loss(weight=50.0)(pred, authors.arrays["target_out"])
    assert_close(loss, authors.arrays["loss_l2"].to(loss.dtype).reshape(()), atol=0.0, rtol=1e-5)
    loss.backward()
    stages = len(authors.network.channels)
    norms = {authors_key(k, stages): p.grad.norm().item() for k, p in authors.network.named_parameters()}
    expected = {key.removeprefix("net."): value for key, value in authors.grad_norms.items()}
    assert norms.keys() == expected.keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(expected[key], rel=1e-3, abs=1e-9), key


def test_full_size_layout(shared_dir):
    layout = json.loads((shared_dir / "reference" / "full_checkpoint_layout.json").read_text())
    assert layout["parameters"] == 70_854_913
    layout = {key: tuple(shape) for key, shape in layout["state_dict"].items()}
    with torch.device("meta"):
        network = Neuroverse3D()
    ours = {"net." + authors_key(k, 5): tuple(p.shape) for k, p in network.named_parameters()}
    assert ours == layout
    assert len(ours) == len(dict(network.named_parameters()))  # no two of our keys share one of theirs

    theirs = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    back = from_authors({"state_dict": theirs}, "layout")
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_full_size_parameter_count():
    with torch.device("meta"):
        network = Neuroverse3D()
    assert sum(p.numel() for p in network.parameters()) == 70_854_913


# --- the function that is computed ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("channels", [TINY, (4, 4, 8), (3, 3, 3, 3), (2, 4)])
@pytest.mark.parametrize("convs_per_block", [1, 2, 3])
def test_any_size_of_network_runs(channels, convs_per_block):
    network = tiny(channels, convs_per_block=convs_per_block)
    size = (network.divisor, 2 * network.divisor, 3 * network.divisor)  # anisotropic
    target, images, labels = episode(2, 3, size)
    pred = network(target, images, labels, mini_context_size=2)
    assert pred.shape == target.shape
    assert pred.isfinite().all()
    assert pred.std() > 0
    assert len(network.target_encoder.residuals[0].convs) == convs_per_block


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 5])
def test_eval_output_does_not_depend_on_mini_context_size_or_order(length):
    network = tiny()
    target, images, labels = episode(2, length)
    reference = network(target, images, labels, mini_context_size=length)
    order = torch.randperm(length)
    for size in (1, 2, 3, length + 7):
        assert_close(network(target, images, labels, mini_context_size=size), reference)
        assert_close(network(target, images[:, order], labels[:, order], mini_context_size=size), reference)


@torch.no_grad()
def test_batch_elements_do_not_mix():
    network = tiny()
    target, images, labels = episode(3, 4)
    together = network(target, images, labels)
    for b in range(3):
        assert_close(together[b : b + 1], network(target[b : b + 1], images[b : b + 1], labels[b : b + 1]))


@torch.no_grad()
def test_output_depends_on_every_input():
    network = tiny()
    inputs = episode(1, 3)
    reference = network(*inputs)
    for which in range(3):
        changed = [x.clone() for x in inputs]
        changed[which][:, -1:] += 1.0
        assert (network(*changed) - reference).abs().max() > 1e-4


@torch.no_grad()
def test_several_image_and_label_channels():
    network = tiny(in_channels=2, out_channels=3)
    inputs = episode(1, 3, in_channels=2, out_channels=3)
    assert network(*inputs).shape == (1, 3, 8, 8, 8)


@torch.no_grad()
def test_contexts_of_another_dtype_are_moved():
    network = tiny()
    target, images, labels = episode(1, 3)
    reference = network(target, images, labels)
    pred = network(target, images.double(), labels.to(torch.uint8))
    assert pred.dtype == torch.float32
    assert_close(pred, reference)


@torch.no_grad()
def test_double_precision_network():
    network = tiny().double()
    target, images, labels = episode(1, 3)
    pred = network(target.double(), images, labels)
    assert pred.dtype == torch.float64
    assert_close(pred.float(), network.float()(target, images, labels))


@torch.no_grad()
def test_inputs_are_left_alone():
    network = tiny()
    inputs = episode(1, 3)
    copies = [x.clone() for x in inputs]
    first = network(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert torch.equal(network(*inputs), first)


def test_no_grad_and_inference_mode_agree_with_grad():
    network = tiny()
    inputs = episode(1, 3)
    with_grad = network(*inputs, mini_context_size=2)
    with torch.no_grad():
        assert_close(network(*inputs, mini_context_size=2), with_grad)
    with torch.inference_mode():
        assert_close(network(*inputs, mini_context_size=2), with_grad)


# --- the gradient rule of APSP ----------------------------------------------------------------------------


def full_graph(network, target, images, labels):
    """The prediction with plain autograd through every pair: all of them in one mini-context."""
    return network(target, images, labels, mini_context_size=images.shape[1])


@pytest.mark.parametrize(("length", "size"), [(5, 2), (4, 2), (3, 1), (2, 5)])
def test_only_the_last_mini_context_has_a_gradient_and_it_is_scaled(length, size):
    network = tiny()  # in eval mode the order is known, and the rule holds all the same
    target, images, labels = episode(2, length)
    images.requires_grad_()
    labels.requires_grad_()
    weight = torch.randn_like(target)
    plain = torch.autograd.grad((full_graph(network, target, images, labels) * weight).sum(), (images, labels))
    ours = torch.autograd.grad((network(target, images, labels, size) * weight).sum(), (images, labels))

    count = -(-length // size)
    start = size * (count - 1)
    for mine, full in zip(ours, plain, strict=True):
        assert mine[:, :start].abs().sum() == 0
        assert full[:, :start].abs().sum() > 0 or start == 0
        assert_close(mine[:, start:], count * full[:, start:], atol=1e-6, rtol=1e-3)


def test_parameter_gradients_follow_the_same_rule():
    network = tiny()
    target, images, labels = episode(1, 5)
    weight = torch.randn_like(target)
    names, parameters = zip(*network.named_parameters(), strict=True)
    ours = torch.autograd.grad((network(target, images, labels, 2) * weight).sum(), parameters)

    # by hand: the first two mini-contexts are constants, the third counts three times in the backward pass only
    maps = network.target_encoder(target)
    means = [
        network.context_unet(torch.cat((images[:, s], labels[:, s]), 2), maps)
        for s in (slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    features = []
    for a, b, c in zip(*means, strict=True):
        value = 0.4 * a + 0.4 * b + 0.2 * c
        features.append(value.detach() + 3 * 0.2 * (c - c.detach()))
    by_hand = torch.autograd.grad((network.target_decoder(maps, features) * weight).sum(), parameters)
    for name, a, b in zip(names, ours, by_hand, strict=True):
        assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-9, rtol=1e-3)
        assert a.abs().sum() > 0, name


def test_one_mini_context_is_plain_autograd():
    network = tiny().train()
    target, images, labels = episode(1, 3)
    network(target, images, labels, mini_context_size=3).sum().backward()
    reference = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    network(target, images, labels, mini_context_size=100).sum().backward()
    for name, parameter in network.named_parameters():
        assert_close(parameter.grad, reference[name])


def seen_pairs(network, images, labels, target, size, monkeypatch):
    """Ids of the pairs of each mini-context, in the order in which they are run."""
    seen = []
    read = network.read_contexts

    def watched(features, pairs, *rest):
        seen.append(tuple(int(v) for v in pairs[0, :, 0, 0, 0, 0]))
        return read(features, pairs, *rest)

    monkeypatch.setattr(network, "read_contexts", watched)
    network(target, images, labels, mini_context_size=size)
    monkeypatch.undo()
    return seen


def test_training_shuffles_mini_contexts_and_eval_does_not(monkeypatch):
    target, images, labels = episode(1, 7)
    images[:] = torch.arange(7.0).view(1, 7, 1, 1, 1, 1)
    in_order = [(0, 1), (2, 3), (4, 5), (6,)]
    network = tiny()
    with torch.no_grad():
        assert all(seen_pairs(network, images, labels, target, 2, monkeypatch) == in_order for _ in range(3))
        network.train()
        orders = [seen_pairs(network, images, labels, target, 2, monkeypatch) for _ in range(12)]
    assert all(sorted(order) == in_order for order in orders)  # every pair once, partition kept
    assert len({tuple(order) for order in orders}) > 3
    assert len({order[-1] for order in orders}) > 1  # also the one that carries the gradient


def test_shuffling_follows_the_torch_seed(monkeypatch):
    target, images, labels = episode(1, 7)
    images[:] = torch.arange(7.0).view(1, 7, 1, 1, 1, 1)
    network = tiny().train()
    orders = []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.no_grad():
            orders.append([seen_pairs(network, images, labels, target, 1, monkeypatch) for _ in range(3)])
    assert orders[0] == orders[1]


def test_gradient_stays_with_the_pair_that_ran_last_in_training():
    network = tiny().train()
    target, images, labels = episode(1, 4)
    images.requires_grad_()
    carriers = set()
    for _ in range(12):
        (gradient,) = torch.autograd.grad(network(target, images, labels, 1).sum(), images)
        carried = gradient.abs().sum((0, 2, 3, 4, 5)).nonzero().flatten().tolist()
        assert len(carried) == 1
        carriers.update(carried)
    assert len(carriers) > 1


# --- the blocks against the paper's formulas, with real concatenations -------------------------------------


def values_and_gradients(function, inputs, module):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()])]


def assert_same_function(ours, plain, inputs, module):
    for a, b in zip(
        values_and_gradients(ours, inputs, module), values_and_gradients(plain, inputs, module), strict=True
    ):
        assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_up_merge_equals_its_formula():
    block = UpMerge(6, 4)

    def plain(x, skip):
        up = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        return F.conv3d(torch.cat((up, skip), 1), block.conv.weight, block.conv.bias)

    assert_same_function(block, plain, [torch.randn(2, 6, 3, 4, 5), torch.randn(2, 4, 6, 8, 10)], block)


def test_target_to_context_fusion_equals_its_formula():
    block, pairs = Fusion(4), 3

    def ours(context, target):
        return block.into_context(context, target, pairs)

    def plain(context, target):
        repeated = target.repeat_interleave(pairs, 0)
        return F.gelu(context + block.conv(torch.cat((context, repeated), 1)))

    assert_same_function(ours, plain, [torch.randn(6, 4, 3, 4, 5), torch.randn(2, 4, 3, 4, 5)], block)


def test_context_to_target_fusion_equals_its_formula():
    block = Fusion(4)

    def plain(target, context):
        return F.gelu(target + block.conv(torch.cat((context, target), 1)))

    assert_same_function(block.into_target, plain, [torch.randn(2, 4, 3, 4, 5) for _ in range(2)], block)


@pytest.mark.parametrize("convs", [1, 2, 3])
def test_residual_unit_equals_its_formula(convs):
    block = ResidualUnit(3, convs)
    layers = [block.convs[0]]
    for conv in block.convs[1:]:
        layers += [nn.GELU(), conv]
    plain = nn.Sequential(*layers)
    assert_same_function(block, lambda x: F.gelu(x + plain(x)), [torch.randn(2, 3, 4, 5, 6)], block)


# --- bad input --------------------------------------------------------------------------------------------

GOOD = ((2, 1, 8, 8, 8), (2, 3, 1, 8, 8, 8), (2, 3, 1, 8, 8, 8))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        pytest.param(((1, 8, 8, 8), *GOOD[1:]), ["target_in", "(B, 1, H, W, D)", "(1, 8, 8, 8)"], id="no batch axis"),
        pytest.param(((2, 8, 8, 8), *GOOD[1:]), ["target_in", "(2, 8, 8, 8)"], id="no channel axis"),
        pytest.param(((2, 3, 8, 8, 8), *GOOD[1:]), ["target_in", "(B, 1, ", "(2, 3, 8, 8, 8)"], id="target channels"),
        pytest.param(
            (GOOD[0], (3, 1, 8, 8, 8), GOOD[2]),
            ["context_in", "(B, L, 1, H, W, D)", "(3, 1, 8, 8, 8)"],
            id="context without batch axis",
        ),
        pytest.param((*GOOD[:2], (2, 3, 8, 8, 8)), ["context_out", "(2, 3, 8, 8, 8)"], id="label without channel axis"),
        pytest.param((GOOD[0], (2, 3, 2, 8, 8, 8), GOOD[2]), ["context_in", "(2, 3, 2, 8, 8, 8)"], id="image channels"),
        pytest.param((*GOOD[:2], (2, 3, 2, 8, 8, 8)), ["context_out", "(2, 3, 2, 8, 8, 8)"], id="label channels"),
        pytest.param((GOOD[0], (1, 3, 1, 8, 8, 8), GOOD[2]), ["context_in", "(2, L,", "(1, 3,"], id="batch sizes"),
        pytest.param((*GOOD[:2], (2, 4, 1, 8, 8, 8)), ["same number of pairs", "3 and 4"], id="lengths"),
        pytest.param((GOOD[0], (2, 0, 1, 8, 8, 8), (2, 0, 1, 8, 8, 8)), ["L >= 1", "L = 0"], id="no pairs"),
        pytest.param((GOOD[0], (2, 3, 1, 8, 8, 4), GOOD[2]), ["context_in", "8, 8, 8)", "8, 8, 4)"], id="image grid"),
        pytest.param((*GOOD[:2], (2, 3, 1, 4, 8, 8)), ["context_out", "8, 8, 8)", "4, 8, 8)"], id="label grid"),
        pytest.param(
            ((1, 1, 8, 10, 8), (1, 2, 1, 8, 10, 8), (1, 2, 1, 8, 10, 8)), ["multiples of 4", "(8, 10, 8)"], id="divisor"
        ),
        pytest.param(
            ((1, 1, 8, 0, 8), (1, 2, 1, 8, 0, 8), (1, 2, 1, 8, 0, 8)), ["positive multiples of 4"], id="empty grid"
        ),
    ],
)
def test_bad_shapes_are_named(shapes, words):
    with pytest.raises(ValueError) as caught:
        tiny()(*(torch.zeros(shape) for shape in shapes))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "got" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, -1])
def test_mini_context_size_must_be_positive(size):
    with pytest.raises(ValueError, match=f"mini_context_size must be at least 1, got {size}"):
        tiny()(*episode(), mini_context_size=size)


@pytest.mark.parametrize(
    "arguments", [{"channels": (8,)}, {"channels": ()}, {"channels": (4, 0)}, {"convs_per_block": 0}]
)
def test_bad_widths_are_refused(arguments):
    with pytest.raises(ValueError, match="at least two positive channel widths and one conv per block, got channels="):
        Neuroverse3D(**arguments)


@pytest.mark.parametrize("size", [(32, 32), (32, 0, 32), 0])
def test_bad_grid_is_refused(size):
    with pytest.raises(ValueError, match="one or three positive numbers of voxels, got"):
        Neuroverse3D(channels=(2, 4), spatial_size=size)


def test_grid_travels_as_a_buffer():
    assert tiny().state_dict()["grid"].tolist() == [128, 128, 128]
    assert tiny(spatial_size=(32, 48, 32)).grid.tolist() == [32, 48, 32]
    assert "grid" not in dict(tiny().named_parameters())


def test_compiled_parts_compute_the_same():
    network = Neuroverse3D(channels=(4, 8), spatial_size=8).eval()
    target, contexts = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 3, 1, 8, 8, 8)
    names, expected = list(network.state_dict()), network(target, contexts, contexts, 2)
    network.compile_parts(backend="aot_eager")  # traces as the default does, without compiling C++
    assert torch.allclose(network(target, contexts, contexts, 2), expected, atol=1e-6)
    network.train()(target, contexts, contexts, 2).mean().backward()
    assert all(p.grad is not None for p in network.parameters()) and list(network.state_dict()) == names
