"""The in-context predictor: context set in, native-space answers out.

:class:`ICLInferer` is what people script with, what ``inference.json`` runs, and what MONAI Label and MONAI
Deploy call. It knows native space; the network does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms import MapTransform
from torch import Tensor

from scripts.checkpoint import load_network
from scripts.contexts import ContextSet, build_contexts
from scripts.data.integrity import box_and_voxel
from scripts.data.preprocessing import ForegroundMask, Preprocessing, fit_spacing
from scripts.data.volumes import AFFINE_TOLERANCE_MM, load_volume, volume_digest
from scripts.engine import MASK_THRESHOLD
from scripts.networks import Neuroverse3D

logger = logging.getLogger(__name__)

_DIGEST = "image_digest"

Volume = str | Path | np.ndarray | Tensor | MetaTensor | tuple[np.ndarray, np.ndarray]


class ICLInferer(Inferer):
    """Predicts from example pairs.

    A target on the context set's spacing goes through the network once per label; one that is larger than
    the grid is tiled with overlapping windows. A context whose image is the target itself is left out.

    Args:
        network: the network, or the path of a checkpoint.
        device: where to compute; None takes a GPU if there is one.
        context: the context set, or a function that makes it when it is first needed.
        task: ``segmentation`` or ``generation``.
        labels: label numbers to segment; None takes all that the contexts have.
        mini_context_size: context pairs that run at once.
        spacing: isotropic voxel size of the grid in mm for :meth:`set_context`; None fits the contexts.
        overlap: of neighbouring windows, part of the grid.
        amp: bfloat16 autocast.
    """

    def __init__(
        self,
        network: str | Path | Neuroverse3D,
        device: str | torch.device | None = None,
        context: ContextSet | Callable[[], ContextSet] | None = None,
        task: str = "segmentation",
        labels: Sequence[int] | None = None,
        mini_context_size: int = 3,
        spacing: float | None = None,
        overlap: float = 0.25,
        amp: bool = False,
    ) -> None:
        if task not in ("segmentation", "generation"):
            raise ValueError(f"--task must be segmentation or generation, got {task!r}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = load_network(network) if isinstance(network, (str, Path)) else network
        self.network = network.to(self.device, memory_format=torch.channels_last_3d).eval()
        self.task = task
        self.labels = list(labels) if labels else None
        self.mini_context_size = mini_context_size
        self.spacing = spacing
        self.overlap = overlap
        self.amp = amp
        self.used: dict[int, list[str]] = {}
        """Names of the contexts of the last prediction, by label."""
        self._context = context

    @property
    def context(self) -> ContextSet:
        """The context set.

        Raises:
            ValueError: there is none.
        """
        if callable(self._context):
            self._context = self._context()
        if self._context is None or len(self._context) == 0:
            raise ValueError("no contexts: call set_context, or give --context_dir")
        return self._context

    def set_context(self, images: Sequence[Volume], labels: Sequence[Volume]) -> None:
        """Use these example pairs for all targets to come.

        Args:
            images: paths, MetaTensors, ``(array, affine)`` tuples, or plain arrays at 1 mm, each 3D (a
                leading channel axis of 1 is fine).
            labels: the same for the labels (for generation: the wanted outputs), on the same voxels.

        Raises:
            ValueError: no pairs, lists of unequal length, or a pair on different voxels.
        """
        if not images or len(images) != len(labels):
            raise ValueError(f"need as many labels as images, at least one: got {len(images)} and {len(labels)}")
        names = [str(x) if isinstance(x, (str, Path)) else f"context {i + 1}" for i, x in enumerate(images)]
        pairs = [(as_volume(image), as_volume(label)) for image, label in zip(images, labels, strict=True)]
        for name, (image, label) in zip(names, pairs, strict=True):
            if image.shape != label.shape or not torch.allclose(image.affine, label.affine, atol=AFFINE_TOLERANCE_MM):
                raise ValueError(f"{name}: image and label differ in shape or affine")
        grid = self.network.grid.tolist()
        masks = [ForegroundMask()({"image": image, "label": label})["foreground"][0] for image, label in pairs]
        boxes = [
            box_and_voxel(mask.numpy(), image.affine.numpy()) for mask, (image, _) in zip(masks, pairs, strict=True)
        ]
        preprocessing = Preprocessing(grid, self.spacing or fit_spacing(boxes, grid))
        self._context = build_contexts(names, pairs, preprocessing, self.task == "generation")

    @property
    def label_values(self) -> list[int]:
        """Labels that are predicted, one score channel each; for generation one channel.

        Raises:
            ValueError: an asked-for label is in no context, or the contexts have no label at all.
        """
        if self.task == "generation":
            return [1]
        present = self.context.label_values
        values = self.labels if self.labels is not None else present
        missing = sorted(set(values) - set(present))
        if missing:
            raise ValueError(f"labels {missing} are in none of the {len(self.context)} contexts, which have {present}")
        if not values:
            raise ValueError("the contexts have no label other than background")
        return values

    def predict(self, image: Volume) -> MetaTensor:
        """Answer for one target in its own space.

        Args:
            image: as in :meth:`set_context`.

        Returns:
            ``(1, H, W, D)`` with the target's affine: label numbers (uint8, or int16/int32 if needed), or for
            generation float32 in the intensity range of the contexts' outputs.
        """
        target = self.to_grid(as_volume(image))
        scores = self(target[None].to(self.device), self.network)
        return self.answer(scores[0].cpu(), target)

    def to_grid(self, volume: MetaTensor) -> MetaTensor:
        """Bring a target ``(1, H, W, D)`` to the context set's spacing; it remembers which image it was."""
        target = self.context.preprocessing.target(volume)
        target.meta[_DIGEST] = volume_digest(volume)
        return target

    def __call__(
        self,
        inputs: Tensor,
        network: torch.nn.Module,
        *args: Any,
        among: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Scores of a preprocessed target.

        Args:
            inputs: ``(1, 1, h, w, d)`` from the context set's preprocessing.
            network: runs the windows (``self.network``, or the caller's own).
            args: not used.
            among: numbers of the contexts that may be used; None for all.
            kwargs: not used.

        Returns:
            ``(1, K, h, w, d)`` float32, one channel per label of :attr:`label_values`.
        """
        context = self.context
        members = self._members(inputs, among)
        self.used = {value: [context.names[i] for i in chosen] for value, chosen in members.items()}

        def scores_of(window: Tensor) -> Tensor:
            scores = []
            for value, chosen in members.items():
                if not chosen:
                    scores.append(torch.zeros_like(window))
                    continue
                images, labels = context.images[chosen][None], context.labels[chosen][None]
                wanted = labels if self.task == "generation" else (labels == value).float()
                scores.append(network(window, images, wanted, mini_context_size=self.mini_context_size))
            return torch.cat(scores, dim=1).float()

        grid = context.preprocessing.spatial_size
        with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
            return sliding_window_inference(plain, grid, 1, scores_of, self.overlap, mode="gaussian")

    def answer(self, scores: Tensor, target: MetaTensor) -> MetaTensor:
        """Scores on the grid -> answer in the target's own space.

        Args:
            scores: ``(K, h, w, d)``.
            target: the preprocessed target ``(1, h, w, d)``, with its operations recorded.

        Returns:
            As :meth:`predict`.
        """
        native = self.context.preprocessing.to_native(scores, target)
        if self.task == "generation":
            low, high = self.context.output_range
            return MetaTensor(low + (high - low) * native.as_tensor().float(), affine=native.affine)
        best, channel = native.as_tensor().max(dim=0, keepdim=True)
        values = self.label_values
        smallest = next(t for t in (torch.uint8, torch.int16, torch.int32) if max(values) <= torch.iinfo(t).max)
        numbers = torch.tensor(values, dtype=smallest)[channel]
        return MetaTensor(torch.where(best > MASK_THRESHOLD, numbers, 0).to(smallest), affine=native.affine)

    def _members(self, inputs: Tensor, among: Sequence[int] | None) -> dict[int, list[int]]:
        """Numbers of the contexts to use, by label; none where the target is the only one that has it."""
        context = self.context
        digest = inputs.meta.get(_DIGEST) if isinstance(inputs, MetaTensor) else None
        digest = digest[0] if isinstance(digest, (list, tuple)) else digest  # of a batch
        itself = context.same_image(digest) if digest else []
        members = {}
        for value in self.label_values:
            pool = range(len(context)) if self.task == "generation" else context.holding(value)
            members[value] = [i for i in pool if i not in itself and (among is None or i in among)]
            if not members[value]:
                logger.warning("no context but the target itself has label %d: its answer is empty", value)
        return members


def as_volume(source: Volume) -> MetaTensor:
    """``(1, H, W, D)`` float32 from a path, a MetaTensor, an array, or ``(array, affine)``.

    Raises:
        ValueError: not one 3D volume.
    """
    if isinstance(source, (str, Path)):
        return load_volume(str(source))
    array, affine = source if isinstance(source, tuple) else (source, getattr(source, "affine", np.eye(4)))
    volume = torch.as_tensor(np.asarray(array)).float()
    volume = volume[None] if volume.ndim == 3 else volume
    if volume.ndim != 4 or volume.shape[0] != 1:
        raise ValueError(f"need one 3D volume, got shape {tuple(volume.shape)}")
    return MetaTensor(volume, affine=torch.as_tensor(np.asarray(affine), dtype=torch.float64))


class ToGridd(MapTransform):
    """Brings a loaded target to the context set's spacing (``ICLInferer.to_grid``)."""

    def __init__(self, keys: Hashable, inferer: ICLInferer) -> None:
        super().__init__(keys)
        self.inferer = inferer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key: ``(1, H, W, D)`` -> ``(1, h, w, d)``."""
        return {**data, **{key: self.inferer.to_grid(data[key]) for key in self.keys}}


class ToAnswerd(MapTransform):
    """Brings scores back to the target's own space (``ICLInferer.answer``).

    Args:
        keys: the scores.
        inferer: the predictor that made them.
        image_key: the preprocessed target.
        name_key: the case's name, which the saved file will have; it may be absent.
    """

    def __init__(self, keys: Hashable, inferer: ICLInferer, image_key: str = "image", name_key: str = "case") -> None:
        super().__init__(keys)
        self.inferer = inferer
        self.image_key = image_key
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key: ``(K, h, w, d)`` -> ``(1, H, W, D)``."""
        answers = {}
        for key in self.keys:
            answer = self.inferer.answer(data[key].cpu(), data[self.image_key].cpu())
            source = data[self.image_key].meta.get("filename_or_obj", "")
            answer.meta["filename_or_obj"] = f"{data[self.name_key]}.nii.gz" if self.name_key in data else source
            answers[key] = answer
        return {**data, **answers}
