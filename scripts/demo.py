"""The main job from nothing, in a few minutes on a laptop CPU: make data, train, segment, score.

Command line::

    python -m scripts.demo --output_dir demo_output

Every step is one of the documented commands and is printed before it runs. To fit into a few minutes, a narrow
network learns one made-up anatomy on a small grid, and then segments further subjects of it from labelled ones. It
shows the way; a network for anatomies that it has never seen takes many cohorts and far longer training.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from scripts.options import flag

_MARKER = ".demo"
_COHORT = "--cohorts 1 --subjects 24 --num_labels 1 --spatial_size 24 --spread 0.3 --seed 11"
_TRAINING = (
    "--channels [16,32] --spatial_size 24 --learning_rate 1e-3 --context_size 2 --val_context_size 2 "
    "--val_groups 10 --test_fraction 0.25 --num_workers 0 --augment false"
)


def demo(output_dir: str = "demo_output", epochs: int = 4, groups_per_epoch: int = 30, overwrite: bool = False) -> None:
    """Make a cohort, train on it, segment subjects that were never trained on, score and draw the result.

    Args:
        output_dir: where everything goes.
        epochs: epochs of training.
        groups_per_epoch: groups per epoch; each is three optimiser steps.
        overwrite: replace an earlier demo.

    Raises:
        FileExistsError: ``output_dir`` holds an earlier demo, or something else.
    """
    folder = Path(output_dir)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).is_file():
            raise FileExistsError(f"{folder} holds something that is not a demo: give another --output_dir")
        if not flag(overwrite):
            raise FileExistsError(f"{folder} holds an earlier demo: give another --output_dir or --overwrite true")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()
    started = time.monotonic()
    quoted, data = shlex.quote(str(folder)), shlex.quote(str(folder / "data"))
    _run("scripts.synthesize", f"{_COHORT} --output_dir {data}")
    run_bundle(
        "train_stage1",
        f"--dataset_dir {data} --output_dir {quoted} {_TRAINING} --epochs {epochs} "
        f"--groups_per_epoch {groups_per_epoch}",
    )
    dataset = f"{data}/Dataset900_Synthetic000"
    run_bundle(
        "inference",
        f"--dataset_dir {dataset} --context_dir {dataset} --split_file {quoted}/stage1/splits.json "
        f"--checkpoint {quoted}/stage1/model.pt --output_dir {quoted}/answers",
    )
    run_bundle(
        "evaluate",
        f"--prediction_dir {quoted}/answers --reference_dir {dataset}/labelsTr --output_dir {quoted}/scores",
    )
    summary = json.loads((folder / "scores" / "summary.json").read_text(encoding="utf-8"))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nmean Dice {summary['mean']['dice']['mean']:.2f} on {summary['num_cases']} subjects the network never saw; "
        f"{minutes:.1f} minutes in all.\nLook at {folder}/answers/*.png; the numbers are in "
        f"{folder}/scores/metrics.csv and {folder}/answers/report.json."
    )


def run_bundle(config: str, options: str) -> None:
    """Print a documented workflow command and run it.

    Args:
        config: name of the configuration, without folder and ending.
        options: the command's options as typed.

    Raises:
        ValueError: it failed.
    """
    _run("monai.bundle", f"run --config_file configs/{config}.json {options}")


def _run(module: str, options: str) -> None:
    arguments = ["-m", module, *shlex.split(options)]
    print("\n$ python " + " ".join(arguments), flush=True)
    status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        raise ValueError(f"the step above failed with exit status {status}")


if __name__ == "__main__":
    from scripts.commandline import main

    main(demo)
