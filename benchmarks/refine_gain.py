"""Dice with and without a second pass at finer voxels, on structures that are small in their field of view.

    python -m benchmarks.refine_gain measure --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        --split_file RUN/stage2/splits.json
    python -m benchmarks.refine_gain fields --dataset_dir DATA/Dataset004_Hippocampus --output_dir DATA_IN_FIELDS \
        --split_file RUN/stage2/splits.json

Real scans and labels, of test cases as targets and of training cases as contexts. Each scan is put, at a random place,
into a larger field of made-up tissue (smoothed noise with the scan's mean and standard deviation, in which there is
nothing to find), so that the grid's voxels get larger by the factor ``--fields`` while the structures stay as they
are. With ``--parts third`` every label is cut down to its anterior third. Dice is that of ``configs/evaluate.json``,
on the scan's voxels. For comparison each scan is also segmented by itself.

A network that has only seen crops finds little in a field. ``fields`` writes the split's training cases as nnU-Net
datasets, one for each size of field, to train on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage
from tqdm import tqdm

from scripts.checkpoint import load_network
from scripts.commandline import main
from scripts.data.volumes import load_volume
from scripts.evaluation import segmentation_metrics
from scripts.inferer import ICLInferer

SMALL_MM3 = 1000.0
PARTS = ("whole", "third")
_GRAINS = (1.0, 2.0, 5.0)
_SEAM = 3
"""Voxels over which a scan fades into the tissue around it."""


def refine_gain(
    dataset_dir: str,
    checkpoint: str,
    split_file: str,
    targets: int = 20,
    context_size: int = 8,
    fields: Sequence[float] = (2.0, 3.0),
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Print a table, and a line of JSON for each row of it.

    Args:
        dataset_dir: nnU-Net dataset with labels, of crops about structures.
        checkpoint: weights trained on the split's training part.
        split_file: of the training run.
        targets: of its test cases.
        context_size: of its training cases.
        fields: edge of the field, in grids at 1 mm.
        parts: ``whole`` labels, or their anterior ``third``.
        seed: of fields and contexts.
        device: where to compute.
    """
    network = load_network(checkpoint)
    split = json.loads(Path(split_file).read_text(encoding="utf-8"))
    name = Path(dataset_dir).name
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.permutation(sorted(split["train"][name]))[:context_size].tolist())
    tested = sorted(split["test"][name])[:targets]
    pairs = {case: _read(dataset_dir, case) for case in (*chosen, *tested)}
    records = []
    for part in parts:
        cut = {case: (image, _anterior(label) if part == "third" else label) for case, (image, label) in pairs.items()}
        alone = _dice_of(network, device, cut, chosen, tested, refine=False, title=f"{part}, scans as they are")
        for field in fields:
            shape = [int(np.ceil(field * n)) for n in network.grid.tolist()]
            made = {
                case: embedded(*pair, shape, np.random.default_rng([seed, i]))
                for i, (case, pair) in enumerate(cut.items())
            }
            rows = _dice_of(network, device, made, chosen, tested, refine=True, title=f"{part}, field {field:g}")
            for row, plain in zip(rows, alone, strict=True):
                row["alone"] = plain["global"]
            for record in summarised(rows):
                records.append({"part": part, "field": field, **record, "seed": seed, "device": device})
    print(table(records))
    for record in records:
        print(json.dumps(record))


def write_fields(
    dataset_dir: str, split_file: str, output_dir: str, fields: Sequence[float] = (1.0, 2.0), seed: int = 0
) -> None:
    """Write training cases in fields of made-up tissue: a dataset for each size.

    Args:
        dataset_dir: nnU-Net dataset with labels, of crops with voxels of 1 mm.
        split_file: its training part is used.
        output_dir: where ``Dataset901_Field...`` and so on go.
        fields: edges of the fields, as parts of the mean crop's.
        seed: of the fields.

    Raises:
        FileExistsError: there is such a dataset.
    """
    split, source = json.loads(Path(split_file).read_text(encoding="utf-8")), Path(dataset_dir)
    pairs = {case: _read(dataset_dir, case) for case in sorted(split["train"][source.name])}
    mean = np.mean([image.shape for image, _ in pairs.values()], axis=0)
    for number, field in enumerate(fields, start=901):
        folder = Path(output_dir) / f"Dataset{number}_Field{field:g}"
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for i, (case, pair) in enumerate(tqdm(pairs.items(), folder.name)):
            image, label = embedded(*pair, np.ceil(field * mean), np.random.default_rng([seed, i]))
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"{case}_0000.nii.gz")
            nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"{case}.nii.gz")
        shutil.copy(source / "dataset.json", folder)


def embedded(
    image: np.ndarray, label: np.ndarray, shape: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A scan in a larger field of made-up tissue, at a random place.

    Args:
        image: ``(H, W, D)``.
        label: the same voxels.
        shape: of the field; an axis that is not longer than the scan's stays as it is.
        rng: of tissue and place.

    Returns:
        Image (float32) and label; the label's volume is what it was.
    """
    shape = np.maximum(shape, image.shape).astype(int)
    tissue = np.zeros(shape)
    for grain in _GRAINS:
        noise = ndimage.gaussian_filter(rng.normal(size=shape), grain)
        tissue += noise / noise.std()
    tissue = image.mean() + image.std() * tissue / tissue.std()
    room = shape - image.shape
    start = (room * rng.uniform(0.2, 0.8, 3)).astype(int)
    place = tuple(slice(low, low + n) for low, n in zip(start, image.shape, strict=True))
    inside = ndimage.distance_transform_cdt(np.pad(np.ones(image.shape, np.uint8), 1))[1:-1, 1:-1, 1:-1]
    weight = np.where(label > 0, 1, np.minimum(inside / (_SEAM + 1), 1))
    tissue[place] = weight * image + (1 - weight) * tissue[place]
    answer = np.zeros(shape, label.dtype)
    answer[place] = label
    return (tissue - tissue.min()).astype(np.float32), answer


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over structures below 1 cm³, and over the others; the gain with its standard error.

    Args:
        rows: ``volume_mm3``, ``global``, ``refined`` and ``alone`` (Dice) and ``kept`` of each structure.
    """
    found = []
    for size, group in (
        ("< 1 cm3", [row for row in rows if row["volume_mm3"] < SMALL_MM3]),
        (">= 1 cm3", [row for row in rows if row["volume_mm3"] >= SMALL_MM3]),
    ):
        if not group:
            continue
        gain = np.array([row["refined"] - row["global"] for row in group])
        error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else float("nan")
        means = {
            key: float(np.mean([row[key] for row in group])) for key in ("volume_mm3", "global", "refined", "alone")
        }
        found.append(
            {
                "size": size,
                "structures": len(group),
                **{key: round(value, 3) for key, value in means.items()},
                "gain": round(float(gain.mean()), 3),
                "standard_error": round(float(error), 3) if np.isfinite(error) else None,
                "worse": int((gain < -0.01).sum()),
                "kept": sum(row["kept"] is not None for row in group),
                "global_mm": round(float(np.mean([row["global_mm"] for row in group])), 2),
                "refined_mm": _mean([row["refined_mm"] for row in group if row["refined_mm"] is not None]),
            }
        )
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as lines of text."""
    names = ("part", "field", "size", "structures", "global_mm", "refined_mm", "global", "refined", "gain")
    names += ("standard_error", "worse", "kept", "alone")
    lines = [[*names], *([str(record[name]) for name in names] for record in records)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _dice_of(
    network: torch.nn.Module,
    device: str,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    contexts: Sequence[str],
    targets: Sequence[str],
    refine: bool,
    title: str,
) -> list[dict[str, Any]]:
    """A row per target and label, in their order."""
    inferer = ICLInferer(network, device, refine=refine)
    inferer.set_context(*([_volume(pairs[case][side]) for case in contexts] for side in (0, 1)))
    spacing, rows = inferer.context.preprocessing.spacing_mm, []
    for case in tqdm(targets, title):
        image, label = pairs[case]
        target = inferer.to_grid(_volume(image))
        scores = inferer(target[None].to(inferer.device), inferer.network)[0].cpu()
        answers = [inferer.answer(scores, target, {})]
        answers += [inferer.answer(scores, target)] if refine else []
        for value in inferer.label_values:
            dice = [segmentation_metrics(a[0].numpy() == value, label == value, np.eye(4))["dice"] for a in answers]
            done = inferer.refined.get(value, {})
            rows.append(
                {
                    "volume_mm3": float((label == value).sum()),
                    "global": dice[0],
                    "refined": dice[-1],
                    "kept": done.get("kept"),
                    "global_mm": spacing,
                    "refined_mm": done.get("spacing_mm"),
                }
            )
    return rows


def _read(dataset_dir: str, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a case, which has voxels of 1 mm."""
    image = load_volume(Path(dataset_dir) / "imagesTr" / f"{case}_0000.nii.gz")[0].numpy()
    return image, load_volume(Path(dataset_dir) / "labelsTr" / f"{case}.nii.gz")[0].numpy().astype(np.uint8)


def _anterior(label: np.ndarray) -> np.ndarray:
    """Each label's anterior third, by volume."""
    result = np.zeros_like(label)
    for value in np.unique(label[label > 0]):
        places = np.nonzero(label == value)
        front = places[1] > np.quantile(places[1], 2 / 3)
        result[tuple(axis[front] for axis in places)] = value
    return result


def _volume(voxels: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.as_tensor(voxels, dtype=torch.float32)[None], affine=torch.eye(4, dtype=torch.float64))


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 2) if values else None


if __name__ == "__main__":
    main({"measure": refine_gain, "fields": write_fields})
