"""Alignment of small made scenes: known transforms, other contrasts, other storage orders, crops, bad inputs."""

from __future__ import annotations

import itertools
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from scripts.registration import align, alignment, vote, vote_weights
from scripts.registration.alignment import FINEST, VOXEL_BUDGET, working_spacing
from scripts.registration.grids import Grid, grid_of
from scripts.registration.similarity import likeness

SIZE_MM = 48.0


class Scene:
    """Smooth random blobs inside an ellipsoid, in world coordinates: any pose and voxel size can be rendered."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        field = gaussian_filter(rng.standard_normal((56, 56, 56)), 4.0)
        self.field = (field - field.mean()) / field.std()
        bend = gaussian_filter(rng.standard_normal((3, 56, 56, 56)), (0, 7.0, 7.0, 7.0))
        self.bend = bend / bend.std()

    def value(self, world: np.ndarray) -> np.ndarray:
        """Intensity at world points (..., 3) in mm, the middle of the scene at 0."""
        found = map_coordinates(self.field, np.moveaxis(world + 27.5, -1, 0), order=1, mode="nearest")
        radius = np.sqrt(((world / np.array([17.0, 24.0, 14.0])) ** 2).sum(-1))
        return np.where(radius < 1, found + 4, 0.0) + 0.02 * found

    def scan(
        self, pose: np.ndarray | None = None, voxel_mm: float = 2.0, bend_mm: float = 0.0, size_mm: float = SIZE_MM
    ) -> MetaTensor:
        """A scan whose world point y shows the scene's point inv(pose) y."""
        count = round(size_mm / voxel_mm)
        affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
        affine[:3, 3] = -(count - 1) / 2 * voxel_mm
        index = np.stack(np.meshgrid(*[np.arange(count)] * 3, indexing="ij"), -1)
        world = index @ affine[:3, :3].T + affine[:3, 3]
        if pose is not None:
            inverse = np.linalg.inv(pose)
            world = world @ inverse[:3, :3].T + inverse[:3, 3]
        if bend_mm:
            at = np.moveaxis(world + 27.5, -1, 0)
            moves = [map_coordinates(component, at, order=1, mode="nearest") for component in self.bend]
            world = world + bend_mm * np.stack(moves, -1)
        return MetaTensor(torch.from_numpy(self.value(world)[None]).float(), affine=torch.from_numpy(affine))


def pose(angles_degrees: tuple[float, float, float] = (0, 0, 0), shift_mm: tuple[float, float, float] = (0, 0, 0)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles_degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def error_mm(found: torch.Tensor, wanted: np.ndarray, reach_mm: float = 12.0) -> float:
    """Longest distance at the corners of a box about the scene's middle."""
    corners = np.array(list(itertools.product((-reach_mm, reach_mm), repeat=3)))
    corners = np.c_[corners, np.ones(8)]
    return float(np.linalg.norm((corners @ (found.numpy() - wanted).T)[:, :3], axis=1).max())


def reoriented(volume: MetaTensor, order: tuple[int, ...], flips: tuple[bool, ...]) -> MetaTensor:
    """The same scan stored along other axes."""
    orientation = np.stack([order, np.where(flips, -1, 1)], 1)
    data = nib.orientations.apply_orientation(volume.as_tensor()[0].numpy(), orientation)
    affine = volume.affine.numpy() @ nib.orientations.inv_ornt_aff(orientation, volume.shape[1:])
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(data))[None], affine=torch.from_numpy(affine))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene()


def test_recovers_rotations_and_shifts_of_half_the_field_of_view(scene):
    poses = [pose(), pose((25, 0, 0)), pose((-20, 20, -15)), pose((0, 10, 25), (12, -10, 8)), pose(shift_mm=(0, 22, 0))]
    found = align(scene.scan(), [scene.scan(matrix) for matrix in poses], mode="affine")
    errors = [error_mm(affine, matrix) for affine, matrix in zip(found.affine, poses, strict=True)]
    assert max(errors) < 1.5, errors
    assert found.aligned.all() and found.displacement is None
    assert not found.searched[0] and found.searched[4]
    assert re.search("turned by 2[3-7]°", found.describe(1))
    assert "22 mm front" in found.describe(4)


def test_a_start_replaces_the_search(scene):
    wanted = pose((20, 0, 15), (5, 0, -6))
    start = torch.from_numpy(pose((17, 2, 13), (4, 1, -5)))[None]
    found = align(scene.scan(), [scene.scan(wanted)], mode="affine", start=start)
    assert error_mm(found.affine[0], wanted) < 1.5 < error_mm(start[0], wanted)
    assert not found.searched.any()


def test_deformable_follows_a_bend_without_folding(scene):
    target, bent = scene.scan(), scene.scan(bend_mm=2.0)
    found = align(target, [bent])
    inside = target.as_tensor() > 2
    errors = {
        m: (found.warp(bent, 0, target.shape[1:], target.affine, m) - target.as_tensor())[inside].abs().mean()
        for m in ("affine", "deformable")
    }
    assert errors["deformable"] < 0.75 * errors["affine"], errors
    assert float(found.folded[0]) == 0
    assert "bent by up to" in found.describe(0)


@pytest.mark.parametrize("kind", ["inverted", "squared", "biased"])
def test_other_contrast_ends_no_worse_than_unaligned(scene, kind):
    wanted = pose((6, -4, 8), (3, -2, 2))
    context = scene.scan(wanted)
    data = context.as_tensor()
    if kind == "inverted":
        data = torch.where(data > 1, 9 - data, data)
    elif kind == "squared":
        data = 1000 * (data - 4).square() + 500 * (data > 1)
    else:
        data = data * torch.linspace(0.3, 2.0, data.shape[2])[:, None]
    found = align(scene.scan(), [MetaTensor(data, affine=context.affine)], mode="affine")
    assert error_mm(found.affine[0], wanted) < 2.5
    assert error_mm(found.affine[0], wanted) < error_mm(torch.eye(4), wanted)
    assert found.kind == ("intensity" if kind == "biased" else "edges")


def test_intensities_of_another_contrast_do_not_bend_scans_in_the_end(scene, monkeypatch):
    target, bent = scene.scan(), scene.scan(bend_mm=2.0)
    other = MetaTensor(bent.max() + 1 - bent.as_tensor(), affine=bent.affine)
    found = {}
    for steps in (0, alignment.FINISHING_ITERATIONS):
        monkeypatch.setattr(alignment, "FINISHING_ITERATIONS", steps)
        found[steps] = [align(target, [context], kinds=("intensity",)).displacement for context in (bent, other)]
    (stiff, stiff_other), (soft, soft_other) = found.values()
    assert torch.equal(stiff_other, soft_other) and not torch.equal(stiff, soft)


def test_likeness_is_high_in_one_contrast_alone(scene):
    image = scene.scan().as_tensor()[None]
    others = torch.cat([3 * image, image.max() + 1 - image, torch.zeros_like(image)])
    same, inverse, nothing = likeness(image, others).tolist()
    assert same == pytest.approx(1, abs=1e-4) and inverse == pytest.approx(-1, abs=1e-4) and nothing == 0


def test_storage_order_changes_nothing(scene):
    target, context = scene.scan(voxel_mm=4.0), scene.scan(pose((12, 0, 8), (4, 0, -3)), voxel_mm=4.0)
    wanted = align(target, [context])
    for number, order in enumerate(itertools.permutations(range(3))):
        for flips in itertools.product((False, True), repeat=3):
            other = reoriented(context, order, flips) if number % 2 else context
            found = align(reoriented(target, order, flips), [other])
            assert torch.equal(found.affine, wanted.affine)
            assert torch.equal(found.displacement, wanted.displacement)


def test_spacing_of_the_target_changes_little(scene):
    context = scene.scan(pose((8, 0, 5), (3, 0, 0)), bend_mm=1.5)
    fine, coarse = align(scene.scan(voxel_mm=1.6), [context]), align(scene.scan(voxel_mm=2.0), [context])
    grid = scene.scan(voxel_mm=3.0)
    warped = [found.warp(context, 0, grid.shape[1:], grid.affine) for found in (fine, coarse)]
    inside = grid.as_tensor() > 2
    spread = grid.as_tensor()[inside].std()
    assert (warped[0] - warped[1])[inside].abs().mean() < 0.25 * spread


def test_working_voxels_are_finer_than_the_contexts_within_the_budget(scene):
    target, coarse, fine = (grid_of(scene.scan(voxel_mm=mm)) for mm in (4.0, 4.0, 3.0))
    assert working_spacing(target, [coarse]) == pytest.approx(FINEST * 4)
    assert working_spacing(target, [coarse, fine]) == pytest.approx(FINEST * 3)
    large = Grid((100, 100, 100), target.affine)
    assert working_spacing(large, [fine]) == pytest.approx(4 * (1e6 / VOXEL_BUDGET) ** (1 / 3))


@pytest.mark.parametrize("target_mm, context_mm", [(48.0, 32.0), (32.0, 48.0)])
def test_crops(scene, target_mm, context_mm):
    wanted = pose((8, 5, -6), (3, 2, 0))
    found = align(scene.scan(size_mm=target_mm), [scene.scan(wanted, size_mm=context_mm)], mode="affine")
    assert error_mm(found.affine[0], wanted, 6.0) < 1.5
    assert bool(found.aligned[0])


def test_oblique_and_anisotropic_voxels(scene):
    """The context's voxels are 2 x 2 x 4 mm along turned axes; its world is the target's."""
    turn = pose((15, 0, 10))
    rendered = scene.scan(np.linalg.inv(turn))
    thick = rendered.as_tensor().unfold(3, 2, 2).mean(-1)
    affine = rendered.affine.numpy() @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0.5], [0, 0, 0, 1]])
    context = MetaTensor(thick, affine=torch.from_numpy(turn @ affine))
    found = align(scene.scan(), [context], mode="affine")
    assert error_mm(found.affine[0], np.eye(4)) < 2.0


def test_deterministic_and_pairwise(scene):
    """A context's transform is the same again, and the same beside others of its size."""
    target, contexts = scene.scan(), [scene.scan(pose((10, 0, a))) for a in (0, 12, 25)]
    once, again = align(target, contexts), align(target, contexts)
    assert torch.equal(once.affine, again.affine) and torch.equal(once.displacement, again.displacement)
    alone = align(target, contexts[1:2])
    assert torch.allclose(alone.affine[0], once.affine[1], atol=1e-2)


def test_unrelated_scans_are_named_not_aligned(scene):
    rng = np.random.default_rng(3)
    noise = MetaTensor(torch.from_numpy(rng.standard_normal((1, 24, 24, 24))).float(), affine=scene.scan().affine)
    found = align(scene.scan(), [scene.scan(pose((5, 0, 0))), noise])
    assert found.aligned.tolist() == [True, False]
    with pytest.raises(ValueError, match="no context is aligned"):
        vote_weights(scene.scan().as_tensor(), torch.zeros(1, 1, 24, 24, 24), aligned=torch.tensor([False]))


def test_bad_inputs_are_named(scene):
    good = scene.scan()
    constant = MetaTensor(torch.ones(1, 8, 8, 8), affine=torch.eye(4))
    broken = good.clone()
    broken[0, 3, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="context 2 is constant"):
        align(good, [good, constant])
    with pytest.raises(ValueError, match="the target holds NaN"):
        align(broken, [good])
    with pytest.raises(ValueError, match="no context"):
        align(good, [])
    with pytest.raises(ValueError, match="mode must be one of"):
        align(good, [good], mode="rigid")
    with pytest.raises(ValueError, match="one 3D image"):
        align(good, [MetaTensor(torch.rand(2, 8, 8, 8), affine=torch.eye(4))])


def test_votes_follow_the_context_that_agrees(scene):
    target = scene.scan().as_tensor()
    other = Scene(7).scan().as_tensor()
    weights = vote_weights(target, torch.stack((target, other)))
    inside = target[0] > 2
    assert torch.allclose(weights.sum(0), torch.ones_like(weights[0]))
    assert weights[0, 0][inside].mean() > 0.65
    alone = vote_weights(target, torch.stack((target, other)), aligned=torch.tensor([False, True]))
    assert float(alone[0].max()) == 0
    masks = torch.stack((torch.ones_like(target), torch.zeros_like(target)))
    assert vote(weights, masks)[0][inside].mean() > 0.65
