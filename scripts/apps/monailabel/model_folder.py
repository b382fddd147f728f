"""The weights that an app has: those it started with, and numbered versions of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from scripts.apps.monailabel.statuses import NotFoundError
from scripts.runtime.atomic_files import write_atomically

CURRENT, SHIPPED = "current", "shipped"
_VERSION = re.compile(r"weights_(\d{4,})\.pt")
_EVER = re.compile(r"weights_(\d{4,})\.pt.*")


class ModelFolder:
    """``weights_0001.pt`` and so on in a folder; the highest number is in use, or else the shipped file.

    The shipped file is only read. A version is never written twice: the number of one that was removed or renamed
    ``weights_0001.pt.*`` is taken again only if nothing of that name is left.

    Args:
        folder: of the versions.
        shipped: the weights to begin with.

    Raises:
        FileNotFoundError: no shipped weights.
    """

    def __init__(self, folder: Path, shipped: Path) -> None:
        if not shipped.is_file():
            raise FileNotFoundError(f"no weights at {shipped}: give --conf weights FILE")
        self.folder = folder
        self.shipped = shipped.resolve()
        folder.mkdir(parents=True, exist_ok=True)

    def versions(self) -> list[Path]:
        """The app's own, the newest last."""
        found = {path: _VERSION.fullmatch(path.name) for path in self.folder.iterdir()}
        return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))

    def names(self) -> list[str]:
        """What :meth:`named` takes."""
        return [CURRENT, SHIPPED, *(path.name for path in reversed(self.versions()))]

    def named(self, name: str = CURRENT) -> Path:
        """Weights by name.

        Raises:
            NotFoundError: there are none of that name.
        """
        versions = self.versions()
        if name == SHIPPED or (name == CURRENT and not versions):
            return self.shipped
        if name == CURRENT:
            return versions[-1]
        for path in versions:
            if path.name == name:
                return path
        raise NotFoundError(f"no weights {name!r}: there are {', '.join(self.names())}")

    def next_version(self) -> Path:
        """Where the next version belongs."""
        numbers = [int(match[1]) for path in self.folder.iterdir() if (match := _EVER.fullmatch(path.name))]
        return self.folder / f"weights_{max(numbers, default=0) + 1:04d}.pt"

    def publish(self, weights: Path) -> Path:
        """Make a copy of these weights the version in use, all of it or nothing."""
        path = self.next_version()
        write_atomically(path, lambda temporary: shutil.copyfile(weights, temporary))
        return path
