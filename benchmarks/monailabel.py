"""The MONAI Label app through its server: Dice against the number of annotations, and seconds that a proposal takes.

    python -m benchmarks.monailabel --checkpoint WEIGHTS.pt --dataset_dir DATA/Dataset004_Hippocampus \
        [--split_file RUN/stage2/splits.json --part test --context_sizes "[1,2,4,8]" --cases 12]

Runs in the environment of docs/monailabel.md. A server starts on a free port of this machine with a copy of the scans;
annotations are saved and proposals fetched by HTTP. *Cold* is the first proposal after annotations were saved: they
are read and encoded. *Warm* is the median of the proposals for further scans.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from monai.metrics import compute_dice
from torch import Tensor, stack

from scripts.data.volumes import load_volume
from scripts.runtime.atomic_files import write_json
from scripts.runtime.commandline import main

BUNDLE = Path(__file__).resolve().parents[1]
SPLIT_FILE = Path(__file__).with_name("hippocampus_split.json")
MODEL = "neuroverse3d"
START_SECONDS = 300


def monailabel(
    checkpoint: str,
    dataset_dir: str,
    split_file: str | None = None,
    part: str = "val",
    context_sizes: Sequence[int] = (1, 2, 4, 8),
    cases: int = 12,
    device: str = "cpu",
    output_file: str | None = None,
) -> None:
    """Print a row for each number of annotations.

    Args:
        checkpoint: weights.
        dataset_dir: nnU-Net dataset folder.
        split_file: annotated scans are the first of its training part, in the order of the file; None takes
            ``benchmarks/hippocampus_split.json``.
        part: of the split, whose first cases are the targets.
        context_sizes: numbers of finished annotations K, rising.
        cases: targets.
        device: where the server computes.
        output_file: JSON file for the rows.
    """
    folder = Path(dataset_dir)
    split = json.loads(Path(split_file or SPLIT_FILE).read_text(encoding="utf-8"))
    examples, targets = (split[name][folder.name] for name in ("train", part))
    examples, targets = examples[: max(context_sizes)], targets[:cases]
    with tempfile.TemporaryDirectory() as place, _server(Path(place), folder, [*examples, *targets], checkpoint,
                                                         device) as client:  # fmt: skip
        rows = list(_rows(client, folder, examples, targets, context_sizes, Path(place)))
    if output_file:
        write_json({"checkpoint": checkpoint, "device": device, "targets": len(targets), "rows": rows}, output_file)


def _rows(
    client: httpx.Client,
    folder: Path,
    examples: Sequence[str],
    targets: Sequence[str],
    context_sizes: Sequence[int],
    place: Path,
) -> Iterator[dict[str, float]]:
    saved = 0
    for count in sorted(context_sizes):
        for case in examples[saved:count]:
            file = _label(folder, case)
            files = {"label": (file.name, file.read_bytes())}
            client.put("/datastore/label", params={"image": case}, files=files).raise_for_status()
        saved = count
        dice, seconds = [], []
        for case in targets:
            started = time.perf_counter()
            response = client.post(f"/infer/{MODEL}", params={"image": case, "output": "image"}, data={"params": "{}"})
            response.raise_for_status()
            seconds.append(time.perf_counter() - started)
            prediction = place / "prediction.nii.gz"
            prediction.write_bytes(response.content)
            dice.append(_dice(load_volume(prediction), load_volume(_label(folder, case))))
        cold, warm = seconds[0], statistics.median(seconds[1:])
        row = {
            "annotations": count,
            "dice": round(float(np.nanmean(dice)), 4),
            "dice_of_labels": np.nanmean(dice, axis=0).round(4).tolist(),
            "cold_seconds": round(cold, 2),
            "warm_seconds": round(warm, 2),
            "cold_to_warm": round(cold / warm, 2),
        }
        print(json.dumps(row), flush=True)
        yield row


@contextmanager
def _server(place: Path, folder: Path, cases: Sequence[str], checkpoint: str, device: str) -> Iterator[httpx.Client]:
    """A client of a server that has copies of these scans; both end with the context."""
    app, studies = place / "app", place / "studies"
    app.mkdir()
    studies.mkdir()
    (app / "main.py").symlink_to(BUNDLE / "scripts" / "apps" / "monailabel" / "main.py")
    for case in cases:
        shutil.copy(folder / "imagesTr" / f"{case}_0000.nii.gz", studies / f"{case}.nii.gz")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies),
               "--host", "127.0.0.1", "--port", str(port), "--conf", "weights", str(Path(checkpoint).resolve()),
               "--conf", "device", device]  # fmt: skip
    log = place / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=place, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            started = time.monotonic()
            while not _answers(client):
                if process.poll() is not None or time.monotonic() - started > START_SECONDS:
                    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
                time.sleep(0.2)
            print(json.dumps({"seconds_to_start": round(time.monotonic() - started, 1)}), flush=True)
            yield client
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/info/").status_code == 200
    except httpx.TransportError:
        return False


def _label(folder: Path, case: str) -> Path:
    return folder / "labelsTr" / f"{case}.nii.gz"


def _dice(prediction: Tensor, truth: Tensor) -> list[float]:
    """Of each label of the reference."""
    values = [int(value) for value in truth.unique() if value > 0]
    masks = (stack([mask[0] == value for value in values])[None] for mask in (prediction, truth))
    return compute_dice(*masks)[0].tolist()


if __name__ == "__main__":
    main(monailabel)
