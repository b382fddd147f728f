"""Fine-tuned for some minutes on an unseen dataset: from given weights, and from scratch with the same network.

    python -m benchmarks.fine_tuning --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        --output_dir OUT [--minutes "[2,5,10]" --part development]

Both train with ``configs/train_stage2.json`` on the training cases of ``benchmarks/hippocampus_split.json``. At every
mark the run gets SIGTERM, which it answers with a checkpoint; that is scored on cases of another part, and the run is
resumed. The minutes are those of the training commands, start included.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.unseen_dataset import SPLIT_FILE, measure
from scripts.checkpoint import load_network
from scripts.runtime import termination as stop
from scripts.runtime.commandline import main

_OPTIONS = "--augment false --num_workers 0 --groups_per_epoch 20 --val_interval 1000 --context_size [2,6]"


def fine_tuning(
    dataset_dir: str,
    checkpoint: str,
    output_dir: str,
    minutes: Sequence[float] = (2, 5, 10),
    part: str = "development",
    context_size: int = 8,
    cases: int | None = None,
    learning_rate: float = 2e-4,
    scratch_learning_rate: float = 1e-3,
    options: str = _OPTIONS,
) -> None:
    """Train one after the other and print mean Dice at every mark, with 95 % intervals over the cases.

    Args:
        dataset_dir: nnU-Net dataset folder of the split file.
        checkpoint: weights to start from; the other run has its widths and grid.
        output_dir: a new folder for the runs.
        minutes: marks, ascending.
        part: development or reporting.
        context_size: contexts K in scoring.
        cases: at most so many targets.
        learning_rate: of the run from weights.
        scratch_learning_rate: of the run from scratch.
        options: further options of both, as on a command line.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: a training failed, or ended before its time.
    """
    if Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: give another --output_dir")
    network = load_network(checkpoint)
    layout = f"--channels '{list(network.channels)}' --spatial_size '{network.grid.tolist()}'"
    weights = shlex.quote(str(Path(checkpoint).resolve()))
    starts = {
        "fine-tuned": f"--init_checkpoint {weights} --learning_rate {learning_rate}",
        "from scratch": f"--init_checkpoint none {layout} --learning_rate {scratch_learning_rate}",
    }

    def score(name: str, passed: float, path: str | Path) -> None:
        (row,) = measure(load_network(path), dataset_dir, part, (context_size,), cases, ("aligned",))
        print("{:12s} {:5.1f} min  Dice {:.3f} [{:.3f}, {:.3f}]".format(name, passed, *row["network"]), flush=True)

    score("as it came", 0, checkpoint)
    for name, start in starts.items():
        folder = Path(output_dir) / name.replace(" ", "_")
        passed = 0.0
        for mark in minutes:
            resume = "true" if passed else "false"
            passed += _train(
                f"{start} --dataset_dir {shlex.quote(dataset_dir)} --output_dir {shlex.quote(str(folder))} "
                f"--split_file {SPLIT_FILE} --epochs 100000 --resume {resume} {options}",
                60 * mark - 60 * passed,
            )
            score(name, passed, folder / "stage2" / "last.pt")


def _train(options: str, seconds: float) -> float:
    """Run stage 2 until the time is over; how many minutes it took with its last group."""
    started = time.monotonic()
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train_stage2.json"]
    process = subprocess.Popen([*command, *shlex.split(options)])
    try:
        process.wait(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    finally:
        status = process.wait()
    if status != stop.STATUS:
        raise ValueError(f"the training ended with status {status} instead of being stopped")
    return (time.monotonic() - started) / 60


if __name__ == "__main__":
    main(fine_tuning)
