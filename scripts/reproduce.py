"""Repeat a training or inference run from its manifest, and say whether the results are the same.

Command line::

    python -m scripts.reproduce RUN_DIR --output_dir NEW_DIR

A manifest holds a configuration, and configurations can run code: repeat only runs that you trust.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

import nibabel as nib
import numpy as np
import torch

from scripts.checkpoint import load_state
from scripts.data.files import read_json
from scripts.runtime.atomic_files import write_json
from scripts.runtime.manifest import MANIFEST, ROOT, bundle_identity, environment, revision
from scripts.runtime.output_folder import file_sha256

GPU_WEIGHT_TOLERANCE = 1e-3
"""On a GPU: largest distance of the weights, relative to their norm, that counts as the same."""
GPU_VOXEL_TOLERANCE = 1e-3
"""On a GPU: largest fraction of voxels with another label, or distance of images relative to their norm."""

_OWN = {"output_dir", "resume", "overwrite", "help", "debug"}
_NEED_NOT_AGREE = {"epochs", *_OWN}
"""Options that a resumed run may have changed and still be repeated in one go."""

_IMPORT = re.compile(r"\bfrom (scripts[\w.]*) import (\w+)")


def reproduce(run_dir: str, output_dir: str) -> None:
    """Repeat a run into a new folder and compare the results.

    On a CPU the same packages, processor and number of threads give the same bits. On a GPU results within
    :data:`GPU_WEIGHT_TOLERANCE` and :data:`GPU_VOXEL_TOLERANCE` count as the same.

    Args:
        run_dir: folder of a run with a ``manifest.json``: of a training stage, or of an inference run.
        output_dir: new folder for the repetition.

    Raises:
        FileNotFoundError: no manifest, or what the run was made from is gone.
        FileExistsError: ``output_dir`` holds something.
        ValueError: the manifest cannot be repeated (by this version), the repetition failed, or its results differ.
    """
    run, new = Path(run_dir), Path(output_dir)
    manifest = _read(run)
    if new.exists() and any(new.iterdir()):
        raise FileExistsError(f"{new} holds something: give another --output_dir")
    _refuse_moved(manifest, run)
    options = _options(manifest, run)
    for line in differences(manifest):
        print(f"not as it was: {line}")
    new.mkdir(parents=True, exist_ok=True)
    config, given = new / "repeated.json", new / "repeated_values.json"
    write_json(manifest["config"], config)
    write_json(options | {"output_dir": str(new)}, given)
    threads = {"OMP_NUM_THREADS": str(manifest["environment"]["threads"])}
    command = [sys.executable, "-m", "scripts.runtime.workflow", "--config_file", str(config.absolute())]
    command += ["--given_file", str(given.absolute()), "--logging_file", str(ROOT / "configs" / "logging.conf")]
    status = subprocess.run(command, env=os.environ | threads, check=False)
    if status.returncode:
        raise ValueError(f"the repetition failed with exit status {status.returncode}")
    stage = manifest["config"].get("stage")
    repeated = new / stage if stage else new
    repeated_data = _read(repeated)["data"]
    if repeated_data != manifest["data"]:
        raise ValueError(f"the data are not those of {run}: {manifest['data']} then, {repeated_data} now")
    on_gpu = str(manifest["environment"]["device"]).startswith("cuda")
    found = list(compare(run, repeated, training=stage is not None))
    print("\n".join(f"{name}: {'identical' if not distance else f'differs by {distance:.3g}'}"
                    for name, distance, _ in found))  # fmt: skip
    wrong = [name for name, distance, tolerance in found if distance > (tolerance if on_gpu else 0)]
    if wrong:
        raise ValueError(f"not reproduced: {len(wrong)} of {len(found)} results differ ({', '.join(wrong[:5])})")
    print(f"reproduced: {len(found)} results {'agree within the tolerance for GPUs' if on_gpu else 'are identical'}")


def compare(run: Path, repeated: Path, training: bool) -> Iterator[tuple[str, float, float]]:
    """Name of each result, how far the repeated one is from it (0 for the same bits), tolerance on a GPU.

    Raises:
        ValueError: there is nothing to compare, or a result is missing.
    """
    names = ["model.pt", "last.pt", "metrics.csv"] if training else sorted(p.name for p in run.glob("*.nii.gz"))
    if not names or not any((run / name).is_file() for name in names):
        raise ValueError(f"{run} has no results to compare with")
    for name in names:
        if not (run / name).is_file() or not (repeated / name).is_file():
            raise ValueError(f"{name} is missing in {run if not (run / name).is_file() else repeated}")
        if name.endswith(".pt"):
            yield name, _weight_distance(run / name, repeated / name), GPU_WEIGHT_TOLERANCE
        elif name.endswith(".csv"):
            yield name, float(_rows(run / name) != _rows(repeated / name)), np.inf  # the weights decide
        else:
            yield name, _voxel_distance(run / name, repeated / name), GPU_VOXEL_TOLERANCE


def differences(manifest: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a run was made: bundle, packages, device."""
    before = manifest["environment"]
    now = environment(str(before["device"])) if _has(before["device"]) else {}
    keys = ("python", "device", "gpu", "driver", "processor", "cpu_capability", "processes")
    found = [f"{k} {before.get(k)} then, {now.get(k)} now" for k in keys if before.get(k) != now.get(k)]
    packages = now.get("packages", {})
    for name, version in before["packages"].items():
        if packages.get(name) != version:
            found.append(f"{name} {version} then, {packages.get(name)} now")
    if manifest["bundle"]["revision"] != revision():
        found.append(f"bundle {manifest['bundle']['revision']} then, {revision()} now")
    return found


def _has(device: str) -> bool:
    return not device.startswith("cuda") or torch.cuda.is_available()


def _read(run: Path) -> dict[str, Any]:
    path = run / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: give the folder of a run that wrote one (training: OUT/stage1, OUT/stage2)"
        )
    return read_json(path, dict, "expected the manifest of a run")


def _refuse_moved(manifest: Mapping[str, Any], run: Path) -> None:
    """Say which version a run needs whose configuration names what is no longer there.

    Raises:
        ValueError: a target or an import of the configuration does not exist here.
    """
    gone = [name for name in _names_of_ours(manifest["config"]) if locate(name) is None]
    if gone:
        made, now = manifest["bundle"], bundle_identity()
        raise ValueError(
            f"{run} was made by version {made['version']} (revision {made['revision']}) and names {gone[0]}, which is "
            f"not in version {now['version']} (revision {now['revision']}): repeat it with that revision"
        )


def _names_of_ours(config: Any, key: str = "") -> list[str]:
    """What a configuration takes from ``scripts``: its targets, and what its expressions import; sorted."""
    if isinstance(config, Mapping):
        return sorted({name for part, value in config.items() for name in _names_of_ours(value, part)})
    if isinstance(config, list):
        return sorted({name for value in config for name in _names_of_ours(value)})
    text = config if isinstance(config, str) else ""
    if key == "_target_":
        return [text] if text.startswith("scripts.") else []
    return [f"{module}.{name}" for module, name in _IMPORT.findall(text)] if text.startswith("$") else []


def _options(manifest: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """The run's options as constants, for a repetition from the start.

    Raises:
        FileNotFoundError, ValueError: it cannot be repeated.
    """
    options = manifest["options"]
    for before in manifest["earlier"]:
        changed = [n for n, v in before["options"].items() if v != options.get(n) and n not in _NEED_NOT_AGREE]
        changed = [name for name in changed if name not in ("split_file", "init_checkpoint")]  # a resumed run's own
        if changed:
            raise ValueError(
                f"{run} was resumed with other values of {', '.join(changed)}: it cannot be repeated at once"
            )
    if options.get("resume") and not manifest["earlier"]:
        raise ValueError(f"{run} was resumed, and the manifest of its beginning is gone")
    first = (manifest["earlier"] or [manifest])[0]
    if manifest["environment"]["processes"] != 1:
        raise ValueError(f"{run} ran on {manifest['environment']['processes']} processes: repeat it with torchrun")
    weights = first["weights"]
    if weights and not Path(weights["file"]).is_file():
        raise FileNotFoundError(f"the weights that {run} started from are gone: {weights['file']}")
    if weights and file_sha256(weights["file"]) != weights["sha256"]:
        raise ValueError(f"{weights['file']} is not the file that {run} started from: its SHA-256 differs")
    fixed = {n: v for n, v in (first["options"] | {"epochs": options.get("epochs")}).items() if n not in _OWN}
    kept = {name: value for name, value in fixed.items() if name.partition("::")[0] in manifest["config"]}
    cache = kept.get("cache_dir")
    if cache is not None and Path(cache).is_relative_to(Path(options["output_dir"])):
        del kept["cache_dir"]  # follows the output folder
    return kept | {"resume": False, "overwrite": False} if "resume" in manifest["config"] else kept


def _weight_distance(a: Path, b: Path) -> float:
    first, second = load_state(a), load_state(b)
    if first.keys() != second.keys() or any(first[k].shape != second[k].shape for k in first):
        return float("inf")
    if all(torch.equal(first[k], second[k]) for k in first):
        return 0.0
    squares = [(first[k].double() - second[k].double()).square().sum() for k in first]
    norm = torch.stack([first[k].double().square().sum() for k in first]).sum().sqrt()
    return max(float(torch.stack(squares).sum().sqrt() / norm), torch.finfo(torch.float64).tiny)


def _voxel_distance(a: Path, b: Path) -> float:
    first, second = (nib.load(path) for path in (a, b))
    if first.shape != second.shape or not np.array_equal(first.affine, second.affine):
        return float("inf")
    one, other = (np.asanyarray(image.dataobj) for image in (first, second))
    if np.issubdtype(one.dtype, np.integer):
        return float(np.mean(one != other))
    return float(np.linalg.norm((one - other).ravel()) / (np.linalg.norm(one.ravel()) or 1.0))


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows without the seconds."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(reproduce)
