"""Leave one out over the contexts, with predictors whose answer is known."""

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.data.label_decision import winning_label
from scripts.data.preprocessing import PlacedScores, Preprocessing
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.context_pairs import Example
from scripts.inference.contexts import ContextSet
from scripts.inference.self_test import (
    dice_by_label,
    dice_in_views,
    fellows,
    held_out,
    predictable,
    spread,
    summary,
    table,
)
from scripts.inference.views import WholeView
from scripts.inferer import ICLInferer

SIZE = 8


class Given(ContextSet):
    """Contexts that are on the grid already."""

    def __init__(self, images, labels, digests):
        examples = [Example(f"context {i}", "", "", digest, digest) for i, digest in enumerate(digests)]
        super().__init__(examples, Preprocessing((SIZE,) * 3, 1.0))
        for number, pair in enumerate(zip(images, labels, strict=True)):
            values = tuple(sorted(set(pair[1].flatten().tolist()) - {0}))
            self._pairs._on_grid.put(number, (*pair, (0.0, 1.0), values))


def context_set(labels, digests=None):
    """Contexts with these label maps ``(8, 8, 8)``; every image is its own number."""
    count = len(labels)
    images = torch.arange(count).float()[:, None, None, None, None].expand(count, 1, SIZE, SIZE, SIZE)
    stacked = torch.stack([torch.as_tensor(label) for label in labels])[:, None].int()
    return Given(images, stacked, digests or [str(i) for i in range(count)])


def box(value=1, start=2, stop=6):
    label = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.int32)
    label[start:stop, 2:6, 2:6] = value
    return label


class LabelAverage(torch.nn.Module):
    """Predicts the mean of the labels it is shown, and keeps how many."""

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.tensor((SIZE,) * 3))
        self.shown = []

    def forward(self, target, images, labels, mini_context_size):
        self.shown.append(labels.shape[1])
        return labels.mean(1)


def self_tested(labels):
    """Self-test of contexts with these label maps, and how many contexts each was predicted from."""
    images = [torch.rand(SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(i)) for i in range(len(labels))]
    predictor = ICLInferer(LabelAverage(), device="cpu", spacing=1.0, align="off")
    predictor.set_context(images, labels)
    return ConfidentInferer(predictor, self_test=True, progress=False).prepare(), predictor.network.shown


def test_the_highest_score_above_the_threshold_wins():
    scores = torch.tensor([[0.49, 0.6, 0.6, 0.2], [0.02, 0.7, 0.5, 0.51]])[:, None, None]
    assert winning_label(scores).flatten().tolist() == [0, 2, 1, 2]


def test_labels_that_touch_leave_no_gap():
    scores = torch.tensor([[0.45, 0.45, 0.26, 0.3], [0.4, 0.04, 0.25, 0.2]])[:, None, None]
    assert winning_label(scores).flatten().tolist() == [1, 0, 0, 0]
    assert winning_label(torch.tensor([[0.51, 0.5]])[:, None, None]).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_labels_are_decided_as_in_answers(count):
    image = torch.rand(1, SIZE, SIZE, SIZE)
    preprocessing = Preprocessing((SIZE,) * 3, 1.0)
    target = preprocessing.target(MetaTensor(image, affine=torch.eye(4)))  # on its own voxels
    scores = torch.rand(count, SIZE, SIZE, SIZE) * 0.8 - 0.1
    answer = preprocessing.to_native_labels({k + 1: PlacedScores(score, target) for k, score in enumerate(scores)})
    assert torch.equal(winning_label(scores), answer.long()) and 0.1 < (answer > 0).float().mean() < 0.95


def test_dice_by_label():
    answer, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 0, 0])
    dice = dice_by_label(answer[None, None, None], truth[None, None, None], 3)
    assert dice[0] == pytest.approx(2 / 3) and dice[1] == 0 and math.isnan(dice[2])


def test_only_labels_that_another_context_has_are_tested():
    both = box(1) + box(2, 6, 8)
    context = context_set([both, box(1), box(1), box(3), torch.zeros(SIZE, SIZE, SIZE)])
    assert predictable(context, [1, 2, 3]) == {0: [1], 1: [1], 2: [1]}


def test_a_copy_of_a_context_is_not_a_fellow():
    context = context_set([box(1)] * 3, digests=["a", "b", "a"])
    assert [fellows(context, i) for i in range(3)] == [[1], [0, 2], [1]]
    assert predictable(context_set([box(1)] * 2, digests=["a", "a"]), [1]) == {}


@pytest.mark.parametrize(("count", "limit", "chosen"), [(3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (1, 1, [0]), (0, 4, [])])
def test_spread(count, limit, chosen):
    assert spread(range(count), limit) == chosen


def test_no_context_is_predicted_from_itself():
    found, shown = self_tested([box(1)] * 4)
    assert found["contexts"] == {f"context {i + 1}": {"1": 1.0} for i in range(4)}
    assert shown == [3] * 4


def test_no_more_contexts_are_tested_than_asked_for():
    context = context_set([box(1)] * 4)
    context.counted_native = lambda number: (None, None, None)
    assert [number for number, *_ in held_out(context, [1], limit=2, progress=False)] == [0, 3]


def test_the_context_with_a_wrong_label_is_named():
    labels = [box(1) + box(7, 6, 7) for _ in range(6)]
    labels[4] = box(7) + box(1, 6, 7)  # exchanged
    found, _ = self_tested(labels)
    assert found["worst"] == "context 5" and found["out_of_line"] == ["context 5"]
    assert found["lowest_dice"]["1"] == 0 and found["mean_dice"]["1"] == pytest.approx(5 / 6, abs=1e-4)
    assert "lowest: context 5 (label 1: 0.000, label 7: 0.000)" in table(found)


def test_what_of_a_label_lies_outside_of_the_view_is_missed():
    label = MetaTensor(box(1, 2, 6)[None].float(), affine=torch.eye(4))
    scan = MetaTensor(torch.rand(1, SIZE, SIZE, SIZE), affine=torch.eye(4))
    half = Preprocessing((1, 1, 1), 1.0).target(scan, [(0, 4), (0, SIZE), (0, SIZE)])
    view = WholeView(half, [1], None)
    winner = Preprocessing.label_on(label, half).long()
    assert dice_in_views([view], [winner], label)[1] == pytest.approx(2 / 3)


def test_summary_of_contexts_that_agree():
    found = summary({"a": {1: 0.9}, "b": {1: 0.8, 2: 0.7}})
    assert found["mean_dice"] == {"1": 0.85, "2": 0.7}
    assert found["sd_dice"] == {"1": pytest.approx(np.std([0.9, 0.8], ddof=1), abs=1e-4), "2": None}
    assert found["contexts"]["b"] == {"1": 0.8, "2": 0.7}
    assert found["worst"] == "b" and found["out_of_line"] == []
    assert len(table(found).splitlines()) == 4
