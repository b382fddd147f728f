"""Collection files: which datasets, channels and tasks a training draws from, how often, and how much each counts.

A collection file is JSON, ``{"rows": [{"dataset": "Dataset001_Brain", "task": "segmentation", ...}, ...]}``;
``configs/collection_example.json`` shows every key. The row is the unit of sampling: a group is drawn by first
drawing a row with probability proportional to its ``draw_weight``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scripts.data.files import read_json
from scripts.data.nnunet import DatasetError, NnunetDataset
from scripts.data.tasks import find_task

SYNTHETIC = "synthetic"
"""Dataset name of a row whose every group is a new synthetic cohort."""

LABELS = "labels"
"""``output`` of a row that is made from the label map."""


@dataclass(frozen=True)
class Row:
    """One row of a collection.

    Attributes:
        dataset: folder name, or its part before the first underscore; ``synthetic`` for a new synthetic cohort in
            every group.
        task: name of a task.
        input: channel, or list of channels of which one is drawn for each group; empty means every channel.
        output: modality transfer: the channel that is the wanted output; other tasks leave it out.
        classes: segmentation: names or label values that make up the foreground of every group; ``random``, or none,
            merges one to ``max_classes`` of all classes, anew for each group. Of skull_stripping those that make up
            the brain; by default the class ``brain``.
        remove_classes: names or label values that a random choice leaves out.
        draw_weight: how often the row is drawn, relative to the others; 0 never draws it.
        loss_weight: factor on the loss of the row's groups.
    """

    dataset: str
    task: str = "segmentation"
    input: tuple[int, ...] = ()
    output: str | int = LABELS
    classes: tuple[str | int, ...] = ()
    remove_classes: tuple[str | int, ...] = ()
    draw_weight: float = 1.0
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value makes no sense; the message names the key.
        """
        reads = find_task(self.task).reads
        if reads == "output" and self.output == LABELS:
            raise ValueError(f"'output' must be the channel that {self.task} is to produce")
        if reads != "output" and self.output != LABELS:
            raise ValueError(f"'output' is {self.output!r}, but {self.task} makes its own output: leave it out")
        if reads == "output" and (self.output in self.input or self.output < 0):
            raise ValueError(f"'output' must be another channel than the input {list(self.input)}, got {self.output}")
        if any(type(channel) is not int for channel in self.input):
            raise ValueError(f"'input' must be channel numbers, got {list(self.input)}")
        if any(type(name) not in (str, int) for name in (*self.classes, *self.remove_classes)):
            raise ValueError("'classes' and 'remove_classes' must be names or whole numbers")
        if (self.classes or self.remove_classes) and reads != "label":
            raise ValueError(f"{self.task} reads no labels: leave 'classes' and 'remove_classes' out")
        if self.dataset == SYNTHETIC:
            if self.classes or self.remove_classes:
                raise ValueError("synthetic structures have no names: leave out 'classes' and 'remove_classes'")
            if self.task == "skull_stripping":
                raise ValueError("synthetic cohorts have no brain: skull_stripping needs a dataset")
            if set(self.input) - {0} or self.output not in (LABELS, 1):
                raise ValueError("a synthetic subject has the channel 0 as 'input' and, where wanted, 1 as 'output'")
        if any(channel < 0 for channel in self.input):
            raise ValueError(f"'input' must be channel numbers of at least 0, got {list(self.input)}")
        if not 0 <= self.draw_weight < float("inf") or not 0 <= self.loss_weight < float("inf"):
            raise ValueError(
                f"'draw_weight' and 'loss_weight' must be finite numbers of at least 0, got {self.draw_weight} and "
                f"{self.loss_weight}"
            )


@dataclass(frozen=True)
class Source:
    """One kind of case: a dataset's images of one channel, and what goes with them.

    Attributes:
        dataset: the nnU-Net dataset.
        channel: image channel.
        partner: ``"label"`` (label maps), ``"image"`` (the image alone) or the output's channel.
    """

    dataset: NnunetDataset
    channel: int
    partner: str | int

    @property
    def key(self) -> str:
        """Name that is unique in a collection."""
        return f"{self.dataset.name}/{self.channel:04d}/{self.partner}"


@dataclass(frozen=True)
class SourcedRow:
    """A row with the keys of its sources; each source is drawn equally often."""

    row: Row
    sources: tuple[str, ...]


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a collection file.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: not JSON, no rows, or a faulty row; the message names file, row and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no collection file {path}: --collection_file takes a JSON file of rows")
    rows = read_json(path, dict, "see configs/collection_example.json").get("rows")
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"{path} has no rows: see configs/collection_example.json")
    return [_read_row(path, number, row) for number, row in enumerate(rows, start=1)]


def default_rows(datasets: Sequence[NnunetDataset], channel: int | None, tasks: Sequence[str] | None) -> list[Row]:
    """Rows without a collection file: every dataset and task, with every channel once.

    Args:
        datasets: what was found.
        channel: use only this channel; None uses all.
        tasks: names of tasks; None means segmentation. Modality transfer gets a row for every pair of channels.
    """
    rows = []
    for dataset in datasets:
        channels = (channel,) if channel is not None else dataset.channels()
        for task in tasks or ("segmentation",):
            if find_task(task).reads == "output":
                rows += [Row(dataset.name, task, (a,), b) for a in channels for b in dataset.channels() if a != b]
            else:
                rows.append(Row(dataset.name, task, tuple(channels)))
    return rows


def synthetic_rows(tasks: Sequence[str] | None) -> list[Row]:
    """Rows without any data: every task on synthetic cohorts.

    Args:
        tasks: names of tasks; None means segmentation.
    """
    return [
        Row(SYNTHETIC, task, output=1 if find_task(task).reads == "output" else LABELS)
        for task in tasks or ("segmentation",)
    ]


def sources_of(row: Row, datasets: Sequence[NnunetDataset]) -> list[Source]:
    """Sources that a row draws from.

    Args:
        row: the row.
        datasets: its datasets.

    Raises:
        DatasetError: a channel is not there.
    """
    reads = find_task(row.task).reads
    partner = row.output if reads == "output" else reads
    found = []
    for dataset in datasets:
        there = dataset.channels()
        channels = row.input or tuple(c for c in there if c != row.output)
        missing = sorted({*channels, *([row.output] if reads == "output" else [])} - set(there))
        if missing or not channels:
            raise DatasetError(f"{dataset.name} has no channel {missing} for {row.task}; channels there: {list(there)}")
        found += [Source(dataset, channel, partner) for channel in channels]
    return found


def _read_row(path: Path, number: int, content: Any) -> Row:
    known = [field.name for field in fields(Row)]
    try:
        unknown = sorted(set(content) - set(known))
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.4)
            hint = f": did you mean {nearest[0]!r}?" if nearest else f" (keys are {', '.join(known)})"
            raise ValueError(f"unknown key {unknown[0]!r}{hint}")
        values = dict(content)
        if not isinstance(values.get("dataset"), str):
            raise ValueError("'dataset' is missing")
        for key in ("input", "classes", "remove_classes"):
            values[key] = _listed(key, values.get(key))
        output = values.get("output", LABELS)
        if output != LABELS and (isinstance(output, bool) or not isinstance(output, int)):
            raise ValueError(f"'output' must be \"labels\" or a channel number, got {output!r}")
        for key in ("draw_weight", "loss_weight"):
            values[key] = float(values.get(key, 1.0))
        return Row(**values)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{path}, row {number}: {error}") from error


def _listed(key: str, value: Any) -> tuple[Any, ...]:
    if value is None or (key == "classes" and value == "random"):
        return ()
    if isinstance(value, bool) or not isinstance(value, (list, str, int)):
        raise ValueError(f"{key!r} must be a list, got {value!r}")
    return tuple(value) if isinstance(value, list) else (value,)
