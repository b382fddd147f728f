"""What a run was made from and with, in ``manifest.json`` beside its results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from scripts.runtime.output_folder import file_sha256, write_text

MANIFEST = "manifest.json"
ROOT = Path(__file__).resolve().parents[2]
_WEIGHTS = ("checkpoint", "init_checkpoint")
_UNKNOWN = "unknown"


def write_manifest(
    folder: str | Path,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    listing: Iterable[tuple[str, Any]],
    before: Mapping[str, Any] | None = None,
) -> None:
    """Write a run's ``manifest.json``.

    Args:
        folder: the run's folder.
        config: the configuration as run.
        options: its options' values, expressions worked out.
        listing: name of every case that the run is made from, and a digest of it, in any order.
        before: manifest of the run that this one resumes; it goes into ``earlier``, behind its own.

    Raises:
        OSError: the folder cannot be written.
    """
    earlier = []
    if before is not None:
        own = {name: part for name, part in before.items() if name != "earlier"}
        earlier = [*before.get("earlier", []), own]
    weights = next((options[name] for name in _WEIGHTS if options.get(name)), None)
    present = weights is not None and Path(weights).is_file()
    lines = sorted(f"{name}\t{digest}\n" for name, digest in listing)
    manifest = {
        "bundle": bundle_identity(),
        "environment": environment(str(options.get("device", "cpu"))),
        "seed": options.get("seed"),
        "weights": {"file": str(weights), "sha256": file_sha256(weights)} if present else None,
        "data": {"cases": len(lines), "listing_sha256": hashlib.sha256(os.fsencode("".join(lines))).hexdigest()},
        "options": dict(options),
        "config": dict(config),
        "earlier": earlier,
    }
    write_text(json.dumps(manifest, indent=1, default=str) + "\n", Path(folder) / MANIFEST)


def bundle_identity() -> dict[str, str]:
    """Name, version and revision of the bundle."""
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))
    return {"name": metadata["name"], "version": metadata["version"], "revision": revision()}


def environment(device: str) -> dict[str, Any]:
    """What computes on a device: packages, processor or GPU with driver, number of threads."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": dict(sorted((p.metadata["Name"].lower(), p.version) for p in distributions())),
        "device": device,
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }
    if device.startswith("cuda"):
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def revision() -> str:
    """Git revision of the bundle: as the image's build noted it, else the checkout's; "-dirty" with local changes."""
    noted = ROOT / "REVISION"
    if noted.is_file():
        return noted.read_text(encoding="utf-8").strip() or _UNKNOWN
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return _UNKNOWN
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    return _output(command) or _UNKNOWN


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return _UNKNOWN
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.partition("\n")[0] or _UNKNOWN


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
