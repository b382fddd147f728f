"""Minutes of training: tuning on the contexts themselves, a plain U-Net on the same, fine-tuning on sixty cases."""

from __future__ import annotations

import copy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Compose, RandAdjustContrastd, RandAffined, RandGaussianNoised
from monai.utils import set_determinism
from torch import Tensor
from tqdm import tqdm

from benchmarks.hippocampus import SHIPPED, SPLIT_FILE, Hippocampus, Pair, interval, mean_dice, weights
from benchmarks.measure import Row, Run, work
from benchmarks.product import case_scores
from scripts.checkpoint import load_network
from scripts.data.preprocessing import PlacedScores, Preprocessing
from scripts.inference.views import EVEN_SHARE
from scripts.inferer import ICLInferer
from scripts.runtime import termination
from scripts.runtime.commandline import main

_CHANNELS = (16, 32, 64, 128)
_BATCH = 2
_START = "as it came"
_FINE_TUNING = "--augment false --num_workers 0 --groups_per_epoch 20 --val_interval 1000 --context_size [2,6]"


@work
def minutes(
    run: Run,
    cases: Hippocampus,
    checkpoint: str = SHIPPED,
    context_sizes: Sequence[int] = (8, 4, 2, 1),
    minutes: Sequence[float] = (0.5, 1, 2),
    context_sets: int = 1,
    tune: bool = True,
    unet: bool = True,
    learning_rate: float = 1e-3,
    align: str = "deformable",
    amp: str = "auto",
    options: dict[str, Any] | None = None,
) -> Iterator[Row]:
    """Dice and gain after minutes of tuning, through ICLInferer.tune, and of a plain 3D U-Net from scratch.

    One choice of contexts for all targets, as a user has it; intervals are over targets and choices. Every training
    starts anew. A tuning's minutes include alignment and decision. MONAI's U-Net is trained on the contexts alone, on
    the grid and the voxels of the network, with MONAI's Dice and cross-entropy loss and random affine, contrast and
    noise transforms. Dice is on the scans' own voxels.

    Args:
        run: how it is run.
        cases: targets.
        checkpoint: weights to start from.
        context_sizes: numbers of contexts K.
        minutes: of each tuning, and of each U-Net's training.
        context_sets: choices of contexts.
        tune: tune.
        unet: train the U-Net.
        learning_rate: of the U-Net.
        align: how contexts are brought to a target: off, affine or deformable.
        amp: predict in bfloat16: true, false, or auto, where the processor is made for it.
        options: of ``configs/tune.json``.
    """
    if run.quick:
        context_sizes, minutes = (2,), (0.05,)
    settings = run, cases, checkpoint, minutes, tune, unet, learning_rate, align, amp, options or {}
    for size in context_sizes:
        choices = [_choice(number, size, *settings) for number in range(context_sets)]
        before = np.concatenate([found[_START]["dice"] for found in choices])
        data = f"{cases.described}, {context_sets} choice{'s' * (context_sets > 1)} of contexts{weights(checkpoint)}"
        for name in choices[0]:
            dice = np.concatenate([found[name].pop("dice") for found in choices])
            figures = {"dice": interval(dice)} | ({} if name == _START else {"gain": interval(dice - before)})
            figures |= {key: float(np.mean([found[name][key] for found in choices])) for key in choices[0][name]}
            yield Row(f"K={size}, --align {align}", figures, data, name)


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
    if Path(output_dir).is_dir() and any(Path(output_dir).iterdir()):
        raise FileExistsError(f"{output_dir} is not empty: give another --output_dir")
    if run.quick:
        minutes = (0.5,)
    network = load_network(checkpoint)
    layout = f"--channels '{list(network.channels)}' --spatial_size '{network.grid.tolist()}'"
    starts = {
        "from the weights": f"--init_checkpoint {shlex.quote(checkpoint)} --learning_rate {learning_rate}",
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
                f"{start} --dataset_dir {shlex.quote(cases.dataset_dir)} --output_dir {shlex.quote(str(folder))} "
                f"--device {run.device} --split_file {SPLIT_FILE} --epochs 100000 --resume {passed > 0} {options}",
                60 * (mark - passed),
            )
            yield scored(name, passed, folder / "stage2" / "last.pt")


def _choice(
    number: int,
    size: int,
    run: Run,
    cases: Hippocampus,
    checkpoint: str,
    minutes: Sequence[float],
    tune: bool,
    unet: bool,
    learning_rate: float,
    align: str,
    amp: str,
    options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Figures by name for one choice of contexts, ``dice`` of every target among them."""
    set_determinism(cases.seed)
    episodes = list(cases.episodes())
    contexts, scans = episodes[number % len(episodes)][1][:size], [scan for scan, _ in episodes]
    started = time.monotonic()
    network = load_network(checkpoint)
    spacing = cases.spacing(network.grid.tolist())
    inferer = ICLInferer(network, run.device, spacing=spacing, align=align, amp=amp)
    inferer.set_context(*zip(*contexts, strict=True))
    values, preprocessing = inferer.label_values, inferer.context.preprocessing
    start, target = copy.deepcopy(inferer.network.state_dict()), cache(inferer.target)
    found = {_START: _score(lambda scan: inferer.complete(target(scan)).prediction, scans, values, started)}
    for mark in minutes if tune else ():
        inferer.network.load_state_dict(start)
        inferer.tuned, inferer.share = None, EVEN_SHARE
        started, used = time.monotonic(), time.process_time()
        inferer.tune(mark, seed=cases.seed, **options)
        passed = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
        scored = _score(lambda scan: inferer.complete(target(scan)).prediction, scans, values, started)
        found[f"tuned, {mark:g} min"] = scored | passed
    for mark in minutes if unet else ():
        started, used = time.monotonic(), time.process_time()
        trained = train_unet(*on_grid(inferer), len(values), 60 * mark, learning_rate, run.device)
        passed = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - used}
        predict = partial(unet_prediction, trained, preprocessing, values, run.device)
        found[f"U-Net, {mark:g} min"] = _score(predict, scans, values, started) | passed
    return found


def _score(
    predict: Callable[[MetaTensor], MetaTensor], scans: Sequence[Pair], values: Sequence[int], started: float
) -> dict[str, Any]:
    """Dice of every scan, and seconds until the first of them has its mask."""
    dice, first = [], 0.0
    for scan, wanted in tqdm(scans, "predict"):
        prediction = predict(scan)
        first = first or time.monotonic() - started
        dice.append(mean_dice(prediction, wanted, values))
    return {"dice": dice, "first_mask_seconds": first}


def on_grid(inferer: ICLInferer) -> tuple[Tensor, Tensor]:
    """Contexts as :func:`train_unet` takes them: images, and classes numbered in the order of the labels."""
    images, labels = inferer.context.pairs()
    return images, sum(number * (labels == value) for number, value in enumerate(inferer.label_values, start=1))


def unet_prediction(
    unet: torch.nn.Module, preprocessing: Preprocessing, values: Sequence[int], device: str, scan: MetaTensor
) -> MetaTensor:
    """Label numbers (1, H, W, D) on a scan's own voxels, from a network of :func:`train_unet`."""
    target = preprocessing.target(scan)
    with torch.inference_mode():
        scores = unet(target[None].as_tensor().to(device)).softmax(1)[0, 1:].cpu()
    placed = {value: PlacedScores(score, target) for value, score in zip(values, scores, strict=True)}
    return preprocessing.to_native_labels(placed)


def train_unet(
    images: Tensor, classes: Tensor, labels: int, seconds: float, learning_rate: float, device: str
) -> torch.nn.Module:
    """MONAI's U-Net trained on some pairs for some time.

    Args:
        images: (K, 1, H, W, D) in [0, 1].
        classes: the same shape; 0 is background, and 1 and on the labels.
        labels: how many labels.
        seconds: of training.
        learning_rate: of Adam.
        device: where to compute.

    Returns:
        The network, in evaluation mode: (B, 1, H, W, D) -> (B, 1 + labels, H, W, D) logits.
    """
    unet = UNet(3, 1, 1 + labels, _CHANNELS, (2,) * (len(_CHANNELS) - 1), num_res_units=2).to(device)
    optimizer = torch.optim.Adam(unet.parameters(), learning_rate)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    started = time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc="train U-Net") as bar:
        for image, label in _batches(images, classes):
            passed = time.monotonic() - started
            bar.update(min(round(passed), bar.total) - bar.n)
            if passed >= seconds:
                return unet.eval()
            optimizer.zero_grad()
            loss(unet(image.to(device)), label.to(device)).backward()
            optimizer.step()
    raise AssertionError("there is always another batch")


def _batches(images: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Random pairs without end, changed at random."""
    change = Compose(
        [
            RandAffined(
                ("image", "label"),
                prob=0.8,
                rotate_range=(0.35,) * 3,
                scale_range=(0.15,) * 3,
                translate_range=[n / 10 for n in images.shape[2:]],
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.4)),
            RandGaussianNoised("image", prob=0.3, std=0.05),
        ]
    )
    while True:
        chosen = torch.randint(len(images), (_BATCH,)).tolist()
        made = [change({"image": images[i], "label": classes[i].float()}) for i in chosen]
        yield tuple(torch.stack([pair[key].as_tensor() for pair in made]) for key in ("image", "label"))


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


WORKS = {"minutes": minutes, "fine_tuning": fine_tuning}

if __name__ == "__main__":
    main(WORKS)
