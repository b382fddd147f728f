"""How well the expected Dice of ``scripts.inference.confidence`` foretells the real one: table, correlations and plot.

    python -m benchmarks.expected_quality --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        --split_file RUN/stage2/splits.json --output_dir OUT

Targets are the split's validation and test cases, contexts come from its training part. Every target is segmented
as it is, and once more after one of ``benchmarks.degradations``, in turn. The real Dice is that of
``configs/evaluate.json``, on native voxels. A run goes on where the table in ``--output_dir`` ends.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from scipy.stats import pearsonr, spearmanr
from tqdm import tqdm

from benchmarks.degradations import DEGRADATIONS
from scripts.checkpoint import load_network
from scripts.data.volumes import load_volume
from scripts.evaluation import segmentation_metrics
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.context_source import ContextSource
from scripts.inferer import ICLInferer
from scripts.runtime.atomic_files import write_atomically, write_json, write_text
from scripts.runtime.commandline import main
from scripts.runtime.options import flag

PLAIN = "none"


def expected_quality(
    dataset_dir: str,
    checkpoint: str,
    split_file: str,
    output_dir: str,
    context_size: int = 8,
    ensemble: int = 1,
    seed: int = 0,
    degraded: bool = True,
    minutes: float | None = None,
    device: str = "cpu",
) -> None:
    """Compare expected with real Dice.

    Args:
        dataset_dir: nnU-Net dataset with labels.
        checkpoint: weights trained on the split's training part.
        split_file: of the training run.
        output_dir: where ``expected_quality.csv``, ``.json`` and ``.png`` go.
        context_size: number of contexts.
        ensemble: predictions per target.
        seed: of contexts, ensemble and degradations.
        degraded: segment every target once more after a degradation.
        minutes: stop after about this time; the same command goes on.
        device: where to compute.
    """
    started = time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    network = load_network(checkpoint)
    contexts = ContextSource(dataset_dir, network, context_size, split_file=split_file, seed=seed)
    inferer = ICLInferer(network, device, contexts, mini_context_size=context_size)
    predictor = ConfidentInferer(inferer, ensemble, self_test=True, seed=seed)
    name = Path(dataset_dir).name
    split = json.loads(Path(split_file).read_text(encoding="utf-8"))
    cases = sorted(case for part in ("val", "test") for case in split[part][name])
    table = Path(output_dir) / "expected_quality.csv"
    rows = list(csv.DictReader(table.open(encoding="utf-8"))) if table.is_file() else []
    done = {(row["case"], row["degradation"]) for row in rows}
    self_test = predictor.prepare()
    rounds = (False, True) if flag(degraded) else (False,)
    jobs = [(number, case, spoil) for spoil in rounds for number, case in enumerate(cases)]
    for number, case, spoil in tqdm(jobs, "cases"):
        degradation = DEGRADATIONS[number % len(DEGRADATIONS)] if spoil else None
        kind = degradation.__name__ if degradation else PLAIN
        if (case, kind) in done:
            continue
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            print(f"{len(done)} of {len(jobs)} done: the same command goes on")
            return
        image = load_volume(Path(dataset_dir) / "imagesTr" / f"{case}_0000.nii.gz")
        voxels, label = image[0].numpy(), load_volume(Path(dataset_dir) / "labelsTr" / f"{case}.nii.gz")[0].numpy()
        if degradation:
            rng = np.random.default_rng([seed, number])
            voxels, label = degradation(voxels, label, rng.random(), rng)
            image = MetaTensor(np.ascontiguousarray(voxels, np.float32)[None], affine=image.affine)
        target = predictor.complete(inferer.target(image))
        prediction = target.prediction[0].numpy()
        for value in inferer.label_values:
            real = segmentation_metrics(prediction == value, label == value, np.asarray(image.affine))["dice"]
            if np.isfinite(real):  # cut off, and nothing found
                rows.append(_row(case, kind, value, real, target.confidence))
        done.add((case, kind))
        write_text(_text(rows), table)
    facts = {
        "contexts": inferer.context.names,
        "self_test": self_test,
        "ensemble": ensemble,
        "device": device,
        **correlations(rows),
    }
    write_json(facts, table.with_suffix(".json"))
    plot(rows, table.with_suffix(".png"))
    print(json.dumps({key: facts[key] for key in facts if key not in ("contexts", "self_test")}, indent=2))


def correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pearson's and Spearman's correlation and the mean absolute error, for all rows, the plain and the degraded.

    ``by_label`` has a row per case and label, ``by_case`` the mean over the labels of a case.
    """
    found: dict[str, Any] = {}
    for group, chosen in (
        ("all", rows),
        ("plain", [row for row in rows if row["degradation"] == PLAIN]),
        ("degraded", [row for row in rows if row["degradation"] != PLAIN]),
    ):
        cases: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in chosen:
            both = (float(row["expected_dice"]), float(row["real_dice"]))
            cases.setdefault((row["case"], row["degradation"]), []).append(both)
        if len(cases) < 2:
            continue
        by_label = np.array([both for values in cases.values() for both in values])
        by_case = np.array([np.mean(values, axis=0) for values in cases.values()])
        found[group] = {"by_label": _correlation(by_label), "by_case": _correlation(by_case)}
        flagged = {(row["case"], row["degradation"]) for row in chosen if row["flags"]}
        found[group] |= {"cases": len(cases), "flagged": len(flagged)}
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Expected against real Dice, a point per case and label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 5), dpi=110)
    axes.plot((0, 1), (0, 1), color="0.7", linewidth=1, zorder=0)
    for label, colour, chosen in (
        ("degraded", "#D55E00", [row for row in rows if row["degradation"] != PLAIN]),
        ("as acquired", "#0072B2", [row for row in rows if row["degradation"] == PLAIN]),
    ):
        expected, real = (np.array([float(row[key]) for row in chosen]) for key in ("expected_dice", "real_dice"))
        flagged = np.array([bool(row["flags"]) for row in chosen], bool)
        for marked, marker, suffix in ((~flagged, "o", ""), (flagged, "x", ", flagged")):
            axes.scatter(expected[marked], real[marked], 18, colour, marker, linewidths=1, label=label + suffix)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected Dice", ylabel="real Dice", aspect="equal")
    axes.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"), ".png")
    pyplot.close(figure)


def _row(case: str, kind: str, value: int, real: float, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": case,
        "degradation": kind,
        "label": value,
        "real_dice": round(real, 4),
        "expected_dice": found["expected_dice"][str(value)],
        "agreement": found["agreement"][str(value)],
        "similarity": found["similarity"],
        "flags": "; ".join(found["flags"]),
    }


def _correlation(both: np.ndarray) -> dict[str, float | None]:
    expected, real = both.T
    found = {
        "pearson": pearsonr(expected, real).statistic,
        "spearman": spearmanr(expected, real).statistic,
        "mean_absolute_error": np.abs(expected - real).mean(),
    }
    return {name: round(float(value), 3) if np.isfinite(value) else None for name, value in found.items()}


def _text(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


if __name__ == "__main__":
    main(expected_quality)
