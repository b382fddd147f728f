"""Torch files: read without running code in them, written whole."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from scripts.runtime.output_folder import write_output


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message names the file and the reason."""


def read_checkpoint(path: str | os.PathLike, allow_pickle: bool = False) -> Any:
    """Load a torch file without running any code in it.

    Args:
        path: the file.
        allow_pickle: unpickle arbitrary objects; only for files whose origin you trust.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, not a torch file, or it holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give --checkpoint / --source an existing file")
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:
        # torch reports a refused global, a cut zip archive and a foreign format each in its own way
        refused = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        if refused or (isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)):
            what = f" ({refused[1]})" if refused else ""
            raise CheckpointError(
                f"{path} holds pickled objects{what} and was not loaded, because unpickling can run code; "
                "if you trust its origin, convert it with --allow_pickle"
            ) from error
        raise CheckpointError(f"{path} is not a readable checkpoint: it is truncated or of another format") from error


def atomic_save(obj: Any, path: str | os.PathLike) -> None:
    """``torch.save`` that leaves either the old file or the complete new one, never a part.

    Raises:
        FileExistsError: there is a file that this program did not write.
        OSError: the folder cannot be written or the disk is full; an existing file is kept.
    """

    def save(temporary: str) -> None:
        try:
            torch.save(obj, temporary)
        except (RuntimeError, OSError) as error:  # torch's zip writer reports a failed write as a RuntimeError
            free_mb = shutil.disk_usage(Path(temporary).parent).free / 1e6
            raise OSError(
                f"could not write {path}: is the disk full ({free_mb:.0f} MB free)? What was there before is kept"
            ) from error

    write_output(path, save)


def first_line(error: BaseException) -> str:
    """What to quote of an error: its first line after a title, else its only one, else its type."""
    lines = str(error).strip().splitlines()
    return lines[min(1, len(lines) - 1)].strip() if lines else type(error).__name__
