"""Which labels share a region, and how fine its voxels are."""

import numpy as np
import pytest
import torch

from scripts.inference.regions import MARGIN_MM, extreme_points, group_labels, overlap_of_boxes


def box(low, high):
    """The corners of a box in mm, as the outermost points of a label."""
    return np.array(np.meshgrid(*zip(low, high, strict=True))).reshape(3, -1).T.astype(float)


def test_extreme_points_are_where_a_label_ends_in_the_world():
    mask = torch.zeros(8, 8, 8, dtype=torch.bool)
    mask[2:5, 3:7, 1:3] = True
    affine = torch.diag(torch.tensor([-2.0, 1.0, 3.0, 1.0]))
    affine[0, 3] = 10
    points = extreme_points(mask, affine)
    assert points.shape == (26, 3)
    assert points.min(0).tolist() == [2, 3, 3] and points.max(0).tolist() == [6, 6, 6]


def test_near_labels_share_a_region_and_far_ones_do_not():
    here, beside, far = box((0, 0, 0), (20, 20, 20)), box((15, 0, 0), (35, 20, 20)), box((150, 0, 0), (170, 20, 20))
    groups = group_labels([{1: here, 2: beside, 3: far}] * 3, [1, 2, 3], 1.0, 64**3)
    assert [group.values for group in groups] == [(1, 2), (3,)]
    assert all(group.spacing_mm == 1.0 and group.margin_mm >= MARGIN_MM for group in groups)


def test_a_small_structure_keeps_its_voxels_beside_a_large_one():
    whole, part = box((0, 0, 0), (140, 180, 140)), box((60, 80, 60), (75, 95, 70))
    groups = {group.values: group.spacing_mm for group in group_labels([{7: whole, 4: part}], [4, 7], 1.0, 40**3)}
    assert groups[4,] == 1.0 and groups[7,] > 2


@pytest.mark.parametrize("voxel_mm", [0.5, 3.0])
def test_no_region_is_finer_than_the_contexts(voxel_mm):
    (group,) = group_labels([{1: box((0, 0, 0), (10, 10, 10))}], [1], voxel_mm, 128**3)
    assert group.spacing_mm == voxel_mm


def test_groups_come_in_the_order_of_the_labels():
    points = [{v: box((200 * v, 0, 0), (200 * v + 9, 9, 9)) for v in (1, 2, 3)}]
    assert [group.values for group in group_labels(points, [3, 1, 2], 1.0, 32**3)] == [(3,), (1,), (2,)]


def test_a_label_that_no_context_has_is_no_fault():
    assert [g.values for g in group_labels([{1: box((0, 0, 0), (9, 9, 9))}], [1, 5], 1.0, 32**3)]


def test_overlap_of_boxes_tells_structures_from_lesions():
    rng = np.random.default_rng(0)
    structures = [{1: box(*(np.array([[40, 40, 40], [60, 60, 60]]) + rng.normal(0, 2, 3)))} for _ in range(6)]
    lesions = [{1: box(*(np.array([[0, 0, 0], [20, 20, 20]]) + rng.uniform(0, 120, 3)))} for _ in range(6)]
    assert overlap_of_boxes(structures, 1) > 0.5 and overlap_of_boxes(lesions, 1) < 0.1
    assert overlap_of_boxes(structures[:1], 1) == 1 and overlap_of_boxes(structures, 2) == 1
