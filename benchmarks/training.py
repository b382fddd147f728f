"""Training: a step's speed and memory, what minutes of fine-tuning give, and late unpairing of the contexts."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.hippocampus import SHIPPED, SPLIT_FILE, Hippocampus, interval, weights
from benchmarks.measure import Row, Run, Side, compare, rows, timed, work
from benchmarks.network import (
    FULL,
    KINDS,
    NARROW,
    SHIPPED_GRID,
    TINY,
    Grid,
    in_precision,
    make_episode,
    make_network,
    named,
    tolerance,
)
from scripts.losses import SmoothL3L1Loss
from scripts.runtime import termination
from scripts.runtime.commandline import main

_FINE_TUNING = "--augment false --num_workers 0 --groups_per_epoch 20 --val_interval 1000 --context_size [2,6]"


@work
def step(
    run: Run,
    grids: Sequence[Grid] = (64, 48, SHIPPED_GRID),
    widths: Sequence[Sequence[int]] = (FULL, NARROW, NARROW),
    context_size: int = 3,
    mini_context_size: int = 3,
    pairs: int = 3,
) -> Iterator[Row]:
    """Forward, backward and a step of Adam, in float32, in bfloat16, and with activation checkpointing.

    Args:
        run: how it is run.
        grids: voxels, one number or three for each case.
        widths: network widths, one list for each case.
        context_size: number of context pairs.
        mini_context_size: context pairs that run at once.
        pairs: how often all sides are measured.
    """
    if run.quick:
        grids, widths = (8,), (TINY,)
    kinds = KINDS | {"ours, checkpointing": {"kind": "ours", "activation_checkpointing": True}}
    for grid, channels in zip(grids, widths, strict=True):
        given = {
            "channels": channels,
            "spatial_size": grid,
            "context_size": context_size,
            "mini_context_size": mini_context_size,
            "device": run.device,
        }
        sides = {name: Side("training:training_step", given | own) for name, own in kinds.items()}
        yield from rows(named(grid, context_size, channels), compare(sides, run, pairs))


@work
def fine_tuning(
    run: Run,
    cases: Hippocampus,
    output_dir: str,
    checkpoint: str = SHIPPED,
    minutes: Sequence[float] = (2, 5, 10),
    context_size: int = 8,
    learning_rate: float = 2e-4,
    scratch_learning_rate: float = 1e-3,
    align: str = "deformable",
    options: str = _FINE_TUNING,
) -> Iterator[Row]:
    """Dice against minutes of fine-tuning on the pool's 60 cases, from given weights and from scratch.

    Both train with ``configs/train_stage2.json``. At every mark the run gets SIGTERM, which it answers with a
    checkpoint; that is scored, and the run is resumed. The minutes are those of the training commands, start included.

    Args:
        run: how it is run.
        cases: targets to score.
        output_dir: a new folder for the runs.
        checkpoint: weights to start from; the other run has its widths and grid.
        minutes: marks, ascending.
        context_size: contexts K in scoring.
        learning_rate: of the run from weights.
        scratch_learning_rate: of the run from scratch.
        align: how contexts are brought to a target in scoring.
        options: further options of both, as on a command line.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: a training failed, or ended before its time.
    """
    from benchmarks.product import case_scores
    from scripts.checkpoint import load_network

    if Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: give another --output_dir")
    if run.quick:
        minutes = (0.5,)
    network = load_network(checkpoint)
    layout = f"--channels '{list(network.channels)}' --spatial_size '{network.grid.tolist()}'"
    starts = {
        "from the weights": f"--init_checkpoint {_quoted(checkpoint)} --learning_rate {learning_rate}",
        "from scratch": f"--init_checkpoint none {layout} --learning_rate {scratch_learning_rate}",
    }

    def scored(side: str, passed: float, path: str | Path) -> Row:
        found = case_scores(load_network(path), cases, (context_size,), "aligned", run.device, align)[context_size]
        data = f"{cases.described}, K={context_size}{weights(checkpoint)}"
        return Row(f"{passed:.0f} min", {"dice": interval(found[:, 0])}, data, side)

    yield scored("from the weights", 0, checkpoint)
    for name, start in starts.items():
        folder = Path(output_dir) / name.replace(" ", "_")
        passed = 0.0
        for mark in minutes:
            passed += _train(
                f"{start} --dataset_dir {_quoted(cases.dataset_dir)} --output_dir {_quoted(folder)} "
                f"--device {run.device} --split_file {SPLIT_FILE} --epochs 100000 --resume {passed > 0} {options}",
                60 * (mark - passed),
            )
            yield scored(name, passed, folder / "stage2" / "last.pt")


@work
def unpairing(
    run: Run,
    dataset_dir: str,
    output_dir: str,
    fractions: Sequence[float] = (0.0, 0.2, 0.5),
    epochs: int = 10,
    context_size: int = 8,
    options: str = "--num_workers 0",
) -> Iterator[Row]:
    """The same training with and without late unpairing, scored on cases kept aside.

    "When to Unpair" (arXiv 2610.10335) presents the context labels unpaired from their images in the last part of the
    training. Every fraction is a stage-1 run of its own with the same seed, and so with the same split and groups.

    Args:
        run: how it is run.
        dataset_dir: one nnU-Net dataset folder.
        output_dir: where the runs go, a folder for each fraction; what is there is replaced.
        fractions: last fractions of the training that are unpaired; 0 is the plain training.
        epochs: of each training; only the last one is validated, so that the weights are those of the end.
        context_size: contexts in inference.
        options: further options of the training, as on its command line.
    """
    from scripts.demo import run_bundle

    if run.quick:
        fractions, epochs, options = (0.5,), 1, f"{options} --spatial_size 16 --channels [4,8] --groups_per_epoch 2"
    data = _quoted(dataset_dir)
    for fraction in fractions:
        folder = Path(output_dir) / f"unpaired_{fraction:g}"
        out, common = _quoted(folder), f"--overwrite true --device {run.device}"
        run_bundle(
            "train_stage1",
            f"--dataset_dir {data} --output_dir {out} --test_fraction 0.2 --unpair_fraction {fraction} "
            f"--epochs {epochs} --val_interval {epochs} {common} {options}",
        )
        run_bundle(
            "inference",
            f"--dataset_dir {data} --context_dir {data} --split_file {out}/stage1/splits.json --overlays false "
            f"--checkpoint {out}/stage1/model.pt --context_size {context_size} --output_dir {out}/predictions {common}",
        )
        run_bundle(
            "evaluate",
            f"--prediction_dir {out}/predictions --reference_dir {data}/labelsTr --output_dir {out}/scores "
            "--overwrite true",
        )
        found = json.loads((folder / "scores" / "summary.json").read_text(encoding="utf-8"))["mean"]["dice"]
        dice = [found["mean"], *(found["interval_95"] or [found["mean"]] * 2)]
        yield Row(f"last {fraction:.0%} of the training unpaired", {"dice": dice}, Path(dataset_dir).name)


def training_step(
    kind: str,
    channels: Sequence[int],
    spatial_size: Grid,
    context_size: int,
    mini_context_size: int,
    device: str,
    precision: str = "float32",
    **options: bool,
) -> dict[str, Any]:
    """Forward pass, backward pass and a step of Adam on one random episode, after one that is not timed.

    Args:
        kind: as :func:`benchmarks.network.make_network`.
        channels: width of each stage.
        spatial_size: voxels, along each axis if it is one number.
        context_size: number of context pairs.
        mini_context_size: context pairs that run at once.
        device: where it runs.
        precision: as :func:`benchmarks.network.in_precision`.
        options: of our network, such as ``activation_checkpointing``.
    """
    autocast = in_precision(precision, device)
    network = make_network(kind, channels, spatial_size, device, **options).train()
    episode = make_episode(spatial_size, context_size, device)
    loss_function, optimizer = SmoothL3L1Loss(), torch.optim.Adam(network.parameters(), 1e-5)
    wanted = (episode[0] > 0.5).float()

    def one() -> torch.Tensor:
        optimizer.zero_grad()
        with autocast:
            predicted = network(*episode, mini_context_size).float()
        loss = loss_function(predicted, wanted)
        loss.backward()
        optimizer.step()
        return loss

    seconds, loss = timed(one, device)
    # after one step: gradients have had their say
    return {"seconds": seconds, "check": [loss.item()]} | tolerance(precision)


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
    if status != termination.STATUS:
        raise ValueError(f"the training ended with status {status} instead of being stopped")
    return (time.monotonic() - started) / 60


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


WORKS = {"step": step, "fine_tuning": fine_tuning, "unpairing": unpairing}

if __name__ == "__main__":
    main(WORKS)
