"""A MONAI Label server as a process of its own, and a client of its REST interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np

from tests.apps.ports import free_port

SHIM = Path(__file__).parent / "shim"
MODEL = "neuroverse3d"
NAMES = {1: "first", 2: "second"}


class Server:
    """Started at once; :meth:`stop` ends it and whatever it has started."""

    def __init__(self, app, studies, folder, **conf):
        self.studies, self.port, self.log = Path(studies), free_port(), Path(folder) / "server.log"
        settings = [part for name, value in conf.items() for part in ("--conf", name, str(value))]
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--host", "127.0.0.1",
                   "--studies", str(studies), "--port", str(self.port), *settings]  # fmt: skip
        environment = os.environ | {
            "PYTHONPATH": str(SHIM),
            "CUDA_VISIBLE_DEVICES": "",
            "MONAI_LABEL_SESSION_PATH": str(Path(folder) / "sessions"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        # a connection for each request: after a bare 500 the server closes the one that it came by
        fresh = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=240, limits=fresh)

    def wait(self, seconds=180):
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                self.client.get("/info/")
                return self
            except httpx.TransportError:
                time.sleep(0.3)
        raise TimeoutError(self.log.read_text())

    def stop(self):
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def infer(self, image, output="json", **params):
        return self.client.post(
            f"/infer/{MODEL}", params={"image": image, "output": output}, data={"params": json.dumps(params)}
        )

    def answer(self, image, folder, **params):
        """The proposal as a NIfTI image."""
        response = self.infer(image, "image", **params)
        assert response.status_code == 200, response.text
        path = Path(folder) / f"answer_{image}.nii.gz"
        path.write_bytes(response.content)
        found = nib.load(path)
        return nib.Nifti1Image(np.asarray(found.dataobj), found.affine, found.header)

    def save(self, image, label, tag="final", names=NAMES):
        """Save an annotation as Slicer does."""
        said = {"label_info": [{"name": name, "idx": number} for number, name in names.items()]}
        return self.client.put(
            "/datastore/label",
            params={"image": image, "tag": tag},
            data={"params": json.dumps(said)},
            files={"label": (Path(label).name, Path(label).read_bytes())},
        )

    def info(self):
        return self.client.get("/info/").json()

    def next_sample(self, strategy="least_confident", **params):
        return self.client.post(f"/activelearning/{strategy}", json=params)

    def train(self, run_sync=False, **params):
        return self.client.post(f"/train/{MODEL}", params={"run_sync": run_sync}, json=params)

    def training_begins(self, seconds=60):
        """Its process runs."""
        deadline = time.monotonic() + seconds
        while self.client.get("/train/", params={"check_if_running": True}).status_code != 200:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def training_ends(self, seconds=180):
        """The status that a training in the background ends with."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.client.get("/train/").json()
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                return status
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text())
