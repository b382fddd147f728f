"""Writing files and folders whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet's formula may begin with."""


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
        os.chmod(temporary, 0o666 & ~_umask())
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


def write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], path: str | os.PathLike) -> None:
    """Write a table that spreadsheets show and do not execute.

    They take text that begins with one of :data:`FORMULA_SIGNS` as a formula, quoted or not. Names may begin so; they
    get an apostrophe in front (https://owasp.org/www-community/attacks/CSV_Injection). Numbers stay as they are, and
    what is not UTF-8 becomes question marks; a carriage return, which ``csv`` does not quote, becomes a space.

    Args:
        header: the columns' names.
        rows: cells in that order; None is an empty one.
        path: the file.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([_inert(cell) for cell in row] for row in (header, *rows))
    write_text(text.getvalue().encode(errors="replace").decode(), path)


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", " ")
    return f"'{cell}" if cell.lstrip(" ").startswith(FORMULA_SIGNS) else cell


def put_folder_in_place(made: Path, folder: Path, aside: Path) -> None:
    """Rename a complete folder to its place; what is there goes aside, and comes back if that fails.

    Args:
        made: the complete folder, on the file system of ``folder``.
        folder: its place; what is there may be a folder or nothing.
        aside: free path on the same file system; removing it is up to the caller.

    Raises:
        OSError: a rename fails; ``folder`` is as it was.
    """
    if not folder.exists():
        made.rename(folder)
        return
    folder.rename(aside)
    try:
        made.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
