"""Random changes of a whole group, alike for all of its members.

In-context learning lives on one relation between images and labels that all members of a group share. So every
change is drawn once and done to the whole group: the members lie in the channel dimension of MONAI's transforms,
which treat all channels alike. Which changes, how likely and how strong is the training recipe of Neuroverse3D
(Hu et al., ICCV 2025, arXiv 2503.02410, and the published code).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from numbers import Real

import numpy as np
import torch
from monai.transforms import (
    Flip,
    Rand3DElasticd,
    RandGaussianNoise,
    Resize,
    Rotate90,
    ScaleIntensity,
    ShiftIntensity,
    SobelGradients,
)
from monai.transforms.utils_morphological_ops import dilate, erode
from monai.utils import convert_to_tensor
from torch import Tensor

NO_GIN = -1
"""Seed of a group that gets no :class:`scripts.data.global_intensity.GlobalIntensityNonlinear`."""

_PLANES = tuple(combinations(range(3), 2))
_AXIS_FACTORS = (2, 3, 4)
_SHIFT = 0.2
_SCALE = 0.1
_NOISE_STD = 0.02
_GENERATION_NOISE = ((0.025, 1.0), (0.05, 0.5), (0.075, 0.25))  # largest standard deviation, share of noise_prob
_ELASTIC_GRID = 128  # the grid that the recipe's sigma and magnitude are meant for
_ELASTIC_SIGMA = (7.0, 8.0)  # voxels of that grid
_ELASTIC_MAGNITUDE = (100.0, 200.0)  # factor on smoothed noise: displacements of about half a voxel to a voxel of it
_ELASTIC_ROTATION = 0.3  # radians
_ELASTIC_SCALE = 0.2
_ELASTIC_SCALE_GENERATION = 0.1
_EDGE_SHARE = 0.3  # of a mask's strongest gradient


class GroupAugmentation:
    """Draws the changes of a group and makes them.

    Each is drawn on its own with its probability, in the order geometry (flips, turns, elastic, turns of members, low
    resolution), then segmentation label (invert, edges, morphology), then intensity (invert, shift, scale, noise).
    Images are interpolated linearly, segmentation labels by nearest neighbour, so that these stay 0 and 1. A change
    that would take all foreground from a member that has some is not made to any member: an empty mask teaches
    nothing.

    Args:
        flip_prob: mirrored, drawn per axis.
        rotate90_prob: turned by 90, 180 or 270 degrees, drawn per plane; only in planes with two equal sides.
        member_rotate90_prob: turned so in one plane, each member on its own. Meant for synthetic data, with 0.25: real
            anatomy has an upright position that the members should share.
        low_resolution_prob: every 2nd, 3rd or 4th voxel of one axis kept and interpolated between, as from distant
            slices; the label likewise.
        shift_prob: up to 0.2 added, either way; to the output as well in generation tasks. Values may leave [0, 1].
            Scaling each member to [0, 1] afterwards would undo this and the next.
        scale_prob: times 0.9 to 1.1; the output as well in generation tasks.
        noise_prob: Gaussian noise on the image. The standard deviation is shared and uniform below a limit, the noise
            every member's own. Segmentation: limit 0.02. Generation: limits 0.025, 0.05 and 0.075, each drawn on
            its own with 1, 1/2 and 1/4 of this probability.
        elastic_prob: affine (rotation up to 0.3 rad about each axis, scale up to 0.2 either way, 0.1 in generation
            tasks) and smooth deformation. The recipe's sigma (7 to 8 voxels) and magnitude (100 to 200) are for 128³.
            On a grid of n voxels per side (geometric mean) they are multiplied by n/128 and (n/128)^2.5, which
            displaces by the same share of the volume and so folds as little. What comes in from outside is 0.
        image_invert_prob: 1 - image. The input alone in generation tasks too, as in the published code: the contexts
            show the output's contrast, and the pair of contrasts is one more task.
        label_invert_prob: segmentation only: background for foreground.
        sobel_prob: segmentation only: the label's edges for the label.
        morphology_prob: segmentation only: label dilated or eroded by one voxel, even odds.
        gin_prob: a seed for :class:`scripts.data.global_intensity.GlobalIntensityNonlinear`, which runs on the
            engine's device.

    Raises:
        ValueError: a probability is not a number from 0 to 1.
    """

    def __init__(
        self,
        flip_prob: float = 0.1,
        rotate90_prob: float = 0.1,
        member_rotate90_prob: float = 0.0,
        low_resolution_prob: float = 0.15,
        shift_prob: float = 0.2,
        scale_prob: float = 0.2,
        noise_prob: float = 0.1,
        elastic_prob: float = 0.05,
        image_invert_prob: float = 0.05,
        label_invert_prob: float = 0.05,
        sobel_prob: float = 0.05,
        morphology_prob: float = 0.05,
        gin_prob: float = 0.05,
    ) -> None:
        self.flip_prob = _probability("flip_prob", flip_prob)
        self.rotate90_prob = _probability("rotate90_prob", rotate90_prob)
        self.member_rotate90_prob = _probability("member_rotate90_prob", member_rotate90_prob)
        self.low_resolution_prob = _probability("low_resolution_prob", low_resolution_prob)
        self.shift_prob = _probability("shift_prob", shift_prob)
        self.scale_prob = _probability("scale_prob", scale_prob)
        self.noise_prob = _probability("noise_prob", noise_prob)
        self.elastic_prob = _probability("elastic_prob", elastic_prob)
        self.image_invert_prob = _probability("image_invert_prob", image_invert_prob)
        self.label_invert_prob = _probability("label_invert_prob", label_invert_prob)
        self.sobel_prob = _probability("sobel_prob", sobel_prob)
        self.morphology_prob = _probability("morphology_prob", morphology_prob)
        self.gin_prob = _probability("gin_prob", gin_prob)

    def __call__(
        self, image: Tensor, label: Tensor, generation: bool, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """Change one group.

        Args:
            image: ``(N, 1, H, W, D)`` float32, about [0, 1].
            label: the same shape: uint8 0 or 1 for segmentation, an image in [0, 1] for generation tasks.
            generation: the label is an image.
            rng: decides everything; the same state gives the same group.

        Returns:
            Image and label (the arguments are never written to, and may share their memory where nothing was drawn),
            and the seed for the GIN, not negative, or -1 (:data:`NO_GIN`).

        Raises:
            ValueError: the shapes are not those of a group.
        """
        if image.ndim != 5 or image.shape[1] != 1 or image.shape != label.shape:
            raise ValueError(
                f"image and label of a group must both be (N, 1, H, W, D), got {tuple(image.shape)} "
                f"and {tuple(label.shape)}"
            )
        image, label = self._change_geometry(image.squeeze(1), label.squeeze(1), generation, rng)
        if not generation:
            label = self._change_mask(label, rng)
        image, label = self._change_intensity(image, label, generation, rng)
        gin_seed = int(rng.integers(2**63 - 1)) if rng.random() < self.gin_prob else NO_GIN
        return image.unsqueeze(1), label.unsqueeze(1), gin_seed

    def follow(self, mask: Tensor, label: Tensor, generation: bool, rng: np.random.Generator) -> Tensor:
        """Where a mask of a group's voxels comes to lie by the change of geometry that the same arguments make.

        Args:
            mask: ``(N, 1, H, W, D)`` boolean.
            label: as in the call; what is dropped for the sake of small structures is so here too.
            generation: the same.
            rng: in the state that the call gets it in.

        Returns:
            ``(N, 1, H, W, D)`` boolean: every voxel that a masked one has a part in.
        """
        moved, _ = self._change_geometry(mask.squeeze(1).float(), label.squeeze(1), generation, rng)
        return moved.unsqueeze(1) > 0

    def _change_geometry(
        self, image: Tensor, label: Tensor, generation: bool, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        planes = [plane for plane in _PLANES if image.shape[1 + plane[0]] == image.shape[1 + plane[1]]]
        turns: list[Callable] = []
        if flipped := [axis for axis in range(3) if rng.random() < self.flip_prob]:
            turns.append(Flip(flipped))
        turns += [Rotate90(int(rng.integers(1, 4)), plane) for plane in planes if rng.random() < self.rotate90_prob]
        for turn in turns:
            image, label = _plain(turn(image)), _plain(turn(label))
        if rng.random() < self.elastic_prob:
            deformed = _deform(image, label, generation, rng)
            if generation or _all_kept(label, deformed[1]):
                image, label = deformed
        image, label = self._turn_members(image, label, planes, rng)
        if rng.random() < self.low_resolution_prob:
            axis, factor = int(rng.integers(3)), int(rng.choice(_AXIS_FACTORS))
            coarse = _coarsen(label, axis, factor, mask=not generation)
            if generation or _all_kept(label, coarse):
                image, label = _coarsen(image, axis, factor, mask=False), coarse
        return image, label

    def _turn_members(
        self, image: Tensor, label: Tensor, planes: list[tuple[int, int]], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        members_rng = np.random.default_rng(rng.integers(2**63 - 1))  # what follows must not depend on their number
        turns = {
            member: Rotate90(int(members_rng.integers(1, 4)), planes[members_rng.integers(len(planes))])
            for member in range(len(image))
            if planes and members_rng.random() < self.member_rotate90_prob
        }
        if turns:
            image, label = image.clone(), label.clone()
        for member, turn in turns.items():
            for volume in (image, label):
                volume[member] = _plain(turn(volume[member : member + 1]))[0]
        return image, label

    def _change_mask(self, mask: Tensor, rng: np.random.Generator) -> Tensor:
        changes: list[Callable[[Tensor], Tensor]] = []
        if rng.random() < self.label_invert_prob:
            changes.append(_invert)
        if rng.random() < self.sobel_prob:
            changes.append(_edges)
        if rng.random() < self.morphology_prob:
            changes.append(_dilate if rng.random() < 0.5 else _erode)
        for change in changes:
            changed = change(mask)
            if _all_kept(mask, changed):
                mask = changed
        return mask

    def _change_intensity(
        self, image: Tensor, label: Tensor, generation: bool, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if rng.random() < self.image_invert_prob:
            image = _invert(image)
        changes: list[Callable] = []
        if rng.random() < self.shift_prob:
            changes.append(ShiftIntensity(rng.uniform(-_SHIFT, _SHIFT)))
        if rng.random() < self.scale_prob:
            changes.append(ScaleIntensity(minv=None, maxv=None, factor=rng.uniform(-_SCALE, _SCALE)))
        for change in changes:
            image = _plain(change(image))
            label = _plain(change(label)) if generation else label
        for limit, share in _GENERATION_NOISE if generation else ((_NOISE_STD, 1.0),):
            if rng.random() < self.noise_prob * share:
                image = _add_noise(image, rng.uniform(0, limit), rng)
        return image, label


def _probability(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def _plain(volume: Tensor) -> Tensor:
    """Without the metadata that MONAI's transforms attach: groups are collated as plain tensors."""
    return convert_to_tensor(volume, track_meta=False)


def _all_kept(before: Tensor, after: Tensor) -> bool:
    """Whether every mask of ``before`` (N, H, W, D) that has foreground still has some."""
    before, after = (masks.flatten(1).any(dim=1) for masks in (before, after))
    return bool((after | ~before).all())


def _monai_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32 - 1))  # MONAI's transforms keep their own generator, of 32-bit seeds


def _deform(image: Tensor, label: Tensor, generation: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    # Smoothing white noise over sigma voxels leaves a standard deviation in proportion to sigma^-1.5; with sigma in
    # proportion to the grid, displacements are so too where the magnitude goes with the power 2.5.
    relative = math.prod(image.shape[1:]) ** (1 / 3) / _ELASTIC_GRID
    transform = Rand3DElasticd(
        ("image", "label"),
        sigma_range=tuple(sigma * relative for sigma in _ELASTIC_SIGMA),
        magnitude_range=tuple(magnitude * relative**2.5 for magnitude in _ELASTIC_MAGNITUDE),
        prob=1.0,
        rotate_range=(_ELASTIC_ROTATION,) * 3,
        scale_range=(_ELASTIC_SCALE_GENERATION if generation else _ELASTIC_SCALE,) * 3,
        mode=("bilinear", "bilinear" if generation else "nearest"),
        padding_mode="zeros",  # as the padding of the preprocessing
    ).set_random_state(seed=_monai_seed(rng))
    deformed = transform({"image": image, "label": label})
    return _plain(deformed["image"]), _plain(deformed["label"]).to(label.dtype)


def _coarsen(volume: Tensor, axis: int, factor: int, mask: bool) -> Tensor:
    # MONAI's RandSimulateLowResolution, whose modes these are, coarsens all axes; Resize can do a single one. Images
    # are not averaged on the way, so that image and mask come from the same voxels and stay on top of each other.
    size = list(volume.shape[1:])
    coarse = size.copy()
    coarse[axis] = max(1, round(size[axis] / factor))
    few = Resize(coarse, mode="nearest-exact")(volume)
    return _plain(Resize(size, mode="nearest-exact" if mask else "trilinear")(few)).to(volume.dtype)


def _invert(volume: Tensor) -> Tensor:
    return 1 - volume


def _edges(masks: Tensor) -> Tensor:
    """Voxels on either side of a mask's border; member by member, as gradients take three times its memory."""
    sobel = SobelGradients()
    edges = torch.empty_like(masks)
    for mask, edge in zip(masks, edges, strict=True):
        strength = _plain(sobel(mask[None].float())).norm(dim=0)
        edge.copy_(strength > _EDGE_SHARE * strength.max())
    return edges


def _dilate(masks: Tensor) -> Tensor:
    return dilate(masks.unsqueeze(1).float()).squeeze(1).to(masks.dtype)


def _erode(masks: Tensor) -> Tensor:
    return erode(masks.unsqueeze(1).float()).squeeze(1).to(masks.dtype)


def _add_noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
    noise = RandGaussianNoise(prob=1.0, std=std, sample_std=False).set_random_state(seed=_monai_seed(rng))
    return torch.stack([_plain(noise(member)) for member in image])  # one at a time: it is drawn in float64
