"""Synthetic cohorts: subjects that share one hidden anatomy, and whose labels therefore correspond.

A cohort is what an in-context network learns from: given some labelled subjects, label another one. The recipe
follows SynthICL (arXiv 2509.19711: a container, a layout of pseudo-organs from a pool of shapes, subjects by
deformation), SynthSeg (Billot et al. 2023, Medical Image Analysis 86: contrast drawn per label, bias field, blur,
noise, gamma) and SynthMorph (Hoffmann et al. 2021, IEEE TMI: shapes from smooth noise). No published code is used.

1. *Anatomy*, once per cohort: a head-like container with an outer rim, ``num_labels`` labelled structures and a few
   unlabelled ones. A structure is a level field (ellipsoid, tube, shell or blob) cut where it reaches its volume
   inside the space that is still free, so that none is lost or overlapped.
2. *Subject*: the anatomy seen through a random affine and a smooth displacement. They are strong enough that a
   label cannot be guessed from where it lies in the other subjects.
3. *Image*: mean and standard deviation per tissue, nearly the same for all subjects of a cohort and very different
   between cohorts, then bias field, blur, noise and gamma.

Coordinates run from -1 to 1 along every axis of the grid, voxel centres at ``(2 i + 1) / n - 1``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import gaussian_1d, separable_filtering
from monai.utils import ensure_tuple_rep
from torch import Generator, Tensor
from tqdm import tqdm

from scripts.atomic import put_folder_in_place

MIN_SIZE = 16
"""Fewest voxels along an axis of a grid on which structures still have a shape."""

MAX_LABELS = 16
"""Most labels of a cohort; more would not fit into the container with a sensible volume each."""

MIN_LABEL_FRACTION = 0.003
"""Least share of a subject's voxels that every label has."""

MIN_CONTRAST = 0.15
"""Least difference between the mean of a labelled structure and that of the tissue around it, before gamma."""

INTENSITY_SCALE = 1000
"""Value in the written int16 images that stands for the intensity 1."""

_LABEL_FRACTION = (0.02, 0.1)  # share of the voxels that a structure has in the anatomy
_SUBJECT_CONTRAST = 0.025  # how far a tissue's mean may lie from the cohort's, either way
_ROTATION_DEGREES = 15.0
_SCALE = 0.1
_SHIFT = 0.2  # a tenth of the grid, which is 2 wide
_DISPLACEMENT = ((4, 0.065), (8, 0.02))  # control points per axis, standard deviation
_ANATOMY_ATTEMPTS = 20


def synthesize_cohort(
    seed: int | Sequence[int], subjects: int, spatial_size: int | Sequence[int], num_labels: int = 4
) -> tuple[Tensor, Tensor]:
    """Draw one cohort; the same arguments give the same tensors, and no global random state is touched.

    A subject depends on the seed and its own number only: asking for more subjects leaves the first ones as they are.

    Args:
        seed: not negative; or several, such as (run, cohort).
        subjects: how many subjects N.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labelled structures.

    Returns:
        images (N, 1, H, W, D) float32 within [0, 1], and labels (N, 1, H, W, D) uint8 with the values
        0 … ``num_labels``, each of which every subject has.

    Raises:
        ValueError: an argument is out of range, or so many labels do not fit into so small a grid.
    """
    size = _checked_size(spatial_size)
    _check_range("subjects", subjects, 1)
    _check_range("num_labels", num_labels, 1, MAX_LABELS)
    generator = _generator(seed, 0)
    tissues = _draw_anatomy(generator, size, num_labels)
    contrast = _draw_contrast(generator, len(tissues), num_labels)
    images, labels = [], []
    for subject in range(subjects):
        generator = _generator(seed, subject + 1)
        seen, label = _draw_subject(generator, tissues, num_labels)
        images.append(_draw_image(generator, seen, contrast))
        labels.append(label)
    return torch.stack(images).unsqueeze(1), torch.stack(labels).unsqueeze(1)


def write_cohorts(
    output_dir: str | os.PathLike,
    cohorts: int,
    subjects: int,
    spatial_size: int | Sequence[int] = 64,
    num_labels: int = 4,
    seed: int = 0,
    spacing_mm: float = 1.0,
    start_id: int = 900,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Write cohorts as nnU-Net v2 datasets: ``Dataset900_Synthetic000``, ``Dataset901_Synthetic001`` and so on.

    A dataset appears complete or not at all, whenever the run is interrupted.

    Args:
        output_dir: folder to hold the datasets; made if missing.
        cohorts: how many datasets.
        subjects: how many cases in each.
        spatial_size: voxels along each axis, one number or three.
        num_labels: how many labelled structures.
        seed: of the run; cohort i is ``synthesize_cohort((seed, i), …)``.
        spacing_mm: edge length of a voxel.
        start_id: number of the first dataset.
        overwrite: replace datasets of the same name; nothing else in the folder is touched.
        progress: show a bar.

    Returns:
        The dataset folders.

    Raises:
        FileExistsError: a dataset to be written, or another one of the same number, is there already.
        ValueError: an argument is out of range.
    """
    output_dir = Path(output_dir)
    size = _checked_size(spatial_size)
    _check_range("cohorts", cohorts, 1)
    _check_range("subjects", subjects, 1)
    _check_range("num_labels", num_labels, 1, MAX_LABELS)
    _check_range("seed", seed, 0)
    _check_range("start_id", start_id, 1)
    if not 0 < spacing_mm < math.inf:
        raise ValueError(f"spacing_mm must be a positive number, got {spacing_mm}")
    folders = [output_dir / f"Dataset{start_id + i:03d}_Synthetic{i:03d}" for i in range(cohorts)]
    _check_free(output_dir, folders, overwrite)
    output_dir.mkdir(parents=True, exist_ok=True)
    for i, folder in enumerate(tqdm(folders, desc="synthesize", unit="cohort", disable=not progress)):
        images, labels = synthesize_cohort((seed, i), subjects, size, num_labels)
        # a hidden sibling: same file system, so that the dataset can be renamed into its place in one step
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".synthesize-") as staging:
            made = Path(staging) / folder.name
            _write_dataset(made, images, labels, num_labels, spacing_mm, f"synthetic{start_id + i:03d}", (seed, i))
            put_folder_in_place(made, folder, Path(staging) / "replaced")
    return folders


# --- anatomy


def _draw_anatomy(generator: Generator, size: tuple[int, ...], num_labels: int) -> Tensor:
    """One-hot tissues (C, H, W, D): background, the labels, container, rim, unlabelled structures."""
    unlabelled = int(_uniform(generator, 2, 5))
    for _ in range(_ANATOMY_ATTEMPTS):
        depth = _container_depth(generator, size)
        container, interior = depth < 1, depth < 0.88
        structures = _place_structures(generator, interior, num_labels + unlabelled, container.sum().item())
        if min(int(s.sum()) for s in structures[:num_labels]) > 1.5 * MIN_LABEL_FRACTION * depth.numel():
            break
    else:
        raise ValueError(f"{num_labels} labels do not fit into a grid of {size}: use fewer labels or a larger grid")
    rim = container & (depth > _uniform(generator, 0.9, 1.0).item())
    taken = torch.stack([*structures, rim]).any(0)
    labelled, distractors = structures[:num_labels], structures[num_labels:]
    return torch.stack([~container, *labelled, container & ~taken, rim, *distractors]).float()


def _container_depth(generator: Generator, size: tuple[int, ...]) -> Tensor:
    """0 in the middle of an ellipsoid with an uneven surface, 1 on its surface, more outside."""
    semi_axes = _uniform(generator, 0.74, 0.88, 3)
    unevenness = _smooth_noise(generator, 1, 4, size)[0].clamp(-2, 2)
    return torch.linalg.vector_norm(_coordinates(size) / semi_axes, dim=-1) * (1 + 0.04 * unevenness)


def _place_structures(generator: Generator, interior: Tensor, count: int, container_voxels: float) -> list[Tensor]:
    """Masks (H, W, D) within the interior, none touching another where there is room for a gap."""
    size, voxels = tuple(interior.shape), interior.numel()
    at_most = 0.5 * container_voxels / count / voxels
    free, masks = interior.clone(), []
    for _ in range(count):
        fraction = math.exp(_uniform(generator, *map(math.log, _LABEL_FRACTION)))
        fraction = min(fraction, at_most)
        level = _draw_level(generator, size, _draw_centre(generator, free), fraction)
        level = level.masked_fill(~free, -math.inf)
        kept = min(round(fraction * voxels), int(free.sum()))
        mask = torch.zeros(voxels, dtype=torch.bool)
        mask[level.flatten().topk(kept).indices] = True
        masks.append(mask.view(size) & free)
        grown = F.max_pool3d(masks[-1][None].float(), 3, stride=1, padding=1)[0] > 0
        free = free & ~(grown if (free & ~grown).sum() > at_most * voxels * (count - len(masks)) else masks[-1])
    return masks


def _draw_centre(generator: Generator, free: Tensor) -> Tensor:
    """Coordinates (3,) of a free voxel; of a few candidates the one with most free space around it."""
    places = free.nonzero()
    if len(places) == 0:
        return torch.zeros(3)
    block = min(free.shape) // 8
    space = F.avg_pool3d(free[None].float(), block, ceil_mode=True)
    space = F.avg_pool3d(space, 3, stride=1, padding=1)[0]
    candidates = places[torch.randint(len(places), (6,), generator=generator)]
    best = candidates[space[tuple(candidates.T // block)].argmax()]
    return (2 * best + 1) / torch.tensor(free.shape) - 1


def _draw_level(generator: Generator, size: tuple[int, ...], centre: Tensor, fraction: float) -> Tensor:
    """Level field (H, W, D) of a random shape around a centre: the higher, the further inside.

    The volume is 8 ``fraction``, as the grid's is 8.
    """
    draw = (_ellipsoid, _tube, _shell, _blob)[int(_uniform(generator, 0, 4))]
    paired = _uniform(generator) < 0.25  # left and right, as most brain structures are
    if paired and abs(centre[0]) < 0.2:
        centre = centre + torch.tensor([0.25, 0, 0])
    points = (_coordinates(size) - centre) @ _rotation(generator, 180).T
    level = draw(generator, points, 8 * fraction / (1 + paired.item()))
    return torch.maximum(level, level.flip(0)) if paired else level


def _ellipsoid(generator: Generator, points: Tensor, volume: float) -> Tensor:
    return -torch.linalg.vector_norm(points / _uniform(generator, 0.5, 1.5, 3), dim=-1)


def _tube(generator: Generator, points: Tensor, volume: float) -> Tensor:
    """Capsule around a parabola; four to eight times as long as wide."""
    slenderness = _uniform(generator, 4, 8).item()
    half = 0.5 * slenderness * (4 * volume / math.pi / slenderness) ** (1 / 3)
    along = torch.linspace(-1, 1, 24)
    bend = _uniform(generator, 0, 0.8)
    spine = torch.stack([along, bend * (along**2 - 0.5), torch.zeros(24)], dim=-1) * half
    return -torch.cdist(points.reshape(-1, 3), spine).amin(-1).view(points.shape[:-1])


def _shell(generator: Generator, points: Tensor, volume: float) -> Tensor:
    """Piece of a hollow ellipsoid, from a bowl to the closed form, about a third of its radius thick."""
    open_from = _uniform(generator, 0, 1.5).item()  # in radii along the first axis; from 1 on it is closed
    share = (1 + min(open_from, 1)) / 2
    radius = (volume / (4 * math.pi * 0.33 * share)) ** (1 / 3)
    distance = torch.linalg.vector_norm(points / _uniform(generator, 0.8, 1.25, 3), dim=-1)
    beyond = (points[..., 0] - open_from * radius).clamp(min=0)
    return -(distance - radius).abs() - beyond


def _blob(generator: Generator, points: Tensor, volume: float) -> Tensor:
    """Ball whose radius varies with smooth noise."""
    radius = (3 * volume / (4 * math.pi)) ** (1 / 3)
    noise = _smooth_noise(generator, 1, int(_uniform(generator, 5, 9)), tuple(points.shape[:3]))[0]
    return -torch.linalg.vector_norm(points, dim=-1) / radius + 0.6 * noise


# --- subjects


def _draw_subject(generator: Generator, tissues: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Tissue fractions (C, H, W, D) and label map (H, W, D) of the anatomy in another pose and form.

    A draw that squeezes a label below its least volume, or out of the grid, is weakened until it does not.
    """
    size = tuple(tissues.shape[1:])
    extent = torch.tensor(size) / max(size)  # a rotation is one in voxels, not in units of the grid
    rotation = _rotation(generator, _ROTATION_DEGREES) - torch.eye(3)
    scale = _uniform(generator, -_SCALE, _SCALE, 3)
    shift = _uniform(generator, -_SHIFT, _SHIFT, 3)
    displacement = sum(std * _smooth_noise(generator, 3, points, size) for points, std in _DISPLACEMENT)
    identity = _coordinates(size)
    strength = 1.0
    while True:
        turn = torch.eye(3) + strength * rotation
        matrix = turn * extent / extent[:, None] * (1 + strength * scale)
        where = identity @ matrix.T + strength * (shift + displacement.movedim(0, -1))
        # grid_sample names the last axis first; outside the grid there is only background
        seen = F.grid_sample(tissues[None], where.flip(-1)[None], padding_mode="border", align_corners=False)[0]
        labels = _labels(seen, num_labels)
        counts = labels.flatten().bincount(minlength=num_labels + 1)[1:]
        if counts.min() >= MIN_LABEL_FRACTION * labels.numel():
            return seen, labels
        strength *= 0.7


def _labels(tissues: Tensor, num_labels: int) -> Tensor:
    """Label map (H, W, D) uint8: the tissue with the largest fraction, if it is a labelled one."""
    winner = tissues.max(0).indices
    return torch.where(winner <= num_labels, winner, 0).to(torch.uint8)


# --- images


@dataclass(frozen=True)
class _Contrast:
    """What the images of a cohort have in common."""

    means: Tensor  # (C,)
    stds: Tensor  # (C,)
    coarseness: float  # share of the tissues' texture that is smooth
    blur: Tensor  # (3,) standard deviations, in grids
    noise: float  # standard deviation
    bias: float  # standard deviation of the logarithm of the bias field
    log_gamma: float


def _draw_contrast(generator: Generator, tissues: int, num_labels: int) -> _Contrast:
    gap = MIN_CONTRAST + 2 * _SUBJECT_CONTRAST
    container = _uniform(generator, 0.1, 0.9).item()
    means = torch.stack([_uniform_apart(generator, container, gap) for _ in range(tissues)])
    dark = _uniform(generator, 0, 0.05)
    if container - gap > 0.05 and _uniform(generator) < 0.75:  # air is dark in most modalities
        means[0] = dark
    means[num_labels + 1] = container
    stds = _uniform(generator, 0, 0.05, tissues)
    stds[0] *= 0.2
    return _Contrast(
        means=means,
        stds=stds,
        coarseness=_uniform(generator).item(),
        blur=_uniform(generator, 0.002, 0.014, 3),
        noise=_uniform(generator, 0.005, 0.035).item(),
        bias=_uniform(generator, 0.02, 0.12).item(),
        log_gamma=_uniform(generator, -0.2, 0.2).item(),
    )


def _draw_image(generator: Generator, tissues: Tensor, contrast: _Contrast) -> Tensor:
    """Image (H, W, D) within [0, 1] of tissue fractions (C, H, W, D)."""
    size = tuple(tissues.shape[1:])
    means = contrast.means + _uniform(generator, -_SUBJECT_CONTRAST, _SUBJECT_CONTRAST, len(tissues))
    fine = torch.randn(size, generator=generator)
    coarse = _smooth_noise(generator, 1, max(4, min(size) // 4), size)[0]
    texture = torch.lerp(fine, coarse, contrast.coarseness)
    image, stds = (torch.tensordot(values, tissues, dims=1) for values in (means, contrast.stds))
    image = image + stds * texture
    image = image * (contrast.bias * _smooth_noise(generator, 1, 3, size)[0]).exp()
    sigmas = contrast.blur * _uniform(generator, 0.8, 1.2, 3) * torch.tensor(size)
    kernels = [gaussian_1d(sigma, approx="sampled", normalize=True) for sigma in sigmas]
    image = separable_filtering(image[None, None], kernels, mode="replicate")[0, 0]
    image = image + contrast.noise * _uniform(generator, 0.7, 1.3) * torch.randn(size, generator=generator)
    image = (image - image.min()) / (image.max() - image.min())
    return image.clamp(0, 1) ** math.exp(contrast.log_gamma + _uniform(generator, -0.05, 0.05).item())


# --- random numbers and grids


def _generator(seed: int | Sequence[int], stream: int) -> Generator:
    """Independent stream of random numbers; SeedSequence keeps neighbouring seeds apart."""
    state = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state[0]))


def _uniform(generator: Generator, low: float = 0.0, high: float = 1.0, count: int | None = None) -> Tensor:
    return low + (high - low) * torch.rand(() if count is None else count, generator=generator)


def _uniform_apart(generator: Generator, value: float, gap: float) -> Tensor:
    """A number of [0, 1] that is at least ``gap`` away from ``value``, uniform over those."""
    below, above = max(value - gap, 0.0), max(1 - value - gap, 0.0)
    drawn = _uniform(generator, 0, below + above)
    return drawn if drawn < below else drawn - below + value + gap


def _rotation(generator: Generator, degrees: float) -> Tensor:
    """Rotation matrix (3, 3) from an angle of up to ``degrees`` either way about each axis."""
    angles = torch.deg2rad(_uniform(generator, -degrees, degrees, 3))
    matrix = torch.eye(3)
    for angle, (i, j) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = torch.eye(3)
        turn[i, i] = turn[j, j] = angle.cos()
        turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
        matrix = matrix @ turn
    return matrix


def _smooth_noise(generator: Generator, channels: int, points: int, size: tuple[int, ...]) -> Tensor:
    """Noise (channels, H, W, D) interpolated between ``points`` normal draws along each axis."""
    drawn = torch.randn((1, channels, points, points, points), generator=generator)
    return F.interpolate(drawn, size=size, mode="trilinear", align_corners=True)[0]


def _coordinates(size: tuple[int, ...]) -> Tensor:
    """Voxel centres (H, W, D, 3)."""
    axes = [(2 * torch.arange(n) + 1) / n - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


# --- arguments and files


def _checked_size(spatial_size: int | Sequence[int]) -> tuple[int, ...]:
    size = ensure_tuple_rep(spatial_size, 3)
    for n in size:
        _check_range("spatial_size", n, MIN_SIZE)
    return size


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {value!r}")


def _check_free(output_dir: Path, folders: list[Path], overwrite: bool) -> None:
    for folder in folders:
        number = folder.name.partition("_")[0]
        for found in sorted(output_dir.glob(f"{number}_*")):
            if found.name != folder.name:  # nnU-Net finds a dataset by its number
                raise FileExistsError(f"{found} has the number of {folder.name}: give another start_id or output_dir")
            if not overwrite:
                raise FileExistsError(f"{found} exists: give another output_dir or overwrite")


def _write_dataset(
    folder: Path,
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    spacing_mm: float,
    prefix: str,
    seed: tuple[int, int],
) -> None:
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    scaled = (images * INTENSITY_SCALE).round().to(torch.int16)
    for number, (image, label) in enumerate(zip(scaled, labels, strict=True)):
        case = f"{prefix}_{number:02d}"
        _write_nifti(folder / "imagesTr" / f"{case}_0000.nii.gz", image[0], spacing_mm)
        _write_nifti(folder / "labelsTr" / f"{case}.nii.gz", label[0], spacing_mm)
    description = {
        "name": folder.name.partition("_")[2],
        "description": f"Synthetic cohort, seed {list(seed)}: subjects of one random anatomy",
        "reference": "https://arxiv.org/abs/2509.19711",
        "licence": "unrestricted: generated, shows no real person",
        "channel_names": {"0": "Synthetic"},
        "labels": {"background": 0} | {f"structure{label}": label for label in range(1, num_labels + 1)},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _write_nifti(path: Path, volume: Tensor, spacing_mm: float) -> None:
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    image = nib.Nifti1Image(volume.numpy(), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
