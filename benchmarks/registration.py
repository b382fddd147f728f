"""Dice of the aligned contexts' votes alone, after each step of the registration, and the seconds that it takes.

    python -m benchmarks.registration --dataset_dir DATA/Dataset004_Hippocampus [--cases 12 --context_sizes "[1,2,8]"]

No network takes part. Cases and misalignments are those of :mod:`benchmarks.unseen_dataset`. ``sitk`` is what
SimpleITK offers, pair by pair: affine by mutual information at two resolutions, then symmetric demons on images whose
histograms were matched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from benchmarks.unseen_dataset import Pair, UnseenCases, interval, mean_dice
from scripts.registration import MODES, align, vote, vote_weights
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

LABELS = (1, 2)


def registration(
    dataset_dir: str,
    part: str = "development",
    cases: int | None = 12,
    context_sizes: Sequence[int] = (1, 2, 8),
    alignments: Sequence[str] = ("aligned", "misaligned"),
    steps: Sequence[str] = MODES,
    threads: int = 2,
    seed: int = 0,
    output_file: str | None = None,
) -> None:
    """Print mean Dice with its 95 % interval, and seconds per target from the start to the end of each step.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        part: development or reporting.
        cases: at most so many targets.
        context_sizes: numbers of contexts K.
        alignments: aligned, misaligned or both.
        steps: last steps, of search, affine, deformable and sitk.
        threads: processor threads.
        seed: of contexts and misalignments.
        output_file: JSON file for the rows.
    """
    torch.set_num_threads(threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    unseen, rows = UnseenCases(dataset_dir, part, cases, seed), []
    for alignment in alignments:
        episodes = list(unseen.episodes(alignment))
        for size in context_sizes:
            for step in steps:
                run = sitk_votes if step == "sitk" else _votes
                found = [
                    run(target, pool[:size], step) for target, pool in tqdm(episodes, f"{alignment} K={size} {step}")
                ]
                dice, seconds, cpu_seconds, folded = map(np.array, zip(*found, strict=True))
                rows.append(
                    {
                        "alignment": alignment,
                        "context_size": size,
                        "step": step,
                        "dice": interval(dice),
                        "seconds": float(np.median(seconds)),
                        "cpu_seconds": float(np.median(cpu_seconds)),
                        "folded": float(folded.max()),
                    }
                )
                print(
                    "{alignment:10s} K={context_size} {step:10s} Dice {dice[0]:.3f} [{dice[1]:.3f}, {dice[2]:.3f}] "
                    "{seconds:.2f} s, processors {cpu_seconds:.2f} s  folded {folded:.2%}".format(**rows[-1]),
                    flush=True,
                )
    if output_file:
        write_json({"part": part, "cases": len(unseen.targets), "threads": threads, "rows": rows}, output_file)


def _votes(target: Pair, contexts: Sequence[Pair], mode: str) -> tuple[float, float, float, float]:
    """Dice, seconds, processor seconds and the largest share of folded voxels."""
    started, used = time.perf_counter(), time.process_time()
    found = align(target[0], [image for image, _ in contexts], mode)
    passed, used = time.perf_counter() - started, time.process_time() - used
    grid = target[0].shape[1:], target[0].affine
    images = torch.stack([found.warp(image, k, *grid) for k, (image, _) in enumerate(contexts)])
    masks = torch.stack([found.warp(_masks(label), k, *grid) for k, (_, label) in enumerate(contexts)])
    dice = _dice(target, images, masks, found.kind, found.aligned if found.aligned.any() else None)
    return dice, passed, used, float(found.folded.max())


def sitk_votes(target: Pair, contexts: Sequence[Pair], _: str = "sitk") -> tuple[float, float, float, float]:
    """The same with SimpleITK; folded voxels are not counted."""
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
    return _dice(target, images, masks, "intensity", None), passed, used, float("nan")


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


if __name__ == "__main__":
    main(registration)
