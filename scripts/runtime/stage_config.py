"""Stage 2's configuration: stage 1 with the ids of ``configs/stage2_changes.json``.

``--config_file configs/train_stage2.json`` has to be enough, and what MONAI reads into one file from another cannot be
overridden from the command line. Therefore that file is written from the two others::

    python -m scripts.runtime.stage_config
"""

from __future__ import annotations

import json
import re
from typing import Any

from scripts.runtime.manifest import ROOT

STAGE1 = ROOT / "configs" / "train_stage1.json"
CHANGES = ROOT / "configs" / "stage2_changes.json"
STAGE2 = ROOT / "configs" / "train_stage2.json"


def changed_text(config: str, changes: str) -> str:
    """A configuration with other values, laid out as it was.

    Args:
        config: JSON object, one line for each of the ids that change.
        changes: JSON object of their values, one line for each.

    Raises:
        ValueError: the configuration has no such id, or a value that goes over several lines.
    """
    text, wanted = config, dict(re.findall(r'^    "(\w+)": (.*?),?$', changes, flags=re.MULTILINE))
    for name, value in wanted.items():
        line = re.compile(rf'^(    "{name}": ).*?(,?)$', flags=re.MULTILINE)
        text = line.sub(lambda found, value=value: found[1] + value + found[2], text, count=1)
    meant: dict[str, Any] = json.loads(config) | json.loads(changes)
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        made = None
    if made != meant:
        raise ValueError(f"the ids {', '.join(json.loads(changes))} must be there, each with its value in one line")
    return text


def write_stage2() -> None:
    """Write ``configs/train_stage2.json``."""
    text = changed_text(STAGE1.read_text(encoding="utf-8"), CHANGES.read_text(encoding="utf-8"))
    STAGE2.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(write_stage2)
