"""The in-context predictor: context set in, predictions on the scans' own voxels out.

:class:`ICLInferer` is what people script with, what ``inference.json`` runs, and what MONAI Label and MONAI
Deploy call. It knows native space; the network does not. What it finds about a scan is in that scan's
:class:`~scripts.inference.target.Target`, so one predictor may serve several threads.
"""

from __future__ import annotations

import logging
import tempfile
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import Tensor

from scripts.checkpoint import load_network
from scripts.data.preprocessing import resampled
from scripts.data.volumes import (
    CONSTANT,
    NIFTI_SPACE,
    NOT_FINITE,
    VolumeError,
    load_exact,
    load_volume,
    strip_ending,
    volume_digest,
    volume_fault,
)
from scripts.inference.aligned_contexts import MODES, AlignedContexts
from scripts.inference.context_source import gather_contexts
from scripts.inference.contexts import ContextSet
from scripts.inference.network_passes import Passes
from scripts.inference.target import OnLabel, Target
from scripts.inference.views import EVEN_SHARE, Episodes, Members, Parts, mixed
from scripts.networks import Neuroverse3D
from scripts.runtime.memory import cache_bytes
from scripts.runtime.precision import settled_amp
from scripts.runtime.processes import usable_device
from scripts.runtime.workflow import plain_errors, start_workflow

logger = logging.getLogger(__name__)

_DIGEST = "image_digest"
"""Meta data key of a preprocessed image: which target it is of."""

Volume = str | Path | np.ndarray | Tensor | MetaTensor | tuple[np.ndarray, np.ndarray]


class ICLInferer(Inferer):
    """Predicts from example pairs.

    With ``align`` every context is brought to the target first (:class:`AlignedContexts`): where the labels then lie
    are the regions in which network and contexts are asked, at voxels fine enough for them. Without it the whole target
    is shown on the context set's grid beside the contexts as they are (:class:`WholeView`). A context whose image is
    the target itself is left out.

    Args:
        network: the network, or the path of a checkpoint.
        device: where to compute; None takes a GPU if there is one.
        context: the context set, or a function that makes it when it is first needed.
        task: ``segmentation`` or ``generation``.
        labels: label numbers to segment; None takes all that the contexts have.
        mini_context_size: context pairs that run at once; None lets the free memory decide.
        cache_mb: memory budget in MB for what of the contexts serves all targets; None takes a quarter of the free
            memory, 0 keeps nothing.
        spacing: isotropic voxel size of the grid in mm for :meth:`set_context`; None fits the contexts.
        overlap: of neighbouring windows, part of the grid.
        amp: autocast to bfloat16; ``auto`` where the device is made for it.
        align: ``off``, ``affine`` or ``deformable``; None is ``deformable`` for segmentation and ``off`` for
            generation.
        evidence: show the network evidence for each label (:mod:`scripts.data.evidence`) where contexts are aligned.
        alignment_record: JSON file to remember the transforms between contexts in.
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
        amp: bool | str = "auto",
        align: str | None = None,
        evidence: bool = True,
        alignment_record: str | None = None,
    ) -> None:
        if task not in ("segmentation", "generation"):
            raise ValueError(f"--task must be segmentation or generation, got {task!r}")
        align = align or ("deformable" if task == "segmentation" else "off")
        if align not in ("off", *MODES):
            raise ValueError(f"--align must be off, affine or deformable, got {align!r}")
        self.device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = load_network(network) if isinstance(network, (str, Path)) else network
        self.network = network.to(self.device, memory_format=torch.channels_last_3d).eval()
        self.task = task
        self.labels = list(labels) if labels else None
        self.mini_context_size = mini_context_size
        self.cache_mb = cache_mb
        self.spacing = spacing
        self.overlap = overlap
        self.amp = settled_amp(amp, self.device)
        self.align = align
        self.evidence = evidence
        self.alignment_record = alignment_record
        self.share = EVEN_SHARE
        """Of the network in the scores of aligned views; the rest is the contexts' votes."""
        self.tuned: dict[str, Any] | None = None
        """Report of a tuning of the network on these contexts (:meth:`tune`); None before."""
        self._context = context
        self._alive: weakref.WeakValueDictionary[str, Target] = weakref.WeakValueDictionary()
        self._passes: Passes | None = None
        self._aligned: AlignedContexts | None = None

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

    @property
    def aligned(self) -> AlignedContexts | None:
        """What brings the contexts to a target; None with ``align="off"``."""
        if self.align == "off":
            return None
        if self._aligned is None or self._aligned.context is not self.context:
            halvings = len(getattr(self.network, "channels", (1,))) - 1
            self._aligned = AlignedContexts(
                self.context,
                self.align,
                self.device,
                2**halvings,
                cache_bytes(self.cache_mb, torch.device("cpu")),
                self.alignment_record,
                self.evidence,
            )
        return self._aligned

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
        self.tuned = None
        self._context = gather_contexts(
            names, kept, self.network.grid.tolist(), self.spacing, self.task == "generation"
        )  # fmt: skip

    def tune(
        self, minutes: float = 1.0, output_dir: str | Path | None = None, overwrite: bool = False, **options: Any
    ) -> dict[str, Any]:
        """Tune the network on the contexts (``configs/tune.json``); it keeps the new weights only if they win.

        Args:
            minutes: how long, alignment and decision included.
            output_dir: keeps weights and report, which are taken from there the next time; None keeps neither.
            overwrite: replace a tuning with other contexts or settings that is there.
            options: further options of ``configs/tune.json``, such as ``learning_rate``.

        Returns:
            The report: ``kept``, ``dice_before``, ``dice_after``, and more.

        Raises:
            ValueError: no contexts, or none that can be tuned on.
            FileExistsError: ``output_dir`` holds something else.
        """
        with tempfile.TemporaryDirectory() as scratch:
            given = {"predictor": self, "device": str(self.device), "minutes": float(minutes), "resume": True}
            given |= {"overwrite": overwrite, "output_dir": str(output_dir or scratch)}
            workflow = start_workflow("tune.json", given | options)
            with plain_errors():
                workflow.run()
                workflow.finalize()
        return self.tuned

    def take_over(self, other: ICLInferer) -> None:
        """Take what another predictor with the same network has made of context pairs that both have.

        Predictions stay the same; pairs that are in both sets need not be read, encoded and aligned again.

        Args:
            other: the predictor, whose contexts may be others.
        """
        same = self.context.take_over(other.context)
        if other._passes is not None and other._passes.context is other.context:
            self._passes_of(self.network, self.context).take_over(other._passes, same)
        if self.aligned is not None and other._aligned is not None and other._aligned.context is other.context:
            self.aligned.take_over(other._aligned, same)

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
        """Prediction for one target in its own space.

        Args:
            image: as in :meth:`set_context`.

        Returns:
            ``(1, H, W, D)`` with the target's affine: label numbers (uint8, or int16/int32 if needed), or for
            generation float32 in the intensity range and unit of the contexts' outputs, trilinearly resampled (its
            lowest value outside of the grid).

        Raises:
            VolumeError: as :func:`as_volume`, or the image is constant.
            ValueError: no contexts, or an asked-for label is in none of them.
        """
        return self.complete(self.target(image)).prediction

    def target(self, image: Volume, name: str = "", case: Mapping[str, Any] | None = None) -> Target:
        """A target, ready for :meth:`complete`.

        Args:
            image: as in :meth:`set_context`.
            name: what reports call it.
            case: what the folder it comes from says of it.

        Raises:
            VolumeError: as :func:`as_volume`, or the image is constant.
        """
        scan = as_volume(image)
        if scan.min() == scan.max():
            raise VolumeError(_name_of(image), CONSTANT.format(float(scan.min())))
        on_grid, digest = self.context.preprocessing.target(scan), volume_digest(scan)
        on_grid.meta[_DIGEST] = digest
        target = self._alive[digest] = Target(scan, on_grid, digest, name, case or {})
        return target

    def complete(self, target: Target) -> Target:
        """Look at a target from :meth:`target`, and bring what was found to its own space: its ``prediction``."""
        return self.to_native(self.look(target, self.network))

    def __call__(
        self, inputs: Tensor, network: torch.nn.Module, *args: Any, target: Target | None = None, **kwargs: Any
    ) -> Tensor:
        """Scores of a preprocessed target, as MONAI's engines ask for them.

        Args:
            inputs: ``(1, 1, h, w, d)`` from the context set's preprocessing.
            network: runs the windows (``self.network``, or the caller's own).
            args: not used.
            target: takes what was found; None makes one of ``inputs``, which then is all there is of the scan.
            kwargs: not used.

        Returns:
            ``(1, K, h, w, d)`` float32, one channel per label of :attr:`label_values`, 0 outside of every view.
        """
        target = target or self.target_of(inputs)
        self.look(target, network)
        return self.on_grid(target)

    def target_of(self, inputs: Tensor) -> Target:
        """The target whose preprocessed image ``(1, 1, h, w, d)`` this is, or one of which there is no more than that.

        An engine that hands over tensors alone, as MONAI Label's does, still has the target in its data.
        """
        digest = inputs.meta.get(_DIGEST) if isinstance(inputs, MetaTensor) else None
        alive = self._alive.get(digest[0] if isinstance(digest, (list, tuple)) else digest)
        if alive is not None:
            return alive
        spacing = self.context.preprocessing.spacing_mm
        affine = inputs.affine if isinstance(inputs, MetaTensor) else torch.diag(torch.tensor([spacing] * 3 + [1.0]))
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        scan = MetaTensor(plain[0].cpu(), affine=affine.reshape(4, 4))
        whole = [(0, size) for size in scan.shape[1:]]
        image = self.context.preprocessing.target(scan, whole)
        return Target(
            scan, MetaTensor(scan.as_tensor(), affine=scan.affine, meta=dict(image.meta)), volume_digest(scan)
        )

    def look(self, target: Target, network: torch.nn.Module) -> Target:
        """Show a target to the network: its ``views``, their ``scores``, and the contexts ``used``."""
        started = time.monotonic()
        self.prepare_views(target)
        members = self.members_of(target)
        self._log_contexts(target, members)
        target.used = {value: [self.context.names[i] for i in chosen] for value, chosen in members.items()}
        aligned = time.monotonic()
        target.scores = [mixed(part, self.share) for part in self.parts(target, network, members)]
        target.seconds |= {"alignment": round(aligned - started, 3), "network": round(time.monotonic() - aligned, 3)}
        return target

    def prepare_views(self, target: Target, among: Sequence[int] | None = None) -> None:
        """Bring the contexts to a target, or lay it beside them as it is; once.

        Args:
            target: a target.
            among: numbers of the contexts that may serve it; None for all.
        """
        if target.views:
            return
        if self.aligned is None:
            target.show_as_it_is(self.label_values, self.context)
            return
        eligible = self._eligible(target)
        if among is not None:
            eligible = {value: [i for i in pool if i in among] for value, pool in eligible.items()}
        self.aligned.prepare(target, self.label_values, eligible)

    def forget_encoded(self) -> None:
        """Drop what was encoded of the contexts: the network's weights have changed."""
        self._passes = None

    def on_grid(self, target: Target) -> Tensor:
        """A target's scores on its preprocessed image, ``(1, K, h, w, d)``; 0 outside of every view."""
        placed = target.scores_by_label()
        return torch.stack([resampled(placed[value], target.image) for value in self.label_values])[None]

    def members_of(self, target: Target, among: Sequence[int] | None = None) -> dict[int, list[int]]:
        """Numbers of the contexts that serve a target, by label; none where it is the only one that has it.

        Args:
            target: with its views.
            among: numbers of the contexts that may be used; None for all.
        """
        members = {}
        for value, pool in self._eligible(target).items():
            aligned = value not in target.as_it_is
            pool = [i for i in pool if (i in target.aligned or not aligned) and (among is None or i in among)]
            similarity = self._similarity(target, aligned) if self.context.chooses else None
            members[value] = self.context.choose(pool, similarity)
        return members

    def _similarity(self, target: Target, aligned: bool) -> Tensor:
        """Of each context to a target: after alignment, or as they are."""
        if not aligned:
            return self.context.similarity(target.image)
        return torch.tensor([target.aligned.get(i, -1.0) for i in range(len(self.context))])

    def parts(self, target: Target, network: torch.nn.Module, members: Members) -> list[Parts]:
        """What network and contexts say in each view of a target, on the CPU.

        Args:
            target: with its views.
            network: runs the windows.
            members: numbers of the contexts to use, by label.
        """

        def of_window(window: Tensor, episodes: Episodes, asked: Members) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                return self._window_scores(window.to(self.device), network, episodes, asked, target.on_label).cpu()

        with torch.no_grad():
            return [view.parts({v: members[v] for v in view.values}, of_window, self.overlap) for view in target.views]

    def to_native(self, target: Target) -> Target:
        """Bring a target's scores to its own voxels: its ``prediction``, as :meth:`predict` returns it."""
        preprocessing, started = self.context.preprocessing, time.monotonic()
        if self.task == "segmentation":
            target.prediction = preprocessing.to_native_labels(target.scores_by_label())
        else:
            low, high = self.context.output_range
            found = target.scores_by_label()[1]
            native = preprocessing.to_native(found.scores.clamp(0, 1)[None], found.target)
            native.as_tensor().mul_(high - low).add_(low)  # in place: at native resolution a copy is another scan
            target.prediction = native
        target.seconds["native"] = round(time.monotonic() - started, 3)
        return target

    def _window_scores(
        self, window: Tensor, network: torch.nn.Module, episodes: Episodes, members: Members, on_label: OnLabel | None
    ) -> Tensor:
        if isinstance(network, Neuroverse3D):
            return self._passes_of(network, episodes).scores(window, members, on_label)
        scores = []
        for value, chosen in members.items():
            if chosen:
                images, wanted = (part[None] for part in episodes.episode(chosen, value))
                shown = episodes.shown(window, value)
                scores.append(network(shown, images, wanted, mini_context_size=self.mini_context_size or 1).float())
            else:
                scores.append(torch.zeros_like(window))
            if on_label is not None:
                on_label(value, len(scores), len(members))
        return torch.cat(scores, dim=1)

    def _passes_of(self, network: Neuroverse3D, episodes: Episodes) -> Passes:
        """Passes that keep what serves all targets, if the contexts are the same for all of them."""
        if not isinstance(episodes, ContextSet):
            return Passes(network, episodes, self.mini_context_size, 0, self.amp)
        if self._passes is None or self._passes.network is not network or self._passes.context is not episodes:
            self._passes = Passes(network, episodes, self.mini_context_size, self.cache_mb, self.amp)
        return self._passes

    def _eligible(self, target: Target) -> dict[int, list[int]]:
        """Numbers of the contexts that have a label and are not the target itself, by label."""
        itself = self.context.of_same_subject(target.digest)
        found = {}
        for value in self.label_values:
            on_grid = self.aligned is None or value in target.as_it_is
            found[value] = [i for i in self.context.holding(value, on_grid) if i not in itself]
        return found

    def _log_contexts(self, target: Target, members: Members) -> None:
        for value, pool in self._eligible(target).items():
            if not pool:
                which = "" if self.task == "generation" else f" with label {value}"
                logger.warning("there is no context%s but the target itself: its prediction is empty", which)
        if self.context.chooses:
            for chosen in dict.fromkeys(map(tuple, members.values())):
                values = [value for value, numbers in members.items() if tuple(numbers) == chosen]
                similarity = self._similarity(target, values[0] not in target.as_it_is)
                served, names = ", ".join(map(str, values)), self.context.names
                shown = ", ".join(f"{names[i]} ({similarity[i]:.2f})" for i in chosen)
                logger.info("most similar contexts for label %s: %s", served, shown)


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
        voxels = torch.as_tensor(array if isinstance(array, Tensor) else np.ascontiguousarray(array))
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


class LoadTargetd(MapTransform):
    """A case of a folder -> its target, read once (``ICLInferer.target``).

    Args:
        keys: the image's path; its place takes the preprocessed image.
        predictor: the predictor.
        name_key: the case's name.
        target_key: where the target goes.
    """

    def __init__(
        self, keys: Hashable, predictor: ICLInferer, name_key: str = "case", target_key: str = "target"
    ) -> None:
        super().__init__(keys)
        self.predictor = predictor
        self.name_key = name_key
        self.target_key = target_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``image`` path -> ``image`` ``(1, h, w, d)`` and ``target``.

        Raises:
            VolumeError: the file cannot be used.
        """
        (key,) = self.keys
        name = str(data[self.name_key]) if self.name_key in data else strip_ending(data[key]) or ""
        target = self.predictor.target(data[key], name, data)
        return {**data, key: target.image, self.target_key: target}


class ToNatived(MapTransform):
    """Scores -> the prediction on the target's own voxels (``ICLInferer.to_native``).

    Args:
        keys: where the prediction goes.
        predictor: the predictor.
        target_key: the target, with its scores.
    """

    def __init__(self, keys: Hashable, predictor: ICLInferer, target_key: str = "target") -> None:
        super().__init__(keys)
        self.predictor = predictor
        self.target_key = target_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key: ``(1, H, W, D)``, named for its file."""
        target = self.predictor.to_native(data[self.target_key])
        target.prediction.meta["filename_or_obj"] = f"{target.name}.nii.gz"
        return {**data, **{key: target.prediction for key in self.keys}}
