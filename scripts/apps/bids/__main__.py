"""Command line of the BIDS App.

::

    neuroverse3d bids BIDS_DIR OUT participant --examples EXAMPLES [--participant_label 01 02]
    neuroverse3d bids BIDS_DIR OUT group

Exit status: 0 if all is done, 1 with one line if something could not be, 2 for a command that is not understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.apps.bids.derivative import Derivative
from scripts.apps.bids.group import write_volumes
from scripts.apps.bids.participant import segment
from scripts.apps.bids.validation import check_dataset
from scripts.data.bids import find_scans, is_bids, read_filters
from scripts.data.layouts import look_for_examples
from scripts.runtime.commandline import install_one_line_errors
from scripts.runtime.manifest import ROOT, bundle_identity
from scripts.runtime.options import OPTIONS, normalise
from scripts.runtime.shards import this_shard
from scripts.runtime.termination import exit_on_sigterm

_FROM_BIDS = {"dataset_dir", "target_images", "context_dir", "context_images", "context_labels", "context_file",
              "output_dir", "split_file", "target_split", "fold", "task", "context_label_channel", "channel", "help",
              "debug", "shard", "overlays", "probabilities", "self_test", "overwrite"}  # fmt: skip
"""Options of ``inference.json`` that the app decides on, or has of its own."""

APP_OPTIONS: dict[str, dict[str, Any]] = {
    "participant_label": {"nargs": "+", "metavar": "LABEL", "help": "only these subjects, with sub- or without"},
    "session_label": {"nargs": "+", "metavar": "LABEL", "help": "only these sessions, with ses- or without"},
    "examples": {
        "nargs": "+",
        "metavar": "PATH",
        "help": "a BIDS derivative with *_dseg, an nnU-Net dataset, or two folders (images labels); the participant "
        "level needs them",
    },
    "suffix": {"default": "T1w", "help": "kind of scan that is segmented, and of the examples (T1w)"},
    "mask_pattern": {"metavar": "PATTERN", "help": "which label maps of the examples, such as *_desc-aseg_dseg.nii.gz"},
    "bids_filter_file": {"metavar": "FILE", "help": "JSON file of filters that choose scans, as of fMRIPrep"},
    "skip_bids_validation": {"action": "store_true", "help": "do not validate the dataset first"},
    "work_dir": {"help": "folder for intermediate results, by which a run goes on (hidden in the derivative)"},
    "shard": {"help": "3/16: the third of sixteen parts of the subjects, for job arrays"},
    "probseg": {"action": "store_true", "help": "also write the scores of each label, *_probseg"},
    "skip_self_test": {"action": "store_true", "help": "do not test the examples on each other: no expected Dice"},
    "overwrite": {"action": "store_true", "help": "replace segmentations by other examples, weights or settings"},
    "debug": {"action": "store_true", "help": "full tracebacks"},
}
"""Options of the app's own: what ``argparse`` is told of each."""


def parser() -> argparse.ArgumentParser:
    """The command line, as BIDS Apps have it; further options of ``inference.json`` are taken by their names."""
    found = argparse.ArgumentParser(
        prog="neuroverse3d bids",
        allow_abbrev=False,
        description="Segment the scans of a BIDS dataset from a few examples, into a BIDS derivative.",
        epilog="Other options of inference.json are taken as well, such as --context_size 8 --align affine "
        "--checkpoint W.pt --device cpu (docs/inference.md). For research use only; not a medical device.",
    )
    found.add_argument("bids_dir", help="root of the BIDS dataset; it is only read")
    found.add_argument("output_dir", help="root of the derivative, such as BIDS_DIR/derivatives/neuroverse3d")
    found.add_argument("analysis_level", choices=("participant", "group"), help="segment, or put volumes in one table")

    for name, facts in APP_OPTIONS.items():
        found.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, **facts)
    found.add_argument("-v", "--version", action="version", version=f"Neuroverse3D {bundle_identity()['version']}")
    return found


def further_options(rest: Sequence[str], refuse: Any) -> dict[str, Any]:
    """Options of ``inference.json`` among what the app does not know.

    Args:
        rest: what was typed besides.
        refuse: called with what is wrong, and does not return.
    """
    config = json.loads((ROOT / "configs" / "inference.json").read_text(encoding="utf-8"))
    known = set(config) & set(OPTIONS) - _FROM_BIDS
    found: dict[str, Any] = {}
    tokens = [part for token in rest for part in (token.split("=", 1) if token.startswith("--") else [token])]
    for name, value in zip(tokens[::2], tokens[1::2], strict=False):
        option = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or option not in known:
            refuse(f"unrecognized argument: {name}")
        try:
            found[option] = normalise(option, value)
        except ValueError as error:
            refuse(str(error))
    if len(tokens) % 2:
        refuse(f"no value of {tokens[-1]}")
    return found


def run(arguments: Sequence[str]) -> None:
    """Run the app.

    Args:
        arguments: what was typed.

    Raises:
        SystemExit: status 2, the command is not understood.
        ValueError, OSError: something could not be done.
    """
    app = parser()
    asked, rest = app.parse_known_args(arguments)
    options = further_options(rest, app.error)
    if not is_bids(asked.bids_dir):
        raise FileNotFoundError(f"{asked.bids_dir} is no BIDS dataset: no dataset_description.json, no sub-* folders")
    if asked.analysis_level == "group":
        path, rows = write_volumes(asked.output_dir, asked.participant_label)
        print(f"{path}: {rows} segmentations")
        return
    if not asked.examples:
        app.error("the participant level needs --examples: a BIDS derivative with *_dseg, or another set of pairs")
    if not asked.skip_bids_validation:
        check_dataset(asked.bids_dir)
    filters = read_filters(asked.bids_filter_file, asked.suffix) if asked.bids_filter_file else None
    scans = find_scans(asked.bids_dir, asked.participant_label, asked.session_label, asked.suffix, filters)
    subjects = list(dict.fromkeys(scan.entities["sub"] for scan in scans))
    mine = this_shard(asked.shard).of(subjects)
    scans = [scan for scan in scans if scan.entities["sub"] in mine]
    examples = look_for_examples(asked.examples, asked.suffix, asked.mask_pattern, asked.bids_dir)
    print(f"scans: {len(scans)} of {len(mine)} subjects; examples: {examples.what}", flush=True)
    if not scans:
        return
    folder = asked.examples[0] if is_bids(asked.examples[0]) else None
    derivative = Derivative(asked.output_dir, asked.bids_dir, folder, examples.names)
    options |= {
        "probabilities": asked.probseg,
        "self_test": not asked.skip_self_test,
        "overwrite": asked.overwrite,
        "debug": asked.debug,
    }
    count = segment(scans, examples, derivative, options, asked.work_dir)
    print(f"{Path(asked.output_dir)}: {count} segmentations of {len(mine)} subjects")


def main() -> None:
    """Run the app on what was typed."""
    exit_on_sigterm()
    install_one_line_errors("--debug" in sys.argv)
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
