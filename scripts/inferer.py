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
from scripts.context_source import gather_contexts
from scripts.contexts import ContextSet
from scripts.data.preprocessing import FinerScores
from scripts.data.volumes import (
    CONSTANT,
    NIFTI_SPACE,
    NOT_FINITE,
    VolumeError,
    load_exact,
    load_volume,
    volume_digest,
    volume_fault,
)
from scripts.distributed import usable_device
from scripts.engine import MASK_THRESHOLD
from scripts.memory import cache_bytes
from scripts.networks import Neuroverse3D
from scripts.passes import Passes
from scripts.refinement import Refinement

logger = logging.getLogger(__name__)

_DIGEST = "image_digest"

FINER = "finer"
"""Key of finer scores in a case's data."""

Volume = str | Path | np.ndarray | Tensor | MetaTensor | tuple[np.ndarray, np.ndarray]


class ICLInferer(Inferer):
    """Predicts from example pairs.

    A target on the context set's spacing is encoded once and decoded once per label (:class:`Passes`); one that is
    larger than the grid is tiled with overlapping windows. A context whose image is the target itself is left out.

    Args:
        network: the network, or the path of a checkpoint.
        device: where to compute; None takes a GPU if there is one.
        context: the context set, or a function that makes it when it is first needed.
        task: ``segmentation`` or ``generation``.
        labels: label numbers to segment; None takes all that the contexts have.
        mini_context_size: context pairs that run at once; None lets the free memory decide.
        cache_mb: memory budget in MB for what of the contexts' encoding serves all targets; None takes a quarter of
            the free memory, 0 keeps nothing.
        spacing: isotropic voxel size of the grid in mm for :meth:`set_context`; None fits the contexts.
        overlap: of neighbouring windows, part of the grid.
        amp: bfloat16 autocast.
        refine: look at each label again at finer voxels where it was found (:class:`Refinement`); segmentation only.
    """

    def __init__(
        self,
        network: str | Path | Neuroverse3D,
        device: str | torch.device | None = None,
        context: ContextSet | Callable[[], ContextSet] | None = None,
        task: str = "segmentation",
        labels: Sequence[int] | None = None,
        mini_context_size: int | None = None,
        cache_mb: float | None = None,
        spacing: float | None = None,
        overlap: float = 0.25,
        amp: bool = False,
        refine: bool = False,
    ) -> None:
        if task not in ("segmentation", "generation"):
            raise ValueError(f"--task must be segmentation or generation, got {task!r}")
        if refine and task == "generation":
            raise ValueError("--refine true is for segmentation: an image-to-image task has no label to look closer at")
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = load_network(network) if isinstance(network, (str, Path)) else network
        self.network = network.to(self.device, memory_format=torch.channels_last_3d).eval()
        self.task = task
        self.labels = list(labels) if labels else None
        self.mini_context_size = mini_context_size
        self.cache_mb = cache_mb
        self.spacing = spacing
        self.overlap = overlap
        self.amp = amp
        self.refine = refine
        self.used: dict[int, list[str]] = {}
        """Names of the contexts of the last prediction, by label."""
        self.refined: dict[int, dict[str, Any]] = {}
        """With ``refine``: what was done to each label of the last answer, see :attr:`Refinement.found`."""
        self.on_label: Callable[[int, int, int], None] | None = None
        """Called with label, labels done and labels in all after every label of a prediction, in every window."""
        self._context = context
        self._passes: Passes | None = None
        self._refinement: Refinement | None = None
        self._used_for: str | None = None
        self._scan: tuple[str, MetaTensor] | None = None

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
            ValueError: no pairs, lists of unequal length, or a faulty pair: not one 3D volume each, on different
                voxels, labels that are no label numbers.
        """
        if not images or len(images) != len(labels):
            raise ValueError(f"need as many labels as images, at least one: got {len(images)} and {len(labels)}")
        names = [str(x) if isinstance(x, (str, Path)) else f"context {i + 1}" for i, x in enumerate(images)]
        kept = [
            # files are read when needed
            tuple(
                str(x) if isinstance(x, (str, Path)) else as_volume(x, exact)
                for x, exact in zip(pair, (False, self.task != "generation"), strict=True)
            )
            for pair in zip(images, labels, strict=True)
        ]
        self._context = gather_contexts(
            names, kept, self.network.grid.tolist(), self.spacing, self.task == "generation"
        )  # fmt: skip

    def take_over(self, other: ICLInferer) -> None:
        """Take what another predictor with the same network has made of context pairs that both have.

        Answers stay the same; pairs that are in both sets need not be read and encoded again.

        Args:
            other: the predictor, whose contexts may be others.
        """
        same = self.context.take_over(other.context)
        if other._passes is not None and other._passes.context is other.context:
            self._passes_of(self.network, self.context).take_over(other._passes, same)

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

    def predict(self, image: Volume, scorer: Inferer | None = None) -> MetaTensor:
        """Answer for one target in its own space.

        Args:
            image: as in :meth:`set_context`.
            scorer: what finds the scores, called as this predictor is, which does it itself by default.

        Returns:
            ``(1, H, W, D)`` with the target's affine: label numbers (uint8, or int16/int32 if needed), or for
            generation float32 in the intensity range and unit of the contexts' outputs, trilinearly resampled (its
            lowest value outside of the grid).

        Raises:
            VolumeError: as :func:`as_volume`, or the image is constant.
            ValueError: no contexts, or an asked-for label is in none of them.
        """
        volume = as_volume(image)
        if volume.min() == volume.max():
            raise VolumeError(_name_of(image), CONSTANT.format(float(volume.min())))
        target = self.to_grid(volume)
        scores = (scorer or self)(target[None].to(self.device), self.network)
        return self.answer(scores[0].cpu(), target)

    def to_grid(self, volume: MetaTensor) -> MetaTensor:
        """Bring a target ``(1, H, W, D)`` to the context set's spacing; it remembers which image it was.

        With ``refine`` the image is kept until :meth:`finer`, or the next target.
        """
        self._scan = None
        target = self.context.preprocessing.target(volume)
        target.meta[_DIGEST] = volume_digest(volume)
        if self.refine:
            self._scan = target.meta[_DIGEST], volume
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
        self._used_for = _digest_of(inputs)

        def scores_of(window: Tensor) -> Tensor:
            if isinstance(network, Neuroverse3D):
                return self._passes_of(network, context).scores(window, members, self.on_label)
            scores = []
            for value, chosen in members.items():
                if chosen:
                    images, wanted = (part[None] for part in context.episode(chosen, value))
                    scores.append(
                        network(window, images, wanted, mini_context_size=self.mini_context_size or 1).float()
                    )
                else:
                    scores.append(torch.zeros_like(window))
                if self.on_label is not None:
                    self.on_label(value, len(scores), len(members))
            return torch.cat(scores, dim=1)

        grid = context.preprocessing.spatial_size
        with torch.no_grad(), torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
            return sliding_window_inference(plain, grid, 1, scores_of, self.overlap, mode="gaussian")

    def finer(self, scores: Tensor, target: MetaTensor) -> dict[int, FinerScores]:
        """Look again at finer voxels, with the same contexts; what was done is then in :attr:`refined`.

        Args:
            scores: ``(K, h, w, d)``.
            target: as made last by :meth:`to_grid`, whose scan is let go of.

        Returns:
            By label, where it gains by it.

        Raises:
            ValueError: the scan is not at hand.
        """
        (kept, scan), self._scan = self._scan or (None, None), None
        if scan is None or kept != _digest_of(target):
            raise ValueError("refine needs the target's scan: call to_grid, the prediction and finer or answer in turn")
        context = self.context
        if self._used_for == kept:
            members = {value: [context.names.index(name) for name in self.used[value]] for value in self.label_values}
        else:
            members = self._members(target, None)
        if self._refinement is None or self._refinement.context is not context:
            self._refinement = Refinement(context, cache_bytes(self.cache_mb, torch.device("cpu")))
        found = self._refinement(dict(zip(self.label_values, scores, strict=True)), target, scan, members, self._look)
        self.refined = self._refinement.found
        return found

    def answer(self, scores: Tensor, target: MetaTensor, finer: Mapping[int, FinerScores] | None = None) -> MetaTensor:
        """Scores on the grid -> answer in the target's own space.

        Args:
            scores: ``(K, h, w, d)``.
            target: the preprocessed target ``(1, h, w, d)``, with its operations recorded.
            finer: from :meth:`finer`; with ``refine``, None calls it.

        Returns:
            As :meth:`predict`.
        """
        preprocessing = self.context.preprocessing
        if self.task == "segmentation":
            finer = self.finer(scores, target) if self.refine and finer is None else finer
            return preprocessing.to_native_labels(scores, target, self.label_values, MASK_THRESHOLD, finer)
        low, high = self.context.output_range
        native = preprocessing.to_native(scores.clamp(0, 1), target)
        native.as_tensor().mul_(high - low).add_(low)  # in place: at native resolution a copy is another scan
        return native

    def _look(self, image: Tensor, images: Tensor, masks: Tensor) -> Tensor:
        """Scores ``(h, w, d)`` of an image ``(1, h, w, d)`` for one label; contexts are ``(L, 1, *grid)``."""
        planned = self._passes.mini_context_size if self._passes else self.mini_context_size

        def score_of(window: Tensor) -> Tensor:
            return self.network(window, images[None], masks[None], mini_context_size=planned or 1).float()

        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            grid, window = images.shape[2:], image[None].to(self.device)
            return sliding_window_inference(window, grid, 1, score_of, self.overlap, mode="gaussian")[0, 0].cpu()

    def _passes_of(self, network: Neuroverse3D, context: ContextSet) -> Passes:
        if self._passes is None or self._passes.network is not network or self._passes.context is not context:
            self._passes = Passes(network, context, self.mini_context_size, self.cache_mb, self.amp)
        return self._passes

    def _members(self, inputs: Tensor, among: Sequence[int] | None) -> dict[int, list[int]]:
        """Numbers of the contexts to use, by label; none where the target is the only one that has it."""
        context = self.context
        similarity = context.similarity(inputs) if context.chooses else None
        digest = _digest_of(inputs)
        itself = context.of_same_subject(digest) if digest else []
        members = {}
        for value in self.label_values:
            pool = [i for i in context.holding(value) if i not in itself and (among is None or i in among)]
            members[value] = context.choose(pool, similarity)
            if not pool:
                which = "" if self.task == "generation" else f" with label {value}"
                logger.warning("there is no context%s but the target itself: its answer is empty", which)
        if similarity is not None:
            for chosen in dict.fromkeys(map(tuple, members.values())):
                served = ", ".join(str(value) for value, numbers in members.items() if tuple(numbers) == chosen)
                shown = ", ".join(f"{context.names[i]} ({similarity[i]:.2f})" for i in chosen)
                logger.info("most similar contexts for label %s: %s", served, shown)
        return members


def _digest_of(target: Tensor) -> str | None:
    """Which scan a target was made from."""
    digest = target.meta.get(_DIGEST) if isinstance(target, MetaTensor) else None
    return digest[0] if isinstance(digest, (list, tuple)) else digest  # of a batch


def as_volume(source: Volume, exact: bool = False) -> MetaTensor:
    """``(1, H, W, D)`` from a path, a MetaTensor, an array, or ``(array, affine)``: float32, or its own type if exact.

    Raises:
        VolumeError: not one 3D volume of finite numbers with a usable affine; a file is named.
    """
    name = _name_of(source)
    if isinstance(source, (str, Path)):
        volume = (load_exact if exact else load_volume)(source)
    else:
        array, affine = source if isinstance(source, tuple) else (source, getattr(source, "affine", np.eye(4)))
        voxels = torch.as_tensor(array if isinstance(array, Tensor) else np.asarray(array))
        voxels = voxels.as_tensor() if isinstance(voxels, MetaTensor) else voxels
        voxels = voxels[None] if voxels.ndim != 4 else voxels
        voxels = voxels if exact else voxels.float()
        meta = {k: v for k, v in getattr(source, "meta", {}).items() if k in (NIFTI_SPACE, "filename_or_obj")}
        affine = torch.as_tensor(np.asarray(affine), dtype=torch.float64)
        if affine.shape != (4, 4):
            raise ValueError(f"need an affine of (4, 4), got {tuple(affine.shape)}")
        volume = MetaTensor(voxels, affine=affine, meta=meta)
        if fault := volume_fault(volume):
            raise VolumeError(name, fault)
    if not all(bound.isfinite() for bound in volume.as_tensor().aminmax()):
        raise VolumeError(name, NOT_FINITE)
    return volume


def _name_of(source: Volume) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the given volume"


class ToGridd(MapTransform):
    """Brings a loaded target to the context set's spacing (``ICLInferer.to_grid``)."""

    def __init__(self, keys: Hashable, inferer: ICLInferer) -> None:
        super().__init__(keys)
        self.inferer = inferer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key: ``(1, H, W, D)`` -> ``(1, h, w, d)``."""
        return {**data, **{key: self.inferer.to_grid(data[key]) for key in self.keys}}


class RefineScoresd(MapTransform):
    """Adds finer scores under ``finer`` (``ICLInferer.finer``), for the transforms behind it.

    Args:
        keys: the scores, one key.
        inferer: the predictor that made them.
        image_key: the preprocessed target.
    """

    def __init__(self, keys: Hashable, inferer: ICLInferer, image_key: str = "image") -> None:
        super().__init__(keys)
        self.inferer = inferer
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``(K, h, w, d)`` -> by label :class:`FinerScores`."""
        return {**data, FINER: self.inferer.finer(data[self.keys[0]].cpu(), data[self.image_key].cpu())}


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
            answer = self.inferer.answer(data[key].cpu(), data[self.image_key].cpu(), data.get(FINER))
            source = data[self.image_key].meta.get("filename_or_obj", "")
            answer.meta["filename_or_obj"] = f"{data[self.name_key]}.nii.gz" if self.name_key in data else source
            answers[key] = answer
        return {**data, **answers}
