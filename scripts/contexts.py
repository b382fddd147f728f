"""The context set: example pairs on the network's grid, from files or arrays."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.collection import read_split
from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError, find_datasets
from scripts.data.preprocessing import Preprocessing, fit_spacing
from scripts.data.volumes import load_volume, volume_digest

logger = logging.getLogger(__name__)


class ContextSet:
    """L context pairs, all at one spacing that fits every candidate into the grid.

    Attributes:
        names: one per pair.
        images: ``(L, 1, H, W, D)`` in [0, 1], host memory.
        labels: ``(L, 1, H, W, D)``: label numbers; for generation the wanted output in [0, 1].
        preprocessing: what brings a target to the same grid.
        digests: SHA-256 of each image's voxels and affine.
        output_range: generation: mean intensities that 0 and 1 of the outputs stand for.
    """

    def __init__(
        self,
        names: Sequence[str],
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        digests: Sequence[str],
        output_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.names = list(names)
        self.images = images
        self.labels = labels
        self.preprocessing = preprocessing
        self.digests = list(digests)
        self.output_range = output_range

    def __len__(self) -> int:
        """L."""
        return len(self.names)

    @property
    def label_values(self) -> list[int]:
        """Label numbers that occur in the pairs, background left out."""
        return [int(v) for v in torch.unique(self.labels) if v > 0]

    def holding(self, value: int) -> list[int]:
        """Numbers of the pairs that have a label."""
        return (self.labels == value).flatten(1).any(1).nonzero().flatten().tolist()

    def same_image(self, digest: str) -> list[int]:
        """Numbers of the pairs with this very image: a target is never its own context."""
        return [i for i, known in enumerate(self.digests) if known == digest]


def context_cases(
    context_dir: str | Path,
    channel: int = 0,
    label_channel: int | None = None,
    split_file: str | Path | None = None,
    record: str | Path | None = None,
    skip_bad_cases: bool = False,
) -> list[Case]:
    """Candidate pairs of an nnU-Net dataset folder, inspected.

    Args:
        context_dir: the folder, with ``imagesTr`` and ``labelsTr``.
        channel: image channel.
        label_channel: generation: the channel that is the wanted output, instead of ``labelsTr``.
        split_file: take only the cases in its training part.
        record: where to remember what was found in the files.
        skip_bad_cases: leave faulty cases out instead of raising.

    Raises:
        FileNotFoundError, DatasetError: nothing there, or faulty cases (all named).
    """
    if not Path(context_dir).is_dir():
        raise FileNotFoundError(f"no folder {context_dir}: --context_dir takes an nnU-Net dataset folder")
    datasets = find_datasets(context_dir)
    if len(datasets) > 1:
        names = ", ".join(d.name for d in datasets)
        raise DatasetError(f"--context_dir takes one dataset, {context_dir} has {names}")
    cases = datasets[0].cases(channel, "label" if label_channel is None else label_channel)
    inspected = sound_cases(inspect_cases(cases, record), skip_bad_cases)
    if split_file is None:
        return inspected
    training = read_split(split_file, inspected)["train"]
    if not training:
        raise DatasetError(f"{split_file} has no training cases of {datasets[0].name} to take contexts from")
    return training


def listed_cases(
    images: Sequence[str],
    labels: Sequence[str],
    generation: bool = False,
    record: str | Path | None = None,
    skip_bad_cases: bool = False,
) -> list[Case]:
    """Candidate pairs given file by file, inspected; each is called by its image's path.

    Args:
        images: paths of the images.
        labels: path of each one's label map (for generation: of its wanted output).
        generation: the answers are images.
        record: where to remember what was found in the files.
        skip_bad_cases: leave faulty pairs out instead of raising.

    Raises:
        ValueError: not as many labels as images, or none.
        DatasetError: faulty pairs (all named).
    """
    if not images or len(images) != len(labels):
        raise ValueError(
            f"--context_images and --context_labels need equally many files, at least one: got {len(images)} and "
            f"{len(labels)}"
        )
    kind = "output" if generation else "label"
    cases = [{"image": i, kind: answer, "case": i} for i, answer in zip(images, labels, strict=True)]
    return sound_cases(inspect_cases(cases, record), skip_bad_cases)


def choose(cases: Sequence[Case], count: int, selection: str = "random", seed: int = 0) -> list[Case]:
    """``count`` of the candidates (all, if there are no more), in the order of their names.

    Raises:
        ValueError: unknown selection.
    """
    if selection not in ("random", "first"):
        raise ValueError(f"--context_selection must be random or first, got {selection!r}")
    if len(cases) <= count:
        return list(cases)
    picks = range(count) if selection == "first" else np.random.default_rng(seed).permutation(len(cases))[:count]
    return [cases[i] for i in sorted(picks)]


def load_contexts(
    candidates: Sequence[Case], chosen: Sequence[Case], spatial_size: Sequence[int], spacing: float | None = None
) -> ContextSet:
    """Read the chosen pairs onto the grid; the spacing fits all candidates, so that it does not hang on the choice.

    Args:
        candidates: inspected cases.
        chosen: those to use.
        spatial_size: the network's grid.
        spacing: isotropic voxel size in mm; None fits the largest candidate.
    """
    preprocessing = Preprocessing(spatial_size, spacing or fit_spacing(candidates, spatial_size))
    pairs = [(load_volume(c["image"]), load_volume(c.get("output") or c["label"])) for c in chosen]
    contexts = build_contexts(
        [c["case"] for c in chosen], pairs, preprocessing, generation="output" in chosen[0]
    )  # fmt: skip
    if classes := chosen[0].get("classes"):  # values of no class (nnU-Net's "ignore") are not to be predicted
        known = torch.tensor(sorted({value for values in classes.values() for value in values}))
        contexts.labels *= torch.isin(contexts.labels, known.to(contexts.labels.dtype))
    return contexts


def build_contexts(
    names: Sequence[str],
    pairs: Sequence[tuple[MetaTensor, MetaTensor]],
    preprocessing: Preprocessing,
    generation: bool = False,
) -> ContextSet:
    """Preprocess volumes ``(1, H, W, D)`` into a context set."""
    on_grid = [
        preprocessing.image_pair(image, output) if generation else preprocessing.pair(image, output)
        for image, output in pairs
    ]
    ranges = [preprocessing.intensity_range(*pair) for pair in pairs] if generation else [(0.0, 1.0)]
    labels: list[Any] = [label for _, label in on_grid]
    return ContextSet(
        names,
        torch.stack([image for image, _ in on_grid]),
        torch.stack([label.to(labels[0].dtype if generation else torch.int32) for label in labels]),
        preprocessing,
        [volume_digest(image) for image, _ in pairs],
        tuple(float(np.mean(bounds)) for bounds in zip(*ranges, strict=True)),
    )


class ContextSource:
    """Chooses and reads the context set of a run when it is first asked for.

    Args:
        context_dir: nnU-Net dataset folder with the pairs; or None, and ``images`` and ``labels``.
        network: its ``grid`` is the grid; it is known only once its weights are.
        context_size: use at most this many pairs.
        channel: image channel.
        label_channel: generation: channel of the wanted output.
        selection: ``random`` or ``first``, when there are more pairs.
        split_file: take pairs only from its training part.
        spacing: voxel size in mm; None fits the largest candidate into the grid.
        skip_bad_cases: leave faulty pairs out instead of raising.
        record: where to remember what was found in the files.
        seed: of the random choice.
        images: paths of the pairs' images, instead of ``context_dir``; the split has no say in them.
        labels: paths of their labels (for generation: of the wanted outputs).

    Raises:
        ValueError: a senseless ``context_size``, or pairs given in both ways.
    """

    def __init__(
        self,
        context_dir: str | None,
        network: torch.nn.Module,
        context_size: int = 8,
        channel: int = 0,
        label_channel: int | None = None,
        selection: str = "random",
        split_file: str | None = None,
        spacing: float | None = None,
        skip_bad_cases: bool = False,
        record: str | None = None,
        seed: int = 0,
        images: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(context_size, int) or context_size < 1:
            raise ValueError(f"--context_size must be one number of at least 1 for inference, got {context_size}")
        if context_dir is not None and (images or labels):
            raise ValueError("give either --context_dir, or --context_images and --context_labels")
        self.context_dir = context_dir
        self.network = network
        self.context_size = context_size
        self.channel = channel
        self.label_channel = label_channel
        self.selection = selection
        self.split_file = split_file
        self.spacing = spacing
        self.skip_bad_cases = skip_bad_cases
        self.record = record
        self.seed = seed
        self.images = images
        self.labels = labels

    def __call__(self) -> ContextSet:
        """Read the pairs.

        Raises:
            ValueError: no folder and no files given, or not as many labels as images.
            DatasetError: faulty pairs, or none.
        """
        if self.images or self.labels:
            generation = self.label_channel is not None
            candidates = listed_cases(
                self.images or (), self.labels or (), generation, self.record, self.skip_bad_cases
            )
        elif self.context_dir is not None:
            candidates = context_cases(
                self.context_dir, self.channel, self.label_channel, self.split_file, self.record, self.skip_bad_cases
            )
        else:
            raise ValueError(
                "no contexts: give --context_dir, an nnU-Net dataset folder with example pairs, or --context_images "
                "and --context_labels"
            )
        chosen = choose(candidates, self.context_size, self.selection, self.seed)
        contexts = load_contexts(candidates, chosen, self.network.grid.tolist(), self.spacing)
        logger.info(
            "%d of %d contexts (%s), %.3g mm voxels: %s",
            len(chosen),
            len(candidates),
            self.selection,
            contexts.preprocessing.spacing_mm,
            ", ".join(contexts.names),
        )
        return contexts
