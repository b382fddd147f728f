"""The applications, through their own doors: MONAI Label's server."""

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
from typing import TYPE_CHECKING

from benchmarks.hippocampus import SHIPPED, SPLIT_FILE, interval, mean_dice, weights
from benchmarks.measure import Row, Run, work
from scripts.data.volumes import load_volume
from scripts.runtime.commandline import main

if TYPE_CHECKING:
    import httpx

BUNDLE = Path(__file__).resolve().parents[1]
MODEL = "neuroverse3d"
START_SECONDS = 300


@work
def label(
    run: Run,
    dataset_dir: str,
    checkpoint: str = SHIPPED,
    split_file: str | None = None,
    part: str = "val",
    context_sizes: Sequence[int] = (1, 2, 4, 8),
    cases: int = 12,
) -> Iterator[Row]:
    """Dice against the number of annotations in MONAI Label, and seconds that a proposal takes, over HTTP.

    Runs in the environment of docs/monailabel.md. A server starts on a free port of this machine with a copy of the
    scans. The first proposal after annotations were saved reads and encodes them; further scans have the median.

    Args:
        run: how it is run.
        dataset_dir: nnU-Net dataset folder.
        checkpoint: weights.
        split_file: annotated scans are the first of its training part, in the order of the file; None takes
            ``benchmarks/hippocampus_split.json``.
        part: of the split, whose first cases are the targets.
        context_sizes: numbers of finished annotations, rising.
        cases: targets.
    """
    context_sizes, cases = ((1,), 2) if run.quick else (sorted(context_sizes), cases)
    folder = Path(dataset_dir)
    split = json.loads(Path(split_file or SPLIT_FILE).read_text(encoding="utf-8"))
    examples, targets = (split[name][folder.name] for name in ("train", part))
    examples, targets = examples[: max(context_sizes)], targets[:cases]
    data = f"{folder.name}, {len(targets)} cases{weights(checkpoint)}"
    with (
        tempfile.TemporaryDirectory() as place,
        _server(Path(place), folder, [*examples, *targets], checkpoint, run.device) as (client, seconds),
    ):
        yield Row("until the server is up", {"seconds": seconds}, data)
        saved = 0
        for count in context_sizes:
            for case in examples[saved:count]:
                file = _label(folder, case)
                files = {"label": (file.name, file.read_bytes())}
                client.put("/datastore/label", params={"image": case}, files=files).raise_for_status()
            saved = count
            dice, (cold, *warm) = zip(*(_proposal(client, folder, case, Path(place)) for case in targets), strict=True)
            figures = {"dice": interval(dice), "cold_seconds": cold, "warm_seconds": statistics.median(warm)}
            yield Row(f"{count} annotations", figures, data)


def _proposal(client: httpx.Client, folder: Path, case: str, place: Path) -> tuple[float, float]:
    """Mean Dice of a scan's proposal, and the seconds that it took."""
    started = time.perf_counter()
    response = client.post(f"/infer/{MODEL}", params={"image": case, "output": "image"}, data={"params": "{}"})
    response.raise_for_status()
    seconds = time.perf_counter() - started
    prediction = place / "prediction.nii.gz"
    prediction.write_bytes(response.content)
    return mean_dice(load_volume(prediction), load_volume(_label(folder, case))), seconds


@contextmanager
def _server(
    place: Path, folder: Path, cases: Sequence[str], checkpoint: str, device: str
) -> Iterator[tuple[httpx.Client, float]]:
    """A client of a server that has copies of these scans, and seconds until it is up; both end with the context."""
    import httpx  # in that environment alone

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
            yield client, time.monotonic() - started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _answers(client: httpx.Client) -> bool:
    import httpx

    try:
        return client.get("/info/").status_code == 200
    except httpx.TransportError:
        return False


def _label(folder: Path, case: str) -> Path:
    return folder / "labelsTr" / f"{case}.nii.gz"


WORKS = {"label": label}

if __name__ == "__main__":
    main(WORKS)
