"""Groups whose members lie on the first one, as contexts do on a target in use: registered, once for each pair."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.data import MetaTensor
from torch import Tensor

from scripts.data.label_decision import MASK_THRESHOLD
from scripts.registration import Alignment, align
from scripts.registration.grids import Grid
from scripts.runtime.atomic_files import write_atomically

_KEPT = {"aligned", "shape", "grid", "affine", "displacement"}


class AlignedMembers:
    """Brings the members of a group to the first one; those that do not align stay as they are.

    Transforms are cached by the images of a pair, affine and displacement on the working grid: some 0.6 MB each.

    Args:
        cache_dir: where the cache goes; transforms are in ``aligned`` in it.
    """

    def __init__(self, cache_dir: str | Path) -> None:
        self.folder = Path(cache_dir) / "aligned"

    def __call__(
        self, clean: Sequence[Tensor], image: Tensor, label: Tensor, generation: bool, keep: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Warp a group.

        Args:
            clean: (1, H, W, D) image of each member, by which it is registered.
            image: (N, 1, H, W, D), inputs.
            label: (N, C, H, W, D), wanted outputs: 0 and 1, or for generation images.
            generation: they are images.
            keep: cache the transforms; members that are never drawn again need not be.

        Returns:
            Both alike, of the types that they had; 0 where a member shows nothing.
        """
        shape, still = image.shape[2:], torch.eye(4, dtype=torch.float64)
        images, labels = [image[0]], [label[0]]
        for number, found in enumerate(self._found(clean, keep), 1):
            if found is None:
                images.append(image[number])
                labels.append(label[number])
                continue
            both = MetaTensor(torch.cat((image[number].float(), label[number].float())), affine=still)
            warped = found.warp(both, 0, shape, still)
            images.append(warped[:1].to(image.dtype))
            labels.append((warped[1:] if generation else warped[1:] > MASK_THRESHOLD).to(label.dtype))
        return torch.stack(images), torch.stack(labels)

    def _found(self, clean: Sequence[Tensor], keep: bool) -> list[Alignment | None]:
        """How each member but the first lies on that; None where it does not align."""
        target, *others = (image.as_subclass(Tensor).float() for image in clean)
        paths = self._paths((target, *others)) if keep else [None] * len(others)
        known = [path and _read(path) for path in paths]
        # a constant image shows nothing to register by
        new = [k for k, one in enumerate(known) if one is None and _varies(target) and _varies(others[k])]
        if new:
            found = align(_placed(target), [_placed(others[k]) for k in new])
            for row, k in enumerate(new):
                known[k] = _kept(found, row)
                if paths[k]:
                    write_atomically(paths[k], lambda temporary, one=known[k]: torch.save(one, temporary))
        return [_alignment(one) if one is not None and one["aligned"] else None for one in known]

    def _paths(self, images: Sequence[Tensor]) -> list[Path]:
        """Where the transforms of each image but the first are cached."""
        first, *digests = (hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:32] for image in images)
        return [self.folder / f"{first}-{digest}.pt" for digest in digests]


def _varies(image: Tensor) -> bool:
    return bool(image.min() < image.max())


def _placed(image: Tensor) -> MetaTensor:
    """With voxels of 1 mm: members of a group have voxels of one size."""
    return MetaTensor(image, affine=torch.eye(4, dtype=torch.float64))


def _kept(found: Alignment, row: int) -> dict:
    return {
        "aligned": bool(found.aligned[row]),
        "shape": list(found.grid.shape),
        "grid": found.grid.affine,
        "affine": found.affine[row : row + 1].clone(),
        "displacement": found.displacement[row : row + 1].half(),
    }


def _alignment(kept: dict) -> Alignment:
    one = torch.ones(1)
    return Alignment(
        Grid(tuple(kept["shape"]), kept["grid"]),
        kept["affine"],
        kept["displacement"].float(),
        similarity=one,
        cover=one,
        folded=0 * one,
        kind="intensity",
        searched=one.bool(),
    )


def _read(path: Path) -> dict | None:
    """What is cached; None for nothing, or for what is damaged."""
    try:
        found = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return None
    return found if isinstance(found, dict) and set(found) >= _KEPT else None
