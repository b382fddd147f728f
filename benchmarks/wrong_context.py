"""Whether the self-test names the context whose label is wrong.

    python -m benchmarks.wrong_context --dataset_dir DATA/Dataset004_Hippocampus --checkpoint WEIGHTS.pt \
        --split_file RUN/stage2/splits.json

In every context in turn the label map is put some voxels off, and the contexts are tested on each other. What is
counted is how often that context is named as the worst, and how often as out of line; and how often a context is
called out of line when all are right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from scripts.checkpoint import load_network
from scripts.data.volumes import load_volume
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.context_source import ContextSource
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main


def wrong_context(
    dataset_dir: str,
    checkpoint: str,
    split_file: str | None = None,
    context_size: int = 8,
    offsets: Sequence[int] = (2, 4, 8),
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Spoil one context after the other.

    Args:
        dataset_dir: nnU-Net dataset with labels.
        checkpoint: weights.
        split_file: of the training run; contexts come from its training part.
        context_size: number of contexts.
        offsets: how far the label is put off along the second axis, in the scans' voxels.
        seed: of the choice of contexts.
        device: where to compute.
    """
    network = load_network(checkpoint)
    chosen = ContextSource(dataset_dir, network, context_size, split_file=split_file, seed=seed)().names
    images = [load_volume(Path(dataset_dir) / "imagesTr" / f"{name}_0000.nii.gz") for name in chosen]
    labels = [load_volume(Path(dataset_dir) / "labelsTr" / f"{name}.nii.gz") for name in chosen]
    inferer = ICLInferer(network, device, mini_context_size=context_size)
    inferer.set_context(images, labels)
    confident = ConfidentInferer(inferer, self_test=True, progress=False)
    print(json.dumps({"offset_voxels": 0, "out_of_line": len(confident.prepare()["out_of_line"])}))
    for offset in offsets:
        found = {"worst": 0, "out_of_line": 0}
        for number in tqdm(range(len(labels)), f"{offset} voxels"):
            spoilt = labels[number].roll(offset, dims=2)
            inferer.set_context(images, [*labels[:number], spoilt, *labels[number + 1 :]])
            test, name = confident.prepare(), inferer.context.names[number]
            found["worst"] += test["worst"] == name
            found["out_of_line"] += name in test["out_of_line"]
        print(json.dumps({"offset_voxels": offset, "contexts": len(labels), **found, "device": device}))


if __name__ == "__main__":
    main(wrong_context)
