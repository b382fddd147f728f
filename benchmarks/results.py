"""What the results file holds: the latest record of every benchmark and case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def latest(path: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Records by benchmark and case, the last of each; those of `--quick` are left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no results in {path}: run make bench first, or give --results")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not record["conditions"]["quick"]:
            found.setdefault(record["benchmark"], {})[record["case"]] = record
    return found
