"""Dice on a dataset that was never trained on, against averaging the contexts' labels, with scans in place and not.

    python -m benchmarks.unseen_dataset --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        [--part development --context_sizes "[1,2,4,8,16]" --cases 12 --output_file OUT.json]

Averaging takes the mean of the context labels on the grid and never looks at an image: it is what a network learns
first, and what a good one is far above. For ``misaligned`` every image is turned by up to 20 degrees about each axis
and shifted by up to 25 % of half its size along each, with its label, each scan in its own way. Targets and contexts
come from ``benchmarks/hippocampus_split.json``: contexts from its 60 training cases, other ones for every target;
targets from 40 development cases (``--part development``), or, once, from 100 cases for reporting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.transforms import Affine
from scipy.stats import bootstrap
from torch import Tensor
from tqdm import tqdm

from scripts.checkpoint import load_network
from scripts.data.preprocessing import PlacedScores
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

SPLIT_FILE = Path(__file__).with_name("hippocampus_split.json")
PARTS = {"development": "val", "reporting": "test"}
ROTATION_DEGREES = 20.0
SHIFT = 0.25
"""Of half the size of the scan."""

Pair = tuple[MetaTensor, MetaTensor]


def unseen_dataset(
    dataset_dir: str,
    checkpoint: str,
    part: str = "development",
    context_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    cases: int | None = None,
    alignments: Sequence[str] = ("aligned", "misaligned"),
    seed: int = 0,
    device: str = "cpu",
    align: str = "deformable",
    output_file: str | None = None,
    quick: bool = False,
) -> None:
    """Print mean Dice over cases and labels, and its gain over averaging, with 95 % intervals over the cases.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights.
        part: development or reporting.
        context_sizes: numbers of contexts K.
        cases: at most so many targets.
        alignments: aligned, misaligned or both.
        seed: of contexts and misalignments.
        device: where to compute.
        align: how contexts are brought to a target: off, affine or deformable.
        output_file: JSON file for the rows.
        quick: two cases and one context, to see that it runs.
    """
    context_sizes, cases = ((1,), 2) if quick else (context_sizes, cases)
    rows = measure(load_network(checkpoint), dataset_dir, part, context_sizes, cases, alignments, seed, device, align)
    for row in rows:
        print(
            "{alignment:10s} K={context_size:<2d} network {network[0]:.3f} [{network[1]:.3f}, {network[2]:.3f}]  "
            "averaging {averaging[0]:.3f} [{averaging[1]:.3f}, {averaging[2]:.3f}]  "
            "gain {gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]  {cases} cases".format(**row)
        )
    if output_file:
        write_json({"checkpoint": checkpoint, "part": part, "seed": seed, "device": device, "rows": rows}, output_file)


def measure(
    network: Neuroverse3D,
    dataset_dir: str,
    part: str = "development",
    context_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    cases: int | None = None,
    alignments: Sequence[str] = ("aligned", "misaligned"),
    seed: int = 0,
    device: str = "cpu",
    align: str = "deformable",
) -> list[dict]:
    """Rows ``alignment``, ``context_size``, ``cases`` and (mean, low, high) of ``network``, ``averaging``, ``gain``."""
    unseen = UnseenCases(dataset_dir, part, cases, seed)
    inferer = ICLInferer(network, device, spacing=unseen.spacing(network.grid.tolist()), align=align)
    rows = []
    for alignment in alignments:
        scores = {size: [] for size in context_sizes}
        for target, pool in tqdm(unseen.episodes(alignment), alignment, total=len(unseen.targets)):
            for size in context_sizes:
                scores[size].append(case_scores(inferer, target, pool[:size]))
        for size, found in scores.items():
            network_dice, averaging_dice = np.array(found).T
            rows.append(
                {
                    "alignment": alignment,
                    "context_size": size,
                    "cases": len(unseen.targets),
                    "network": interval(network_dice),
                    "averaging": interval(averaging_dice),
                    "gain": interval(network_dice - averaging_dice),
                }
            )
    return rows


class UnseenCases:
    """Targets of a part of the split, each with the context pool in an order of its own.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        part: development or reporting.
        cases: at most so many targets; None for all.
        seed: of the orders and the misalignments.

    Raises:
        ValueError: no such part.
    """

    def __init__(self, dataset_dir: str, part: str, cases: int | None = None, seed: int = 0) -> None:
        if part not in PARTS:
            raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {part!r}")
        folder = Path(dataset_dir)
        split = {name: sets[folder.name] for name, sets in json.loads(SPLIT_FILE.read_text(encoding="utf-8")).items()}
        self.targets, self.pool = split[PARTS[part]][:cases], split["train"]
        self.seed = seed
        self._every = sorted(name for names in split.values() for name in names)
        self._pairs = {name: read_pair(folder, name) for name in (*self.targets, *self.pool)}

    def spacing(self, grid: Sequence[int]) -> float:
        """Isotropic voxels in mm at which every case fits into the grid."""
        sizes = [np.array(image.shape[1:]) * image.pixdim.numpy() for image, _ in self._pairs.values()]
        return float((np.max(sizes, axis=0) / np.array(grid)).max())

    def episodes(self, alignment: str) -> Iterator[tuple[Pair, list[Pair]]]:
        """Every target with the whole pool; all aligned as they are, or all misaligned."""
        pairs = self._pairs
        if alignment == "misaligned":
            pairs = {name: misalign(*pair, self._rng(1, name)) for name, pair in pairs.items()}
        for target in self.targets:
            yield pairs[target], [pairs[self.pool[i]] for i in self._rng(2, target).permutation(len(self.pool))]

    def _rng(self, purpose: int, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, self._every.index(name)])


def case_scores(inferer: ICLInferer, target: Pair, contexts: Sequence[Pair]) -> tuple[float, float]:
    """Mean Dice over the labels of one target, on its own voxels: of the network, and of averaging."""
    inferer.set_context([image for image, _ in contexts], [label for _, label in contexts])
    done = inferer.complete(inferer.target(target[0]))
    values, preprocessing = inferer.label_values, inferer.context.preprocessing
    _, labels = inferer.context.pairs()
    means = {value: (labels == value).float().mean(0)[0] for value in values}
    averaged = preprocessing.to_native_labels({v: PlacedScores(mean, done.image) for v, mean in means.items()})
    return mean_dice(done.prediction, target[1], values), mean_dice(averaged, target[1], values)


def misalign(image: MetaTensor, label: MetaTensor, rng: np.random.Generator) -> Pair:
    """The pair turned and shifted within its own voxels; what comes in from outside is 0."""
    angles = np.deg2rad(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3))
    shift = rng.uniform(-SHIFT, SHIFT, 3) * np.array(image.shape[1:]) / 2
    turn = Affine(tuple(angles), translate_params=tuple(shift), padding_mode="zeros", image_only=True)
    return tuple(
        MetaTensor(turn(volume.as_tensor(), mode=mode), affine=volume.affine)
        for volume, mode in ((image, "bilinear"), (label, "nearest"))
    )


def read_pair(folder: Path, name: str) -> Pair:
    """Image and label of a case."""
    return (
        load_volume(folder / "imagesTr" / f"{name}_0000.nii.gz"),
        load_volume(folder / "labelsTr" / f"{name}.nii.gz"),
    )


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    values = np.asarray(values)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return mean, float(found.low), float(found.high)


def mean_dice(prediction: Tensor, wanted: Tensor, values: Sequence[int]) -> float:
    """Mean Dice of some labels in a label map (1, H, W, D)."""
    masks = (
        [(prediction.as_tensor() == value)[None] for value in values],
        [(wanted.as_tensor() == v)[None] for v in values],
    )
    dice = [compute_dice(a, b, ignore_empty=False).item() for a, b in zip(*masks, strict=True)]
    return float(np.mean(dice))


if __name__ == "__main__":
    main(unseen_dataset)
