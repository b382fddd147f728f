"""Real scans that were never trained on, parted for all benchmarks, and how a prediction of them is scored.

``benchmarks/hippocampus_split.json`` parts the cases of ``Dataset004_Hippocampus`` into a pool of contexts (60),
development cases (40, to tune on) and reporting cases (100, scored once, with the weights as shipped).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.transforms import Affine
from scipy.stats import bootstrap
from torch import Tensor

from scripts.data.volumes import load_volume

SPLIT_FILE = Path(__file__).with_name("hippocampus_split.json")
PARTS = {"development": "val", "reporting": "test"}
ALIGNMENTS = ("aligned", "misaligned")
SHIPPED = "models/model.pt"
ROTATION_DEGREES = 20.0
SHIFT = 0.25
"""Of half the size of the scan."""

Pair = tuple[MetaTensor, MetaTensor]


@dataclass(frozen=True)
class Hippocampus:
    """Targets of a part, each with the context pool in an order of its own.

    Attributes:
        dataset_dir: folder of Dataset004_Hippocampus.
        part: development or reporting.
        cases: at most so many targets.
        seed: of contexts, misalignments and all else that is drawn.

    Raises:
        ValueError: no such part.
    """

    dataset_dir: str
    part: str = "development"
    cases: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"--part must be one of {', '.join(PARTS)}, got {self.part!r}")

    def smallest(self) -> Hippocampus:
        """Two targets."""
        return replace(self, cases=2)

    @property
    def folder(self) -> Path:
        """The dataset's."""
        return Path(self.dataset_dir)

    @cached_property
    def split(self) -> dict[str, list[str]]:
        """Part -> cases."""
        return {name: sets[self.folder.name] for name, sets in json.loads(SPLIT_FILE.read_text("utf-8")).items()}

    @property
    def targets(self) -> list[str]:
        """Names of the targets."""
        return self.split[PARTS[self.part]][: self.cases]

    @property
    def described(self) -> str:
        """What a row of the record has as its data."""
        return f"hippocampus scans, {len(self.targets)} {self.part} cases"

    def spacing(self, grid: Sequence[int]) -> float:
        """Isotropic voxels in mm at which every case fits into the grid."""
        sizes = [np.array(image.shape[1:]) * image.pixdim.numpy() for image, _ in self._pairs.values()]
        return float((np.max(sizes, axis=0) / np.array(grid)).max())

    def episodes(self, alignment: str = "aligned") -> Iterator[tuple[Pair, list[Pair]]]:
        """Every target with the whole pool; all aligned as they are, or all misaligned."""
        pairs, pool = self._pairs, self.split["train"]
        if alignment == "misaligned":
            pairs = {name: misalign(*pair, self._rng(1, name)) for name, pair in pairs.items()}
        for target in self.targets:
            yield pairs[target], [pairs[pool[i]] for i in self._rng(2, target).permutation(len(pool))]

    @cached_property
    def _pairs(self) -> dict[str, Pair]:
        return {name: read_pair(self.folder, name) for name in (*self.targets, *self.split["train"])}

    def _rng(self, purpose: int, name: str) -> np.random.Generator:
        every = sorted(name for names in self.split.values() for name in names)
        return np.random.default_rng([self.seed, purpose, every.index(name)])


def weights(checkpoint: str) -> str:
    """What is said of weights beside the data: nothing of those that are shipped."""
    return "" if checkpoint == SHIPPED else f", weights {Path(checkpoint).name}"


def misalign(image: MetaTensor, label: MetaTensor, rng: np.random.Generator) -> Pair:
    """The pair turned by up to 20° about each axis and shifted by up to 25 % of half its size along each.

    What comes in from outside is 0.
    """
    angles = np.deg2rad(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3))
    shift = rng.uniform(-SHIFT, SHIFT, 3) * np.array(image.shape[1:]) / 2
    turn = Affine(tuple(angles), translate_params=tuple(shift), padding_mode="zeros", image_only=True)
    return tuple(
        MetaTensor(turn(volume.as_tensor(), mode=mode), affine=volume.affine)
        for volume, mode in ((image, "bilinear"), (label, "nearest"))
    )


def read_pair(folder: Path, name: str) -> Pair:
    """Image and label of a case of an nnU-Net dataset."""
    image, label = folder / "imagesTr" / f"{name}_0000.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"
    return load_volume(image), load_volume(label)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    values = np.asarray(values)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return mean, float(found.low), float(found.high)


def label_dice(prediction: Tensor, wanted: Tensor, values: Sequence[int] | None = None) -> list[float]:
    """Dice of labels in a label map (1, H, W, D): of some, or of all that the wanted one has."""
    values = values or [int(value) for value in wanted.unique() if value > 0]
    masks = [[(volume == value)[None] for value in values] for volume in (prediction, wanted)]
    return [compute_dice(a, b, ignore_empty=False).item() for a, b in zip(*masks, strict=True)]


def mean_dice(prediction: Tensor, wanted: Tensor, values: Sequence[int] | None = None) -> float:
    """Mean of :func:`label_dice`."""
    return float(np.mean(label_dice(prediction, wanted, values)))
