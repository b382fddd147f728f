"""An Orthanc of the tests' own: a PACS with DICOMweb that only this machine can use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from tests.apps.ports import free_port

PLUGIN = "libOrthancDicomWeb.so"
FOLDERS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
ALONE = "127.0.0.1"


def plugin():
    """Path of the DICOMweb plugin; None if it is not installed."""
    found = (Path(folder, PLUGIN) for folder in FOLDERS)
    return next((path for path in found if path.is_file()), None)


class Orthanc:
    """Started at once; :meth:`stop` ends it."""

    AET = "ORTHANC"

    def __init__(self, folder):
        self.port, self.dicom_port = free_port(), free_port()
        self.log = Path(folder) / "orthanc.log"
        settings = {
            "Name": "tests",
            "StorageDirectory": str(Path(folder) / "db"),
            "IndexDirectory": str(Path(folder) / "db"),
            "Plugins": [str(plugin())],
            "HttpPort": self.port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": self.AET,
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": True,
            "DicomCheckModalityHost": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomModalities": {"scanner": ["SCANNER", ALONE, 104]},
            "OverwriteInstances": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        path = Path(folder) / "orthanc.json"
        path.write_text(json.dumps(settings))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [shutil.which("Orthanc"), str(path)], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait()

    @property
    def dicomweb(self):
        """Where MONAI Label finds it."""
        return f"http://{ALONE}:{self.port}/dicom-web"

    def _wait(self, seconds=60):
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            try:
                self.ask("GET", "/system")
                return
            except URLError:
                time.sleep(0.1)

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)

    def ask(self, method, path, content=None):
        """The answer of the REST interface, as bytes; an error of urllib if it refuses."""
        with urlopen(Request(f"http://{ALONE}:{self.port}{path}", content, method=method), timeout=60) as answer:
            return answer.read()

    def send(self, *files):
        """Add instances from files."""
        for file in files:
            self.ask("POST", "/instances", Path(file).read_bytes())

    def find(self, level, **query):
        """Orthanc's ids of what matches, such as ``find("Series", Modality="SEG")``."""
        return json.loads(self.ask("POST", "/tools/find", json.dumps({"Level": level, "Query": query}).encode()))

    def files(self, **query):
        """Instances that match, as bytes."""
        return [self.ask("GET", f"/instances/{one}/file") for one in self.find("Instance", **query)]

    def remove(self, level, **query):
        for one in self.find(level, **query):
            self.ask("DELETE", f"/{'series' if level == 'Series' else 'instances'}/{one}")
