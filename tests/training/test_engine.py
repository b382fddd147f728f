"""The training step: weights of groups, accumulation, autocast, augmentation on the device."""

from __future__ import annotations

import pytest
import torch
from monai.engines.utils import IterationEvents

from scripts.data.global_intensity import GlobalIntensityNonlinear
from scripts.losses import SmoothL3L1Loss
from scripts.networks import Neuroverse3D, blocks
from scripts.networks.kernels import conv3d
from scripts.training.engine import EpisodeInferer, GroupTrainer, prepare_episode
from scripts.training.handlers import ClipGradient


class Scale(torch.nn.Module):
    """One parameter; the prediction is the target times it."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, target_in, context_in, context_out, mini_context_size):
        self.contexts = context_in, context_out
        return target_in * self.scale


def group(members=3, weight=1.0, seed=0, generation=False, gin=-1, unpaired=False):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((1, members, 1, 8, 8, 8), generator=generator)
    return {
        "image": image,
        "label": image if generation else (image > 0.5).float(),
        "loss_weight": torch.tensor([weight]),
        "generation": torch.tensor([generation]),
        "unpaired": torch.tensor([unpaired]),
        "gin": torch.tensor([gin]),
    }


def trainer_of(groups, network=None, lr=0.1, **options):
    network = network or Scale()
    optimizer = torch.optim.SGD(network.parameters(), lr)
    trainer = GroupTrainer(
        "cpu",
        1,
        groups,
        network,
        optimizer,
        options.pop("loss", SmoothL3L1Loss()),
        prepare_batch=prepare_episode,
        to_kwargs={"mini_context_size": 2},
        decollate=False,
        **options,
    )
    trainer.scales = []
    if isinstance(network, Scale):
        optimizer.register_step_post_hook(lambda *_: trainer.scales.append(network.scale.item()))
    return trainer


def test_a_group_s_weight_multiplies_its_gradient():
    moved = []
    for weight in (1.0, 0.5, 0.0):
        trainer = trainer_of([group(members=2, weight=weight)], accumulation_steps=2)
        trainer.run()
        moved.append(1 - trainer.scales[-1])
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-3) and moved[0] != 0 and moved[2] == 0


def test_of_a_group_that_says_so_the_first_member_alone_is_the_target():
    steps = []
    for more in ({}, {"targets": torch.tensor([1])}):
        trainer = trainer_of([group(members=3) | more])
        trainer.run()
        steps.append(len(trainer.scales))
    assert steps == [3, 1]


def test_weights_hold_within_a_batch():
    first, second = group(seed=1), group(seed=2)
    both = {name: torch.cat((first[name], second[name])) for name in first}
    both["loss_weight"] = torch.tensor([1.0, 0.0])
    loss = SmoothL3L1Loss()
    pred, label = both["image"][:, 0], both["label"][:, 0]
    weighted = loss(pred, label, both["loss_weight"])
    assert weighted == pytest.approx(loss(pred[:1], label[:1]).item() / 2)
    trainer = trainer_of([both])
    trainer.run()
    assert torch.isfinite(trainer.state.output[0]["loss"])


def test_any_loss_does_without_weights():
    trainer = trainer_of([group()], loss=torch.nn.MSELoss())
    trainer.run()
    assert len(trainer.scales) == 3


def test_accumulated_gradients_are_the_mean_s_gradient():
    groups = [group(members=3, seed=1)]
    trainer = trainer_of(groups, accumulation_steps=3)
    trainer.run()
    network, loss = Scale(), SmoothL3L1Loss()
    images, labels = groups[0]["image"][0], groups[0]["label"][0]
    (sum(loss(image * network.scale, label) for image, label in zip(images, labels, strict=True)) / 3).backward()
    assert len(trainer.scales) == 1
    assert trainer.scales[0] == pytest.approx(1 - 0.1 * network.scale.grad.item(), rel=1e-5)


def test_the_rest_of_an_epoch_is_a_mean_too():
    seen = []
    trainer = trainer_of([group(members=3, seed=1)], accumulation_steps=2, lr=0.0)
    network = trainer.network
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda engine: seen.append(network.scale.grad.item()))
    trainer.run()
    images, labels = (group(members=3, seed=1)[name][0] for name in ("image", "label"))
    alone = Scale()
    SmoothL3L1Loss()(images[2] * alone.scale, labels[2]).backward()
    assert seen[2] == pytest.approx(alone.scale.grad.item(), rel=1e-5)


@pytest.mark.parametrize("accumulation_steps, steps", [(1, 9), (2, 5), (4, 3), (9, 1), (20, 1)])
def test_steps_of_an_epoch(accumulation_steps, steps):
    trainer = trainer_of([group(seed=s) for s in range(3)], accumulation_steps=accumulation_steps)
    trainer.run()
    assert len(trainer.scales) == steps, "the rest of an epoch is not lost"


def test_gradients_are_clipped_once_before_a_step():
    network, norms = Scale(), []
    trainer = trainer_of([group(members=4)], network, accumulation_steps=2)
    ClipGradient(network, 1e-3).attach(trainer)
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda engine: norms.append((engine.steps_now, network.scale.grad.norm()))
    )
    trainer.run()
    assert [now for now, _ in norms] == [False, True, False, True]
    assert all((norm <= 1.001e-3) == now for now, norm in norms)


def test_gin_changes_the_images_as_its_seed_says():
    gin, network = GlobalIntensityNonlinear(), Scale()
    with_gin, without = group(gin=5), group()
    trainer = trainer_of([with_gin], network, gin=gin)
    trainer.run()
    changed = gin(with_gin["image"][0], 5)
    assert torch.allclose(trainer.state.output[0]["image"][0], changed[2])
    assert torch.allclose(network.contexts[0][0], changed[:2])
    assert not torch.allclose(changed, with_gin["image"][0])
    trainer = trainer_of([without], gin=gin)
    trainer.run()
    assert torch.equal(trainer.state.output[0]["image"][0], without["image"][0, 2])


def test_unpaired_contexts_have_each_other_s_labels():
    network = Scale()
    plain, unpaired = group(members=4), group(members=4, unpaired=True)
    trainer_of([unpaired], network).run()
    images, labels = network.contexts
    expected_images, expected_labels = plain["image"][0, :3], plain["label"][0, :3]
    assert torch.equal(images[0], expected_images)
    assert torch.equal(labels[0], expected_labels[[2, 0, 1]])
    both = {name: torch.cat((plain[name], unpaired[name])) for name in plain}
    _, label, _, kwargs = prepare_episode(both | {"target": 3})
    assert torch.equal(kwargs["context_out"][0], expected_labels)
    assert torch.equal(kwargs["context_out"][1], expected_labels[[2, 0, 1]])
    assert torch.equal(label[1], plain["label"][0, 3]), "the target keeps its own"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_autocast_reaches_the_convolutions(name, monkeypatch):
    network, seen = Neuroverse3D(channels=(4, 8), spatial_size=8), set()

    def watched(*args, **kwargs):
        output = conv3d(*args, **kwargs)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(blocks, "conv3d", watched)
    x = torch.rand(1, 1, 8, 8, 8)
    contexts = {"context_in": x[None], "context_out": x[None]}
    pred = EpisodeInferer(amp=True, amp_dtype=name)(x, network, **contexts)
    assert seen == {getattr(torch, name)} and pred.dtype == torch.float32
    seen.clear()
    EpisodeInferer(amp=False, amp_dtype=name)(x, network, **contexts)
    assert seen == {torch.float32}


def test_unknown_autocast_type():
    with pytest.raises(ValueError, match="bfloat16 or float16, got 'fp8'"):
        EpisodeInferer(amp_dtype="fp8")


def test_float16_gradients_are_scaled_and_clipped_unscaled():
    norms = []
    network = Scale()
    trainer = trainer_of([group()], network, fp16=True)
    trainer.add_event_handler(
        IterationEvents.BACKWARD_COMPLETED, lambda engine: norms.append(network.scale.grad.item())
    )
    trainer.run()
    plain = trainer_of([group()])
    plain.run()
    assert trainer.grad_scaler.get_scale() > 1 and trainer.scales == pytest.approx(plain.scales, rel=1e-5)
    assert max(map(abs, norms)) < 10, "unscaled before the handlers see them"


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_changes_nothing_but_memory(training):
    networks = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Neuroverse3D(channels=(4, 8, 8), spatial_size=16, activation_checkpointing=checkpointing)
        network.train(training)
        torch.manual_seed(1)
        x, contexts = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 3, 1, 16, 16, 16)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            pred = network(x, contexts, contexts, 2)
        pred.square().mean().backward()
        networks.append((pred.detach(), [p.grad for p in network.parameters()], sum(saved)))
    (pred, grads, kept), (pred_again, grads_again, kept_again) = networks
    assert torch.equal(pred, pred_again) and all(map(torch.equal, grads, grads_again))
    assert kept_again < kept / 2
