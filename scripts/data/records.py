"""JSON files that only spare work: what is damaged in one is as good as not there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.runtime.atomic_files import write_json

_DIGEST = "sha256"


def write_record(entries: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Write entries, each with a digest of its key and content, by which :func:`read_record` knows it to be whole."""
    write_json({key: {**facts, _DIGEST: _digest(key, facts)} for key, facts in entries.items()}, path)


def read_record(path: str | Path | None) -> dict[str, dict[str, Any]]:
    """Whole entries of a record; none if there is no file, or whatever is wrong with it."""
    if path is None or not Path(path).is_file():
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    whole = {}
    for key, facts in content.items() if isinstance(content, dict) else ():
        if isinstance(facts, dict) and facts.pop(_DIGEST, None) == _digest(key, facts):
            whole[key] = facts
    return whole


def _digest(key: str, facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, facts], sort_keys=True).encode()).hexdigest()
