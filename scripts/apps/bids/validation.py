"""The maintained BIDS validator, where it is installed (``pip install bids-validator-deno``)."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.data.nnunet import DatasetError

logger = logging.getLogger(__name__)

PROGRAM = "bids-validator-deno"
_SHOWN = 5


def validator() -> str | None:
    """The validator's path: of this environment, or anywhere in ``PATH``; None if there is none."""
    here = str(Path(sys.executable).parent)
    return shutil.which(PROGRAM, path=os.pathsep.join((here, os.environ.get("PATH", ""))))


def errors_of(dataset: str | Path) -> list[str]:
    """What the validator calls errors in a dataset, one text each; warnings are left out.

    Raises:
        FileNotFoundError: the validator is not installed.
        RuntimeError: it did not come to an end.
    """
    program = validator()
    if program is None:
        raise FileNotFoundError(f"{PROGRAM} is not installed")
    command = [program, "--format", "json", "--ignoreWarnings", os.path.abspath(dataset)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        issues = json.loads(done.stdout)["issues"]["issues"]
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{PROGRAM} failed: {(done.stderr or done.stdout).strip()[:200]}") from error
    found = [issue for issue in issues if issue.get("severity") == "error"]
    parts = ("code", "subCode", "location", "issueMessage")
    return [" ".join(str(issue[part]) for part in parts if issue.get(part)) for issue in found]


def check_dataset(dataset: str | Path) -> None:
    """Refuse a dataset that the validator finds errors in; without a validator say so, and go on.

    Raises:
        DatasetError: there are errors.
    """
    try:
        errors = errors_of(dataset)
    except (FileNotFoundError, RuntimeError) as error:
        logger.warning("%s was not validated: %s (pip install %s)", dataset, error, PROGRAM)
        return
    if errors:
        more = f" and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise DatasetError(
            f"{dataset} is no valid BIDS dataset: {'; '.join(errors[:_SHOWN])}{more}: mend it, or give "
            "--skip_bids_validation"
        )
