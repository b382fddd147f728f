"""Several labels of several targets: the predictor against the baseline run anew for each label and target.

    python -m benchmarks.many_labels [--labels 8 --targets 4 --context_size 4 --spatial_size 64]

Both start from the same volumes in memory and end with the scores of every target; ours goes through
:class:`scripts.inferer.ICLInferer`, which keeps between labels and targets what does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from monai.data import MetaTensor

from benchmarks.networks import FULL, TINY, make_network, probe
from benchmarks.paired import BASELINE, Conditions, Side, benchmark, compare, timed
from benchmarks.passes import tolerance
from scripts.data.preprocessing import Preprocessing
from scripts.inferer import ICLInferer

SPACING_MM = 1.0


@benchmark
def many_labels(
    conditions: Conditions,
    labels: int = 8,
    targets: int = 4,
    context_size: int = 4,
    spatial_size: int = 64,
    mini_context_size: int = 3,
    channels: Sequence[int] = FULL,
) -> Iterator[dict[str, Any]]:
    """Compare the time for all labels of all targets.

    Args:
        conditions: of the measurement.
        labels: number of labels.
        targets: number of targets.
        context_size: number of pairs.
        spatial_size: voxels per axis.
        mini_context_size: pairs that run at once.
        channels: network widths.
    """
    if conditions.quick:
        labels, targets, context_size, spatial_size, channels = 2, 2, 2, 16, TINY
    arguments = {
        "labels": labels,
        "targets": targets,
        "context_size": context_size,
        "spatial_size": spatial_size,
        "mini_context_size": mini_context_size,
        "channels": channels,
        "device": conditions.device,
    }
    sides = {
        BASELINE: {"kind": BASELINE},
        "ours": {"kind": "ours"},
        "ours, bfloat16": {"kind": "ours", "precision": "bfloat16"},
    }
    sides = {name: Side("many_labels:all_answers", own | arguments) for name, own in sides.items()}
    case = f"{labels} labels x {targets} targets x {context_size} contexts, {spatial_size}^3"
    yield {"case": case} | compare(sides, conditions, pairs=1)


def all_answers(
    kind: str,
    labels: int,
    targets: int,
    context_size: int,
    spatial_size: int,
    mini_context_size: int,
    channels: Sequence[int],
    device: str,
    precision: str = "float32",
) -> dict[str, Any]:
    """Scores of all targets for all labels; noise, for the work does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    grid = (1, *(spatial_size,) * 3)
    scans = [MetaTensor(torch.rand(grid, generator=generator)) for _ in range(targets)]
    images = [MetaTensor(torch.rand(grid, generator=generator)) for _ in range(context_size)]
    maps = [MetaTensor(torch.randint(labels + 1, grid, generator=generator).float()) for _ in range(context_size)]
    network = make_network(kind, channels, spatial_size, device).eval()
    run = _loop if kind == BASELINE else partial(_predictor, precision == "bfloat16")
    seconds, scores = timed(
        lambda: run(network, scans, images, maps, labels, mini_context_size, device), device, warm_ups=0
    )
    found = {"seconds": seconds, "check": [value for score in scores for value in probe(score)]}
    return found | tolerance(precision)


@torch.no_grad()
def _loop(
    network: torch.nn.Module,
    scans: Sequence[MetaTensor],
    images: Sequence[MetaTensor],
    maps: Sequence[MetaTensor],
    labels: int,
    mini_context_size: int,
    device: str,
) -> list[torch.Tensor]:
    preprocessing = Preprocessing(images[0].shape[1:], SPACING_MM)
    pairs = [preprocessing.pair(image, numbers) for image, numbers in zip(images, maps, strict=True)]
    context_in, numbers = (torch.stack(side)[None] for side in zip(*pairs, strict=True))
    scores = []
    for scan in scans:
        target = preprocessing.image(scan)[None].to(device)
        predictions = [
            network(target, context_in, (numbers == value).float(), mini_context_size) for value in range(1, labels + 1)
        ]
        scores.append(torch.cat(predictions, dim=1))
    return scores


def _predictor(
    amp: bool,
    network: torch.nn.Module,
    scans: Sequence[MetaTensor],
    images: Sequence[MetaTensor],
    maps: Sequence[MetaTensor],
    labels: int,
    mini_context_size: int,
    device: str,
) -> list[torch.Tensor]:
    options = {"mini_context_size": mini_context_size, "spacing": SPACING_MM, "amp": amp, "align": "off"}
    predictor = ICLInferer(network, device, **options)
    predictor.set_context(images, maps)
    return [predictor(predictor.target(scan).image[None], predictor.network) for scan in scans]


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(many_labels)
