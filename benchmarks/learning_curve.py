"""One more point of a training's learning curve, as gain over averaging the contexts' labels.

    python -m benchmarks.learning_curve --checkpoint RUN/stage1/model.pt --dataset_dir DATA/Dataset004_Hippocampus

Measures the weights as they are now on development cases of the unseen dataset and on new synthetic cohorts, appends a
row to ``learning_curve.csv`` beside them and prints all rows. Run it now and then while a training goes on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from benchmarks import unseen_cohorts, unseen_dataset
from scripts.checkpoint import load_network
from scripts.runtime.atomic_files import write_text
from scripts.runtime.commandline import main

FIELDS = ("epoch", "cohorts", "cohorts_gain", "aligned", "aligned_gain", "misaligned", "misaligned_gain")


def learning_curve(
    checkpoint: str,
    dataset_dir: str,
    context_size: int = 4,
    cases: int = 12,
    cohorts: int = 24,
    device: str = "cpu",
) -> None:
    """Measure once and print the curve: Dice of the network, and how much it is above that of averaging.

    Args:
        checkpoint: weights of a run, ``model.pt`` in its folder.
        dataset_dir: nnU-Net dataset folder of ``benchmarks/hippocampus_split.json``.
        context_size: contexts K.
        cases: development cases.
        cohorts: made-up cohorts.
        device: where to compute.
    """
    path = Path(checkpoint)
    network = load_network(path).to(device)
    epochs = _read(path.with_name("metrics.csv"))
    row: dict[str, str] = {"epoch": epochs[-1]["epoch"] if epochs else ""}
    (found,) = unseen_cohorts.measure(network, cohorts, (context_size,))
    measured = {"cohorts": found}
    for found in unseen_dataset.measure(network, dataset_dir, "development", (context_size,), cases, device=device):
        measured[found["alignment"]] = found
    for name, found in measured.items():
        row |= {name: f"{found['network'][0]:.3f}", f"{name}_gain": f"{found['gain'][0]:+.3f}"}
    table = path.with_name("learning_curve.csv")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*_read(table), row])
    write_text(text.getvalue(), table)
    print(text.getvalue().replace(",", "\t"), end="")


def _read(path: Path) -> list[Mapping[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else []


if __name__ == "__main__":
    main(learning_curve)
