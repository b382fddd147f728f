"""Where the contexts of a run come from: finds, checks and chooses the pairs, and makes the context set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from scripts.data.example_pairs import context_cases, folder_cases, listed_cases, read_pair_list
from scripts.data.integrity import examine
from scripts.data.nnunet import Case, DatasetError
from scripts.data.preprocessing import Preprocessing, fit_spacing
from scripts.data.volumes import load_exact, load_volume
from scripts.inference.context_pairs import Example
from scripts.inference.contexts import NAMES_SHOWN, ContextSet, listing

logger = logging.getLogger(__name__)

SELECTIONS = ("random", "first", "similar")


def choose(cases: Sequence[Case], count: int, selection: str = "random", seed: int = 0) -> list[Case]:
    """The candidates that make up the set, in the order of their names.

    Args:
        cases: the candidates.
        count: how many serve a target.
        selection: ``random`` or ``first`` takes ``count`` of them for all targets; ``similar`` takes all, for the
            choice is then made for each target.
        seed: of the random choice.

    Raises:
        ValueError: unknown selection.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"--context_selection must be random, first or similar, got {selection!r}")
    if len(cases) <= count or selection == "similar":
        return list(cases)
    picks = range(count) if selection == "first" else np.random.default_rng(seed).permutation(len(cases))[:count]
    return [cases[i] for i in sorted(picks)]


def load_contexts(
    candidates: Sequence[Case],
    chosen: Sequence[Case],
    spatial_size: Sequence[int],
    spacing: float | None = None,
    similar: int | None = None,
    record: str | Path | None = None,
    notes: Sequence[str] = (),
) -> ContextSet:
    """Context set of inspected cases; the spacing fits all candidates, so that it does not hang on the choice.

    Args:
        candidates: inspected cases.
        chosen: those to use.
        spatial_size: the network's grid.
        spacing: isotropic voxel size in mm; None fits the largest candidate.
        similar: as in :class:`ContextSet`.
        record: as in :class:`ContextSet`.
        notes: as in :class:`ContextSet`.
    """
    preprocessing = Preprocessing(spatial_size, spacing or fit_spacing(candidates, spatial_size))
    examples = [
        Example(
            case["case"],
            case["image"],
            case.get("output") or case["label"],
            case["image_digest"],
            case["digest"],
            tuple(digest for digest in case.get("kin", ()) if digest != case["image_digest"]),
        )
        for case in chosen
    ]
    known = _known_values(chosen[0])
    return ContextSet(examples, preprocessing, "output" in chosen[0], similar, known, record, notes)


def gather_contexts(
    names: Sequence[str],
    pairs: Sequence[tuple[str | MetaTensor, str | MetaTensor]],
    spatial_size: Sequence[int],
    spacing: float | None = None,
    generation: bool = False,
) -> ContextSet:
    """Context set of pairs in hand: checked one by one, and all on the grid at once.

    Args:
        names: one per pair.
        pairs: image and label of each, as a path or as a volume ``(1, H, W, D)``.
        spatial_size: the network's grid.
        spacing: isotropic voxel size in mm; None fits the largest pair.
        generation: the labels are images.

    Raises:
        ValueError: a faulty pair.
    """
    kind = "output" if generation else "label"
    examples, cases, notes, first_of = [], [], [], {}
    for name, pair in zip(names, pairs, strict=True):
        image, label = pair
        image = load_volume(image) if isinstance(image, str) else image
        label = (load_volume if generation else load_exact)(label) if isinstance(label, str) else label
        case = examine(image, label, kind)
        if case["problems"]:
            raise ValueError(f"{name}: {'; '.join(case['problems'])}")
        first = first_of.setdefault(case["image_digest"], name)
        if len(first_of) == len(cases):
            notes.append(f"{name} is the same image as {first}")
        if case["reordered"]:
            notes.append(f"{name}: its {kind} is stored along other axes than its image: reordered, without loss")
        cases.append(case)
        examples.append(Example(name, *pair, case["image_digest"], case["digest"]))
    empty = [] if generation else [e.name for e, case in zip(examples, cases, strict=True) if not case["values"]]
    if empty:
        notes.append(f"no label other than background in {listing(empty)}: not used")
    for note in notes:
        logger.warning(note)
    preprocessing = Preprocessing(spatial_size, spacing or fit_spacing(cases, spatial_size))
    contexts = ContextSet(examples, preprocessing, generation, notes=notes)
    contexts.describe()
    return contexts


class ContextSource:
    """Finds the context set of a run when it is first asked for.

    Args:
        context_dir: nnU-Net dataset folder with the pairs; or None, and ``context_file``, or ``images`` and
            ``labels``, of which the split has no say.
        network: its ``grid`` is the grid; it is known only once its weights are.
        context_size: use at most this many pairs for a target.
        channel: image channel.
        label_channel: generation: channel of the wanted output.
        selection: ``random``, ``first`` or ``similar``, when there are more pairs.
        split_file: take pairs only from its training part; none serves a target of its own subject.
        spacing: voxel size in mm; None fits the largest candidate into the grid.
        skip_bad_cases: leave faulty pairs out instead of raising.
        record: where to remember what was found in the files.
        seed: of the random choice.
        images: paths of the pairs' images, or one folder of them.
        labels: paths of their labels (for generation: of the wanted outputs), or one folder of them.
        context_file: JSON list of pairs.
        similar_record: where to remember what is compared with targets.
        fold: of nnU-Net's ``splits_final.json``.
        subject_pattern: regular expression that finds the subject in a case's name.

    Raises:
        ValueError: a senseless ``context_size``, or pairs given in several ways.
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
        context_file: str | None = None,
        similar_record: str | None = None,
        fold: int | None = None,
        subject_pattern: str | None = None,
    ) -> None:
        if not isinstance(context_size, int) or context_size < 1:
            raise ValueError(f"--context_size must be one number of at least 1 for inference, got {context_size}")
        if sum((context_dir is not None, context_file is not None, bool(images or labels))) > 1:
            raise ValueError(
                "contexts are given in several ways: give either --context_dir, or --context_images and "
                "--context_labels, or --context_file"
            )
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
        self.context_file = context_file
        self.similar_record = similar_record
        self.fold = fold
        self.subject_pattern = subject_pattern

    def __call__(self) -> ContextSet:
        """Find, check, choose and read the pairs.

        Raises:
            ValueError: no pairs given, or not as many labels as images.
            DatasetError: faulty pairs, none, or none with a label.
        """
        candidates = self._candidates()
        usable = [case for case in candidates if "output" in case or _foreground(case)]
        empty = [case["case"] for case in candidates if "output" not in case and not _foreground(case)]
        if not usable:
            raise DatasetError(f"the contexts have no label other than background: {listing(empty)}")
        notes = [f"no label other than background in {listing(empty)}: not used"] if empty else []
        if len(usable) < self.context_size:
            notes.append(f"only {len(usable)} contexts where --context_size is {self.context_size}")
        for note in notes:
            logger.warning(note)
        chosen = choose(usable, self.context_size, self.selection, self.seed)
        similar = self.context_size if self.selection == "similar" else None
        record = self.similar_record if similar is not None else None
        contexts = load_contexts(
            candidates, chosen, self.network.grid.tolist(), self.spacing, similar, record, notes
        )  # fmt: skip
        contexts.describe()
        logger.info(
            "%s%d of %d contexts (%s), %.3g mm voxels: %s",
            "for each target " if contexts.chooses else "",
            min(len(usable), self.context_size),
            len(usable),
            self.selection,
            contexts.preprocessing.spacing_mm,
            listing(contexts.names, max(NAMES_SHOWN, self.context_size)),
        )
        if contexts.label_values:
            counts = (f"{value} in {len(contexts.holding(value))}" for value in contexts.label_values)
            logger.info("labels of the contexts: %s", ", ".join(counts))
        return contexts

    def _candidates(self) -> list[Case]:
        checks = {"record": self.record, "skip_bad_cases": self.skip_bad_cases}
        generation = self.label_channel is not None
        if self.context_file is not None:
            return listed_cases(*read_pair_list(self.context_file, self.channel), generation, **checks)
        if self.images or self.labels:
            images, labels = list(self.images or ()), list(self.labels or ())
            folders = [path for path in (*images, *labels) if Path(path).is_dir()]
            if not folders:
                return listed_cases(images, labels, generation, **checks)
            if len(folders) != 2 or len(images) != 1 or len(labels) != 1:
                raise ValueError(
                    "--context_images and --context_labels take two folders, or two lists of files: got "
                    f"{listing(images)} and {listing(labels)}"
                )
            return folder_cases(images[0], labels[0], self.channel, self.label_channel, **checks)
        if self.context_dir is not None:
            checks |= {"fold": self.fold, "subject_pattern": self.subject_pattern}
            return context_cases(self.context_dir, self.channel, self.label_channel, self.split_file, **checks)
        raise ValueError(
            "no contexts: give --context_dir, an nnU-Net dataset folder with example pairs, or --context_images "
            "and --context_labels, or --context_file"
        )


def _known_values(case: Case) -> list[int] | None:
    """Label numbers of classes; a value of no class (nnU-Net's "ignore") is not to be predicted. None: any."""
    classes = case.get("classes")
    return sorted({value for values in classes.values() for value in values}) if classes else None


def _foreground(case: Case) -> list[int]:
    known = _known_values(case)
    return [value for value in case["values"] if known is None or value in known]
