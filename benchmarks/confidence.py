"""What is said of a prediction's quality, against what is true: expected Dice, and the context that is out of line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from scipy import ndimage
from scipy.stats import pearsonr, spearmanr
from tqdm import tqdm

from benchmarks.hippocampus import SHIPPED, read_pair, weights
from benchmarks.measure import Row, Run, work
from scripts.checkpoint import load_network
from scripts.data.nnunet import find_datasets
from scripts.data.splits import read_split
from scripts.evaluation import segmentation_metrics
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.context_source import ContextSource
from scripts.inferer import ICLInferer
from scripts.runtime.atomic_files import write_atomically, write_text
from scripts.runtime.commandline import main

PLAIN = "none"

Spoilt = tuple[np.ndarray, np.ndarray]
Degradation = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], Spoilt]
"""Spoils an image (H, W, D) by a strength from 0 to 1, and moves its label along."""


@work
def expected(
    run: Run,
    dataset_dir: str,
    split_file: str,
    output_dir: str,
    checkpoint: str = SHIPPED,
    context_size: int = 8,
    ensemble: int = 1,
    align: str = "deformable",
    seed: int = 0,
) -> Iterator[Row]:
    """How well the expected Dice of ``scripts.inference.confidence`` foretells the real one, on native voxels.

    Targets are the split's validation and test cases, contexts come from its training part. Every target is segmented
    as it is, and once more after a degradation, ten of them in turn.

    Args:
        run: how it is run.
        dataset_dir: nnU-Net dataset with labels.
        split_file: of the training run.
        output_dir: where ``expected_quality.csv`` and ``.png`` go.
        checkpoint: weights.
        context_size: contexts K.
        ensemble: predictions per target.
        align: how contexts are brought to a target: off, affine or deformable.
        seed: of contexts, ensemble and degradations.
    """
    network = load_network(checkpoint)
    contexts = ContextSource(dataset_dir, network, context_size, split_file=split_file, seed=seed)
    inferer = ICLInferer(network, run.device, contexts, mini_context_size=context_size, align=align)
    predictor = ConfidentInferer(inferer, ensemble, self_test=True, seed=seed)
    split = read_split(split_file, find_datasets(dataset_dir)[0].cases())
    cases = sorted(case["case"] for part in ("val", "test") for case in split[part])[: 2 if run.quick else None]
    rows = []
    predictor.prepare()
    for number, (degraded, case) in enumerate(tqdm([(d, case) for d in (False, True) for case in cases], "cases")):
        kind, (image, label) = PLAIN, read_pair(Path(dataset_dir), case)
        wanted = label[0].numpy()
        if degraded:
            number -= len(cases)
            degradation, rng = DEGRADATIONS[number % len(DEGRADATIONS)], np.random.default_rng([seed, number])
            kind = degradation.__name__
            voxels, wanted = degradation(image[0].numpy(), wanted, rng.random(), rng)
            image = MetaTensor(np.ascontiguousarray(voxels, np.float32)[None], affine=image.affine)
        target = predictor.complete(inferer.target(image))
        prediction = target.prediction[0].numpy()
        for value in inferer.label_values:
            real = segmentation_metrics(prediction == value, wanted == value, np.asarray(image.affine))["dice"]
            if np.isfinite(real):  # cut off, and nothing found
                rows.append(_row(case, kind, value, real, target.confidence))
    table = Path(output_dir) / "expected_quality.csv"
    write_text(_text(rows), table)
    plot(rows, table.with_suffix(".png"))
    data = f"{Path(dataset_dir).name}, {len(cases)} cases, K={context_size}, --align {align}{weights(checkpoint)}"
    for group, figures in correlations(rows).items():
        yield Row(group, figures, data)


@work
def wrong_context(
    run: Run,
    dataset_dir: str,
    split_file: str,
    checkpoint: str = SHIPPED,
    context_size: int = 8,
    offsets: Sequence[int] = (2, 4, 8),
    seed: int = 0,
) -> Iterator[Row]:
    """Whether the self-test names the context whose label map was put some voxels off, each in turn.

    Args:
        run: how it is run.
        dataset_dir: nnU-Net dataset with labels.
        split_file: of the training run; contexts come from its training part.
        checkpoint: weights.
        context_size: contexts K.
        offsets: how far the label is put off along the second axis, in the scans' voxels.
        seed: of the choice of contexts.
    """
    context_size, offsets = (3, (8,)) if run.quick else (context_size, offsets)
    network = load_network(checkpoint)
    chosen = ContextSource(dataset_dir, network, context_size, split_file=split_file, seed=seed)().names
    images, labels = zip(*(read_pair(Path(dataset_dir), name) for name in chosen), strict=True)
    inferer = ICLInferer(network, run.device, mini_context_size=context_size)
    inferer.set_context(images, labels)
    confident = ConfidentInferer(inferer, self_test=True, progress=False)
    data = f"{Path(dataset_dir).name}, {len(labels)} contexts{weights(checkpoint)}"
    yield Row("all right", {"out_of_line": len(confident.prepare()["out_of_line"])}, data)
    for offset in offsets:
        found = {"worst": 0, "out_of_line": 0}
        for number in tqdm(range(len(labels)), f"{offset} voxels"):
            spoilt = labels[number].roll(offset, dims=2)
            inferer.set_context(images, [*labels[:number], spoilt, *labels[number + 1 :]])
            test, name = confident.prepare(), inferer.context.names[number]
            found["worst"] += test["worst"] == name
            found["out_of_line"] += name in test["out_of_line"]
        yield Row(f"one label {offset} voxels off", found, data)


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of all rows, of the scans as acquired and of the degraded, each with a finite correlation."""
    found = {}
    for group, chosen in (
        ("all", rows),
        ("as acquired", [row for row in rows if row["degradation"] == PLAIN]),
        ("degraded", [row for row in rows if row["degradation"] != PLAIN]),
    ):
        cases: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in chosen:
            both = (float(row["expected_dice"]), float(row["real_dice"]))
            cases.setdefault((row["case"], row["degradation"]), []).append(both)
        by_label = np.array([both for values in cases.values() for both in values])
        by_case = np.array([np.mean(values, axis=0) for values in cases.values()])
        if len(cases) < 2 or not np.ptp(by_case, axis=0).all():  # nothing to correlate
            continue
        found[group] = {
            "cases": len(cases),
            "correlation": float(pearsonr(*by_label.T).statistic),
            "rank_correlation": float(spearmanr(*by_label.T).statistic),
            "correlation_of_cases": float(pearsonr(*by_case.T).statistic),
            "mean_absolute_error": float(np.abs(np.subtract(*by_label.T)).mean()),
            "flagged": len({(row["case"], row["degradation"]) for row in chosen if row["flags"]}),
        }
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


def noise(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Gaussian noise, standard deviation 5 to 40 % of the intensity range; magnitude image."""
    sigma = (0.05 + 0.35 * strength) * _range(image)
    return np.abs(image + rng.normal(0, sigma, image.shape)), label


def low_resolution(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Thick slices along one axis: 2 to 6 voxels, brought back linearly."""
    factors = np.ones(3)
    factors[rng.integers(3)] = 1 / (2 + 4 * strength)
    low = ndimage.zoom(image, factors, order=1)
    return ndimage.zoom(low, np.divide(image.shape, low.shape), order=1), label


def blur(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Gaussian blur of 1 to 3 voxels."""
    return ndimage.gaussian_filter(image, 1 + 2 * strength), label


def inverted(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Bright and dark exchanged, as between T1 and T2 weighting."""
    return image.max() + image.min() - image, label


def gamma(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Another contrast: exponent of up to 3.3, or 1 / 3.3."""
    exponent = np.exp((0.4 + 0.8 * strength) * rng.choice((-1, 1)))
    return ((image - image.min()) / _range(image)) ** exponent, label


def bias_field(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """A coil's brightness falling off exponentially in a random direction, e^1 to e^3 to each side."""
    direction = rng.normal(size=3)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij")
    along = sum(d * g for d, g in zip(direction / np.linalg.norm(direction), grid, strict=True))
    return image * np.exp((1 + 2 * strength) * along), label


def rotated(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """Turned by 10 to 60 degrees in one plane."""
    plane, degrees = [(0, 1), (0, 2), (1, 2)][rng.integers(3)], 10 + 50 * strength
    turned = ndimage.rotate(image, degrees, plane, reshape=False, order=1, mode="nearest")
    return turned, ndimage.rotate(label, degrees, plane, reshape=False, order=0)


def shifted(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """A crop elsewhere: 3 to 12 voxels off in a random direction."""
    direction = rng.normal(size=3)
    offset = (3 + 9 * strength) * direction / np.linalg.norm(direction)
    return ndimage.shift(image, offset, order=1, mode="nearest"), ndimage.shift(label, offset, order=0)


def cut(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """A crop that lacks 15 to 45 % of the scan at one side."""
    axis = rng.integers(3)
    kept = image.shape[axis] - int((0.15 + 0.3 * strength) * image.shape[axis])
    part = np.arange(kept) + rng.choice((0, image.shape[axis] - kept))
    return image.take(part, axis), label.take(part, axis)


def mirrored(image: np.ndarray, label: np.ndarray, strength: float, rng: np.random.Generator) -> Spoilt:
    """The wrong side: left and right exchanged."""
    return image[::-1], label[::-1]


DEGRADATIONS: tuple[Degradation, ...] = (
    noise,
    low_resolution,
    blur,
    inverted,
    gamma,
    bias_field,
    rotated,
    shifted,
    cut,
    mirrored,
)


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


def _text(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _range(image: np.ndarray) -> float:
    return float(np.ptp(image)) or 1.0


WORKS = {"expected": expected, "wrong_context": wrong_context}

if __name__ == "__main__":
    main(WORKS)
