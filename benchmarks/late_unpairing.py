"""Effect of late unpairing: the same training with and without it, scored on cases kept aside.

    python -m benchmarks.late_unpairing --dataset_dir DATA --output_dir OUT \
        [--fractions "[0.0,0.2,0.5]" --options="--channels [16,32,64,128] --spatial_size 32 --learning_rate 1e-3 ..."]

"When to Unpair" (arXiv 2610.10335) presents the context labels unpaired from their images in the last part of the
training. Every fraction is a stage-1 run of its own with the same seed, and so with the same split and groups; then
the test cases are segmented from training contexts and scored. Runs that are complete are not made again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from scripts.demo import run_bundle
from scripts.runtime.atomic_files import write_text
from scripts.runtime.commandline import main


def late_unpairing(
    dataset_dir: str,
    output_dir: str,
    fractions: Sequence[float] = (0.0, 0.2, 0.5),
    epochs: int = 10,
    context_size: int = 8,
    options: str = "--num_workers 0",
) -> None:
    """Train, segment and score once for each fraction, and print a table.

    Args:
        dataset_dir: one nnU-Net dataset folder.
        output_dir: where the runs go, a folder for each fraction.
        fractions: last fractions of the training that are unpaired; 0 is the plain training.
        epochs: epochs of each training; only the last one is validated, so that the weights are those of the end.
        context_size: contexts in inference.
        options: further options of the training, as on its command line.
    """
    data, scores = shlex.quote(dataset_dir), {}
    for fraction in fractions:
        folder = Path(output_dir) / f"unpaired_{fraction:g}"
        out, summary, made_with = shlex.quote(str(folder)), folder / "scores" / "summary.json", folder / "settings.json"
        settings = json.dumps([dataset_dir, epochs, context_size, options])
        if not summary.is_file() or not made_with.is_file() or made_with.read_text(encoding="utf-8") != settings:
            made_with.unlink(missing_ok=True)
            run_bundle(
                "train_stage1",
                f"--dataset_dir {data} --output_dir {out} --test_fraction 0.2 --unpair_fraction {fraction} "
                f"--epochs {epochs} --val_interval {epochs} --overwrite true {options}",
            )
            run_bundle(
                "inference",
                f"--dataset_dir {data} --context_dir {data} --split_file {out}/stage1/splits.json --overlays false "
                f"--checkpoint {out}/stage1/model.pt --context_size {context_size} --output_dir {out}/predictions "
                "--overwrite true",
            )
            run_bundle(
                "evaluate",
                f"--prediction_dir {out}/predictions --reference_dir {data}/labelsTr --output_dir {out}/scores "
                "--overwrite true",
            )
            write_text(settings, made_with)
        scores[fraction] = json.loads(summary.read_text(encoding="utf-8"))["mean"]["dice"]
    print("\nunpaired  mean Dice  95 % interval")
    for fraction, dice in scores.items():
        low, high = dice["interval_95"] or (float("nan"),) * 2
        print(f"{fraction:8.2f}  {dice['mean']:9.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main(late_unpairing)
