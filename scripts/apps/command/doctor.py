"""What a machine has for the bundle, and whether it works there: for bug reports, and before a long run.

Command line::

    neuroverse3d doctor [--checkpoint WEIGHTS.pt --device cpu]
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import monai
import numpy as np
import torch

from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.inferer import ICLInferer
from scripts.runtime.commandline import main
from scripts.runtime.manifest import ROOT, bundle_identity, environment
from scripts.runtime.memory import free_memory
from scripts.runtime.output_folder import file_sha256
from scripts.runtime.precision import bfloat16_units, is_fast
from scripts.runtime.processes import local_device, usable_device

_SIZE, _SUBJECTS, _SEED = 32, 3, 0
_LOWEST_DICE = 0.3
"""Weights that learned nothing stay below it: an empty or a full mask has 0 and about 0.1."""


def doctor(checkpoint: str | None = None, device: str | None = None) -> None:
    """Print versions, device, free memory and weights, and segment a small made-up scan.

    Args:
        checkpoint: weights; None takes the bundle's.
        device: cuda, cuda:1 or cpu; None takes a GPU if there is one.

    Raises:
        FileNotFoundError: no weights.
        ValueError: no such device, or the made-up scan is not segmented.
    """
    weights = Path(str(checkpoint)) if checkpoint is not None else ROOT / "models" / "model.pt"
    if not weights.is_file():
        raise FileNotFoundError(f"no weights at {weights}: give --checkpoint")
    where = torch.device(usable_device(str(device)) if device is not None else local_device())
    found, bundle = environment(str(where)), bundle_identity()
    facts = {
        "Neuroverse3D": f"{bundle['version']} ({ROOT}, revision {bundle['revision']})",
        "Python": f"{platform.python_version()}, PyTorch {torch.__version__}, MONAI {monai.__version__}, "
        f"NumPy {np.__version__}",
        "system": found["system"],
        "device": f"{where}, {found.get('gpu', found['processor'])}, {found['threads']} threads",
        "bfloat16": _bfloat16(where),
        "free memory": f"{free_memory(where) / 2**30:.1f} GiB on {where}",
        "weights": f"{weights}, SHA-256 {file_sha256(weights)}",
    }
    for name, text in facts.items():
        print(f"{name + ':':<14}{text}", flush=True)
    dice, seconds = _segment_made_up_scan(weights, where)
    print(f"{'self-check:':<14}a made-up scan of {_SIZE}³ voxels segmented in {seconds:.1f} s, Dice {dice:.2f}")
    if dice < _LOWEST_DICE:
        raise ValueError(f"the self-check failed: Dice {dice:.2f} where {_LOWEST_DICE} and more belongs")
    print("all is well")


def _bfloat16(device: torch.device) -> str:
    if not is_fast("bfloat16", device):
        return "no: --amp true would be slow here"
    units = [name for name, there in bfloat16_units().items() if there and device.type == "cpu"]
    return f"yes ({', '.join(units)})" if units else "yes"


def _segment_made_up_scan(weights: Path, device: torch.device) -> tuple[float, float]:
    """Dice of one of three subjects of one anatomy, segmented from the others, and the seconds that took."""
    cohort = synthesize_cohort(_SEED, _SUBJECTS, _SIZE, num_labels=1, spread=0.3)
    scans = [(image[0].numpy(), np.eye(4)) for image in cohort.images]
    masks = [(label.reshape(3 * (_SIZE,)).numpy().astype(np.uint8), np.eye(4)) for label in cohort.labels]
    icl = ICLInferer(weights, device, align="off")
    started = time.monotonic()
    icl.set_context(scans[1:], masks[1:])
    mask, wanted = icl.predict(scans[0])[0].cpu().numpy() > 0, masks[0][0] > 0
    return 2 * float((mask & wanted).sum()) / float(mask.sum() + wanted.sum()), time.monotonic() - started


if __name__ == "__main__":
    main(doctor)
