"""What ``report.json`` says of a target, and the picture of it."""

from __future__ import annotations

import os
import resource
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, generate_spatial_bounding_box

from scripts.data.preprocessing import RAS_LABELS
from scripts.data.volumes import pair_digest
from scripts.inference.aligned_view import AlignedView
from scripts.inference.contexts import ContextSet, listing
from scripts.inference.target import Target
from scripts.reporting.pictures import SHOWN_CONTEXTS, overlay_figure, save_png


def case_entry(target: Target, context: ContextSet, device: torch.device, seconds: float) -> dict[str, Any]:
    """Entry of a target with its prediction.

    Args:
        target: the target.
        context: the context set.
        device: where it was predicted.
        seconds: from reading to writing.
    """
    alignment = {} if target.alignment is None else {"alignment": target.alignment}
    return {
        "digest": pair_digest(target.scan, None, target.digest),
        "image_file": file_facts(target.case["image"]),
        "seconds": round(seconds, 3),
        "seconds_by_step": target.seconds,
        "peak_memory_mb": _peak_memory_mb(device),
        "contexts": {str(value): names for value, names in target.used.items()},
        "volumes_mm3": _volumes(target, context),
        "warnings": case_warnings(target, context),
        **alignment,
        **target.confidence,
    }


def case_warnings(target: Target, context: ContextSet) -> list[str]:
    """What a reader of a target's prediction should know."""
    found = [*target.warnings]
    if itself := context.same_image(target.digest):
        found.append(f"the target is also context {context.names[itself[0]]}: it was left out of its own contexts")
    if kin := [i for i in context.of_same_subject(target.digest) if i not in itself]:
        names = listing([context.names[i] for i in kin])
        found.append(f"scans of the target's own subject were left out of its contexts: {names}")
    alone = [str(value) for value, names in target.used.items() if not names]
    if alone and target.aligned:
        found.append(f"no context that aligned has label {', '.join(alone)}: left empty")
    elif alone:
        found.append(f"no context but the target itself has label {', '.join(alone)}: left empty")
    grid = context.preprocessing.spatial_size
    if target.alignment is None and any(n > m for n, m in zip(target.image.shape[1:], grid, strict=True)):
        found.append("larger than the grid at the contexts' spacing: predicted in overlapping windows")
    if not context.generation and not target.prediction.any():
        found.append("nothing was found: the prediction is all background")
    return found


def _peak_memory_mb(device: torch.device) -> float:
    """Peak of the GPU's memory for this case, or of the whole process so far on the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def file_facts(path: str | os.PathLike) -> dict[str, Any] | None:
    """What a file is recognised by without being read; None if there is none, as behind a link to nothing."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return {"path": os.path.abspath(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def save_picture(target: Target, context: ContextSet, path: str | os.PathLike) -> None:
    """Draw a target with its prediction, and the first contexts as they were shown to the network.

    Args:
        target: with its prediction.
        context: the context set.
        path: a PNG file.
    """
    to_ras = Orientation(axcodes="RAS", labels=RAS_LABELS)
    image, shown = to_ras(target.scan)[0].numpy(), to_ras(target.prediction)
    names, pairs = _shown_contexts(target, context)
    if context.generation:  # the prediction itself is what is to be seen
        image, mask = shown[0].numpy(), np.zeros(shown.shape[1:], int)
        pairs = [(picture, np.zeros(picture.shape, int)) for picture, _ in pairs]
    else:
        mask = shown[0].numpy()
    figure = overlay_figure(image, mask, nib.affines.voxel_sizes(shown.affine.numpy()), pairs, target.name, names)
    save_png(figure, path)


def _shown_contexts(target: Target, context: ContextSet) -> tuple[list[str], list[tuple[np.ndarray, np.ndarray]]]:
    """Names, images and labels of the first contexts that were used: aligned ones as they lie on the target."""
    used = list(dict.fromkeys(name for names in target.used.values() for name in names))[:SHOWN_CONTEXTS]
    view = next((view for view in target.views if isinstance(view, AlignedView)), None)
    titles, pairs = [], []
    for name in used:
        number = context.names.index(name)
        if view is not None and number in view.similarity:
            titles.append(f"{name}, aligned ({view.similarity[number]:.2f})")
            pairs.append(tuple(part.numpy() for part in view.shown(number)))
            continue
        both = torch.cat([part[0].double() for part in context.pairs([number])])
        low, high = generate_spatial_bounding_box(both)
        image, label = both[:, *map(slice, low, high)].numpy()
        titles.append(name)
        pairs.append((image, label))
    return titles, pairs


def _volumes(target: Target, context: ContextSet) -> dict[str, float]:
    if context.generation:
        return {}
    prediction: MetaTensor = target.prediction
    voxel_mm3 = float(np.prod(nib.affines.voxel_sizes(prediction.affine.numpy())))
    return {str(value): round(int((prediction == value).sum()) * voxel_mm3, 3) for value in target.used}
