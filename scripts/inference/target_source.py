"""Which scans a run is for: found in a folder, chosen by a split, shared among processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.data.files import image_files
from scripts.data.nnunet import Case, DatasetError, find_targets, listed_targets
from scripts.data.splits import read_split
from scripts.runtime.shards import this_shard


class TargetSource:
    """Finds the scans of a run.

    Args:
        dataset_dir: one image, a folder of images, or an nnU-Net dataset; or None, and ``images``.
        channel: image channel in nnU-Net folders.
        split_file: run only on the cases of a part of this split.
        target_split: which part; None takes ``test``, and of nnU-Net's ``splits_final.json`` ``val``.
        fold: of nnU-Net's ``splits_final.json``.
        shard: ``"3/16"`` for the third of sixteen parts of the targets; None for all. Each of torchrun's processes
            takes its share of it.
        images: the scans, file by file.

    Attributes:
        dataset_dir: as given.
        split_file: as given.
        shard: this process's.
    """

    def __init__(
        self,
        dataset_dir: str | None,
        channel: int = 0,
        split_file: str | None = None,
        target_split: str | None = None,
        fold: int | None = None,
        shard: str | None = None,
        images: Sequence[str] | None = None,
    ) -> None:
        if dataset_dir is not None and images:
            raise ValueError("targets are given in two ways: give either --dataset_dir or --target_images")
        if images and split_file is not None:
            raise ValueError("--split_file goes with --dataset_dir, an nnU-Net dataset")
        if fold is not None and split_file is None:
            raise ValueError("--fold goes with --split_file, nnU-Net's splits_final.json")
        self.dataset_dir = dataset_dir
        self.channel = channel
        self.split_file = split_file
        self.target_split = target_split
        self.fold = fold
        self.shard = this_shard(shard)
        self.images = images

    def find(self) -> list[Case]:
        """All scans of the run, of every shard, not looked into.

        Raises:
            ValueError: neither ``dataset_dir`` nor ``images``.
            FileNotFoundError, DatasetError: no targets.
        """
        if self.images:
            return listed_targets(self.images)
        if self.dataset_dir is None:
            raise ValueError("no targets: give --dataset_dir, a folder of images or one image, or --target_images")
        if self.split_file is None:
            return find_targets(self.dataset_dir, self.channel)
        folder = Path(self.dataset_dir).absolute()
        if image_files(folder / "imagesTr"):  # a split is one of these, also where there are imagesTs
            folder /= "imagesTr"
        name = folder.parent.name if folder.name in ("imagesTr", "imagesTs") else folder.name
        targets = [target | {"dataset": name} for target in find_targets(folder, self.channel)]
        parts = read_split(self.split_file, targets, self.fold)
        part = self.target_split or ("test" if "test" in parts else "val")
        if not parts.get(part):
            known = ", ".join(part for part in parts if parts[part])
            raise DatasetError(f"{self.split_file} has no '{part}' cases of {name} (it has {known})")
        return parts[part]
