"""The main job from nothing, in less than a minute on a laptop CPU: make data, segment, score.

Command line::

    python -m scripts.demo --output_dir demo_output

Every step is one of the documented commands and is printed before it runs. The weights are those that come with the
bundle, and nothing is trained: the subjects are of an anatomy that the weights have never seen. Eight of them, drawn
once, are the contexts of all; a subject among them is segmented from the seven others.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.data.synthesis.cohort import check_range
from scripts.runtime.manifest import ROOT
from scripts.runtime.options import flag
from scripts.runtime.output_folder import OutputFolder, foreign_files

_COHORT = "--cohorts 1 --num_labels 1 --spatial_size 48 --spacing_mm 2 --spread 0.3 --seed 11"
GRID = "--spatial_size 32"
"""Of the scans' shape, and quicker than the weights' own grid."""


def demo(output_dir: str = "demo_output", subjects: int = 12, overwrite: bool = False) -> None:
    """Make a cohort, segment each of its subjects from the others, score and draw the result.

    Args:
        output_dir: where everything goes.
        subjects: of the cohort, at least two.
        overwrite: replace an earlier demo.

    Raises:
        FileExistsError: ``output_dir`` holds an earlier demo, or something else.
        ValueError: not a number of subjects, fewer than two, or a step failed.
    """
    check_range("subjects", subjects, 2)  # one to segment and one to show
    folder = Path(output_dir)
    if folder.exists() and any(folder.iterdir()):
        if foreign := foreign_files(folder):
            raise FileExistsError(
                f"{folder} holds something that is not a demo's, or was changed since, such as {foreign[0].name}: give "
                "another --output_dir"
            )
        if not flag(overwrite):
            raise FileExistsError(f"{folder} holds an earlier demo: give another --output_dir or --overwrite true")
        shutil.rmtree(folder)
    OutputFolder(folder).open()
    started = time.monotonic()
    quoted, data = shlex.quote(str(folder)), shlex.quote(str(folder / "data"))
    _run("scripts.synthesize", f"{_COHORT} --subjects {subjects} --output_dir {data}")
    dataset = f"{data}/Dataset900_Synthetic000"
    run_bundle("inference", f"--dataset_dir {dataset} --context_dir {dataset} {GRID} --output_dir {quoted}/predictions")
    run_bundle(
        "evaluate",
        f"--prediction_dir {quoted}/predictions --reference_dir {dataset}/labelsTr --output_dir {quoted}/scores",
    )
    summary = json.loads((folder / "scores" / "summary.json").read_text(encoding="utf-8"))
    print(
        f"\nmean Dice {summary['mean']['dice']['mean']:.2f} on {summary['num_cases']} subjects the network never saw; "
        f"{time.monotonic() - started:.0f} seconds in all.\nLook at {folder}/predictions/report.html and "
        f"{folder}/predictions/*.png; the numbers are in {folder}/scores/metrics.csv."
    )


def run_bundle(config: str, options: str) -> None:
    """Print a documented workflow command and run it.

    Args:
        config: name of the configuration, without folder and ending.
        options: the command's options as typed.

    Raises:
        ValueError: it failed.
    """
    root = os.path.relpath(ROOT)
    elsewhere = "" if root == "." else f"--bundle_root {shlex.quote(root)} "
    file = shlex.quote(str(Path(root, "configs", f"{config}.json")))
    _run("monai.bundle", f"run --config_file {file} {elsewhere}{options}")


def _run(module: str, options: str) -> None:
    arguments = ["-m", module, *shlex.split(options)]
    print("\n$ python " + " ".join(arguments), flush=True)
    status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        raise ValueError(f"the step above failed with exit status {status}")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(demo)
