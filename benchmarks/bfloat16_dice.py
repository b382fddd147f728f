"""What bfloat16 does to the predictions: the demo's cases segmented with `--amp true` and with `--amp false`.

    python -m benchmarks.bfloat16_dice [--demo_dir demo_output]

`--demo_dir` is the folder of a finished demo (`make demo`); without one, the demo is run first, in a temporary folder.
"""

from __future__ import annotations

import csv
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.paired import Conditions, benchmark
from scripts.demo import GRID, demo, run_bundle


@benchmark
def bfloat16_dice(conditions: Conditions, demo_dir: str = "") -> Iterator[dict[str, Any]]:
    """Compare the Dice of the two precisions.

    Args:
        conditions: of the measurement.
        demo_dir: a finished demo; empty runs one.

    Raises:
        FileNotFoundError: there is no finished demo in ``demo_dir``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(demo_dir or f"{scratch}/demo")
        if not demo_dir:
            demo(str(folder), **{"subjects": 3} if conditions.quick else {})
        if not (folder / "scores" / "summary.json").is_file():
            raise FileNotFoundError(f"no finished demo in {folder}: run make demo, or leave --demo_dir out")
        dice = {
            name: _dice(folder, Path(scratch) / name, amp, conditions.device)
            for name, amp in (("float32", "false"), ("bfloat16", "true"))
        }
    means = {name: sum(values) / len(values) for name, values in dice.items()}
    differences = [abs(a - b) for a, b in zip(*dice.values(), strict=True)]
    yield {
        "case": f"demo, {len(differences)} cases",
        "sides": {name: {"mean_dice": mean} for name, mean in means.items()},
        "change_of_mean_dice": abs(means["bfloat16"] - means["float32"]),
        "largest_change_of_a_case": max(differences),
    }


def _dice(folder: Path, results: Path, amp: str, device: str) -> list[float]:
    """Dice of every case and label of the demo."""
    dataset = shlex.quote(str(next((folder / "data").glob("Dataset*"))))
    run_bundle(
        "inference",
        f"--dataset_dir {dataset} --context_dir {dataset} {GRID} --overlays false --output_dir {results}/predictions "
        f"--amp {amp} --device {device}",
    )
    run_bundle(
        "evaluate",
        f"--prediction_dir {results}/predictions --reference_dir {dataset}/labelsTr --output_dir {results}/scores",
    )
    with (results / "scores" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row["dice"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(bfloat16_dice)
