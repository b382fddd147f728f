"""Participant level: the scans of a dataset through ``inference.json``, and the results into the derivative."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.apps.bids.derivative import Derivative, case_name
from scripts.data.bids import BidsFile
from scripts.data.layouts import Found
from scripts.data.nnunet import DatasetError
from scripts.runtime.manifest import ROOT
from scripts.runtime.output_folder import STATE
from scripts.runtime.workflow import plain_errors, start_workflow


def work_folder(derivative: Derivative, work_dir: str | Path | None) -> Path:
    """Where the run itself writes: in ``work_dir``, or hidden in the derivative."""
    return Path(work_dir) / "neuroverse3d" if work_dir is not None else derivative.folder / STATE / "work"


def segment(
    scans: Sequence[BidsFile],
    examples: Found,
    derivative: Derivative,
    options: Mapping[str, Any],
    work_dir: str | Path | None = None,
) -> int:
    """Segment scans into a derivative; those that are done already are not segmented again.

    Args:
        scans: of the dataset.
        examples: the example pairs.
        derivative: where the results go.
        options: of ``inference.json``, each of its type.
        work_dir: where the run itself writes; None hides it in the derivative.

    Returns:
        How many segmentations there are now.

    Raises:
        DatasetError: scans could not be segmented; the others are.
        FileExistsError: segmentations of other scans, examples, weights or settings are in the way.
        ValueError, OSError: as of the workflow.
    """
    overwrite = bool(options.get("overwrite", False))
    derivative.check(scans, overwrite)
    derivative.open()
    made = work_folder(derivative, work_dir)
    given = {
        "target_images": [os.path.abspath(scan.path) for scan in scans],
        "output_dir": str(made),
        **examples.options,
        **options,
    }
    workflow = start_workflow("inference.json", given, ROOT / "configs" / "logging.conf")
    run = workflow.parser.get_parsed_content("inference_run")
    failure = None
    try:
        with plain_errors():
            workflow.run()
    except DatasetError as error:
        if not run.report.get("finished"):
            raise
        failure = error
    done = [scan for scan in scans if case_name(scan) in run.report["cases"]]
    for scan in done:
        derivative.write(scan, run.report, made, overwrite)
    derivative.write_pages(scans, run.report)
    workflow.finalize()
    if failure is not None:
        raise failure
    return len(done)
