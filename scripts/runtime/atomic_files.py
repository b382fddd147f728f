"""Writing files and folders whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, write: Callable[[str], Any], suffix: str = "") -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place.

    Args:
        path: the file; its folder is made if need be.
        write: called with the temporary file's path.
        suffix: ending of the temporary file, for writers that choose a format by it.

    Raises:
        OSError: the folder cannot be written or the disk is full; an existing file is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=suffix)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(text: str, path: str | os.PathLike) -> None:
    """Write UTF-8 text."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(content: Any, path: str | os.PathLike) -> None:
    """Write JSON; NaN is refused."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def put_folder_in_place(made: Path, folder: Path, aside: Path, check: Callable[[Path], None] | None = None) -> None:
    """Rename a complete folder to its place; what is there goes aside, and comes back if that fails.

    Args:
        made: the complete folder, on the file system of ``folder``.
        folder: its place; what is there may be a folder or nothing.
        aside: free path on the same file system; removing it is up to the caller.
        check: raises if what went aside may not be replaced.

    Raises:
        OSError: a rename fails; ``folder`` is as it was. So it is with any error of ``check``.
    """
    if not folder.exists():
        made.rename(folder)
        return
    folder.rename(aside)
    try:
        if check is not None:
            check(aside)
        made.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def umask() -> int:
    """The process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
