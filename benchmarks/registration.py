"""Contexts brought to a target, without a network: what the registration gives step by step, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from benchmarks.hippocampus import ALIGNMENTS, Hippocampus, Pair, interval, mean_dice
from benchmarks.measure import Row, Run, work
from scripts.registration import MODES, align, vote, vote_weights
from scripts.runtime.commandline import main

LABELS = (1, 2)


@work
def votes(
    run: Run,
    cases: Hippocampus,
    context_sizes: Sequence[int] = (1, 2, 8),
    alignments: Sequence[str] = ALIGNMENTS,
    steps: Sequence[str] = MODES,
) -> Iterator[Row]:
    """Dice of the aligned contexts' votes alone, after each step of the registration, and seconds per target.

    No network takes part. ``sitk`` is what SimpleITK offers, pair by pair: affine by mutual information at two
    resolutions, then symmetric demons on images whose histograms were matched. Seconds are medians from the start to
    the end of a step.

    Args:
        run: how it is run.
        cases: targets.
        context_sizes: numbers of contexts K.
        alignments: aligned, misaligned or both.
        steps: last steps, of search, affine, deformable and sitk.
    """
    context_sizes = (1,) if run.quick else context_sizes
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(run.threads)
    for alignment in alignments:
        episodes = list(cases.episodes(alignment))
        for size in context_sizes:
            for step in steps:
                find = sitk_votes if step == "sitk" else _votes
                progress = tqdm(episodes, f"{alignment} K={size} {step}")
                found = [find(target, pool[:size], step) for target, pool in progress]
                dice, seconds, cpu_seconds = zip(*found, strict=True)
                figures = {"dice": interval(dice), "seconds": np.median(seconds), "cpu_seconds": np.median(cpu_seconds)}
                yield Row(f"{alignment}, K={size}", figures, cases.described, step)


def _votes(target: Pair, contexts: Sequence[Pair], mode: str) -> tuple[float, float, float]:
    """Dice, seconds and processor seconds."""
    started, used = time.perf_counter(), time.process_time()
    found = align(target[0], [image for image, _ in contexts], mode)
    passed, used = time.perf_counter() - started, time.process_time() - used
    grid = target[0].shape[1:], target[0].affine
    images = torch.stack([found.warp(image, k, *grid) for k, (image, _) in enumerate(contexts)])
    masks = torch.stack([found.warp(_masks(label), k, *grid) for k, (_, label) in enumerate(contexts)])
    dice = _dice(target, images, masks, found.kind, found.aligned if found.aligned.any() else None)
    return dice, passed, used


def sitk_votes(target: Pair, contexts: Sequence[Pair], _: str = "sitk") -> tuple[float, float, float]:
    """The same with SimpleITK."""
    started, used = time.perf_counter(), time.process_time()
    fixed = _sitk(target[0])
    transforms = [_sitk_transform(fixed, _sitk(image)) for image, _ in contexts]
    passed, used = time.perf_counter() - started, time.process_time() - used

    def warp(volume: torch.Tensor, affine: torch.Tensor, transform: sitk.Transform) -> torch.Tensor:
        moved = [
            sitk.GetArrayFromImage(sitk.Resample(_sitk(MetaTensor(c[None], affine=affine)), fixed, transform)).T
            for c in volume
        ]
        return torch.from_numpy(np.stack(moved))

    images = torch.stack([warp(i, i.affine, t) for (i, _), t in zip(contexts, transforms, strict=True)])
    masks = torch.stack([warp(_masks(m), m.affine, t) for (_, m), t in zip(contexts, transforms, strict=True)])
    return _dice(target, images, masks, "intensity", None), passed, used


def _sitk(volume: MetaTensor) -> sitk.Image:
    """An image of a volume whose voxels lie along the world's axes, as this dataset's do."""
    image = sitk.GetImageFromArray(volume.as_tensor()[0].float().numpy().T)
    image.SetSpacing(volume.affine.diagonal()[:3].tolist())
    image.SetOrigin(volume.affine[:3, 3].tolist())
    return image


def _sitk_transform(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    start = sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3))
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetInitialTransform(start, inPlace=False)
    affine = method.Execute(fixed, moving)
    moved = sitk.HistogramMatching(sitk.Resample(moving, fixed, affine), fixed, 128, 7)
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(50)
    demons.SetStandardDeviations(1.5)
    field = sitk.DisplacementFieldTransform(sitk.Cast(demons.Execute(fixed, moved), sitk.sitkVectorFloat64))
    return sitk.CompositeTransform([affine, field])


def _masks(label: MetaTensor) -> MetaTensor:
    return MetaTensor(torch.cat([label.as_tensor() == value for value in LABELS]).float(), affine=label.affine)


def _dice(target: Pair, images: torch.Tensor, masks: torch.Tensor, kind: str, aligned: torch.Tensor | None) -> float:
    image = target[0].as_tensor().float()
    share = vote(vote_weights(image, images.float(), kind, aligned), masks.float())
    prediction = torch.where(share.sum(0, keepdim=True) > 0.5, share.argmax(0, keepdim=True) + 1, 0)
    return mean_dice(MetaTensor(prediction), target[1], LABELS)


WORKS = {"votes": votes}

if __name__ == "__main__":
    main(WORKS)
