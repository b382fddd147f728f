"""Tab-separated tables as BIDS has them, with a JSON file that explains their columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.runtime.output_folder import inert, write_json, write_text

MISSING = "n/a"


def write_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], path: str | Path, meaning: Mapping[str, Any] | None = None
) -> None:
    """Write a table.

    Args:
        columns: their names.
        rows: cells in that order; None is a missing value.
        path: the ``.tsv`` file.
        meaning: column -> what BIDS's data dictionaries say of it, for the ``.json`` file beside; None writes none.

    Raises:
        FileExistsError: there is a file that this program did not write.
    """
    lines = ["\t".join(map(_cell, row)) for row in (columns, *rows)]
    write_text("".join(f"{line}\n" for line in lines), path)
    if meaning is not None:
        write_json(meaning, Path(path).with_suffix(".json"))


def _cell(value: Any) -> str:
    text = re.sub(r"\s+", " ", str(inert(MISSING if value is None else value))).strip()
    return text.encode(errors="replace").decode() or MISSING
