"""Dice of the test cases of a split by how their contexts are chosen from its training cases.

    python -m benchmarks.context_selection --dataset_dir DATA/Dataset004_Hippocampus --checkpoint STAGE2/model.pt \
        --split_file STAGE2/splits.json [--selections "[random,similar]" --seeds "[0,1]" --turned true]

With ``--turned true`` every second candidate is turned by 90 degrees without its header saying so: contexts that a
good choice avoids.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.metrics import compute_dice
from tqdm import tqdm

from scripts.checkpoint import load_network
from scripts.data.collection import read_split
from scripts.data.nnunet import Case, find_datasets
from scripts.data.volumes import load_volume
from scripts.inference.context_source import ContextSource
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main
from scripts.runtime.options import flag


def context_selection(
    dataset_dir: str,
    checkpoint: str,
    split_file: str,
    selections: Sequence[str] = ("random", "first", "similar"),
    seeds: Sequence[int] = (0,),
    context_size: int = 8,
    turned: bool = False,
    cases: int | None = None,
    device: str = "cpu",
) -> None:
    """Print the mean Dice over cases and labels, and the mean of each label.

    Args:
        dataset_dir: nnU-Net dataset folder.
        checkpoint: weights.
        split_file: its training cases are the candidates, its test cases the targets.
        selections: to compare.
        seeds: of ``random``.
        context_size: contexts of each target.
        turned: turn every second candidate.
        cases: at most so many test cases.
        device: where to compute.
    """
    parts = read_split(split_file, find_datasets(dataset_dir)[0].cases())
    network, turned = load_network(checkpoint), flag(turned)
    with tempfile.TemporaryDirectory() as folder:
        candidates = [
            _turned(case, Path(folder)) if turned and i % 2 else case for i, case in enumerate(parts["train"])
        ]
        given = {"images": [case["image"] for case in candidates], "labels": [case["label"] for case in candidates]}
        for selection in selections:
            for seed in seeds if selection == "random" else seeds[:1]:
                source = ContextSource(None, network, context_size, selection=selection, seed=seed, **given)
                predictor = ICLInferer(network, device, source)
                started = time.perf_counter()
                values = predictor.label_values
                ready = time.perf_counter()
                scores, used = [], []
                for case in tqdm(parts["test"][:cases], selection):
                    target = predictor.complete(predictor.target(case["image"]))
                    scores.append(_dice(target.prediction, case, values))
                    used += [name for names in target.used.values() for name in names]
                facts = {
                    "selection": selection,
                    "seed": seed,
                    "turned": turned,
                    "turned_used": round(float(np.mean([Path(name).parent == Path(folder) for name in used])), 3),
                    "cases": len(scores),
                    "candidates": len(candidates),
                    "dice": round(float(np.nanmean(scores)), 4),
                    "dice_of_labels": np.nanmean(scores, axis=0).round(4).tolist(),
                    "seconds_to_read": round(ready - started, 1),
                    "seconds_a_case": round((time.perf_counter() - ready) / len(scores), 2),
                    "device": str(predictor.device),
                }
                print(json.dumps(facts))


def _turned(case: Case, folder: Path) -> Case:
    turned = {}
    for kind in ("image", "label"):
        source = nib.load(case[kind])
        turned[kind] = str(folder / f"{case['case']}_{kind}.nii.gz")
        nib.save(nib.Nifti1Image(np.rot90(np.asanyarray(source.dataobj), axes=(1, 2)), source.affine), turned[kind])
    return case | turned


def _dice(prediction: MetaTensor, case: Case, values: Sequence[int]) -> list[float]:
    masks = (prediction.as_tensor(), load_volume(case["label"]).as_tensor())
    prediction, truth = (torch.stack([mask[0] == value for value in values])[None] for mask in masks)
    return compute_dice(prediction, truth)[0].tolist()


if __name__ == "__main__":
    main(context_selection)
