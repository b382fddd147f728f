"""The bundle's predictor around the annotations that are finished, kept until they change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.apps.monailabel.annotations import Annotated, Annotations, name_of_file
from scripts.apps.monailabel.model_folder import CURRENT, ModelFolder
from scripts.apps.monailabel.statuses import SameScanError, TooFewAnnotationsError, WeightsError
from scripts.checkpoint import load_weights
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.target import Target
from scripts.runtime.manifest import ROOT
from scripts.runtime.options import OPTIONS, normalise
from scripts.runtime.workflow import give, plain_errors, start_workflow

DEFAULTS: dict[str, Any] = {"context_selection": "similar", "mini_context_size": 1}
"""Where the app differs from ``inference.json``: contexts are chosen for each scan, and with pairs that run one by
one what is kept of one serves every scan, whichever contexts go with it."""

_OWN = {"dataset_dir", "target_images", "context_dir", "context_images", "context_labels", "context_file",
        "checkpoint", "output_dir", "split_file", "fold", "subject_pattern", "target_split", "shard", "overlays",
        "probabilities", "overwrite", "task", "self_test", "tune", "skip_bad_cases", "channel",
        "context_label_channel", "help", "debug"}  # fmt: skip
"""Options of ``inference.json`` that the app decides on, or that are of no use to it."""

_KEPT = 2
"""Predictors in memory: the one for new scans, and that for the last scan that is annotated itself."""


def app_options(conf: Mapping[str, str]) -> dict[str, Any]:
    """Options of ``inference.json`` among an app's settings.

    Args:
        conf: from ``monailabel start_server --conf NAME VALUE``; other names are MONAI Label's.

    Raises:
        ValueError: a value makes no sense, or it is an option that the app itself decides on.
    """
    known = ConfigParser.load_config_file(str(ROOT / "configs" / "inference.json"))
    given = {name: value for name, value in conf.items() if name in OPTIONS and name in known}
    if refused := sorted(given.keys() & _OWN):
        raise ValueError(f"--conf {refused[0]} cannot be set: the app decides on it")
    return DEFAULTS | {name: normalise(name, DefaultParseValue(value)) for name, value in given.items()}


@dataclass(frozen=True)
class Prepared:
    """A predictor for one target.

    Attributes:
        predictor: of the bundle, with its context set.
        annotated: the annotations that may serve.
        weights: the file they were read from.
    """

    predictor: ConfidentInferer
    annotated: Annotated
    weights: Path

    def predict(self, image: str) -> Target:
        """The target with its prediction, and with ``warnings`` for its reader.

        Raises:
            SameScanError: it is in all annotations, under another name.
            ValueError: the file cannot be used.
        """
        target = self.predictor.complete(self.predictor.target(image))
        warnings = self.predictor.context.warnings(self.predictor.label_values)
        if alone := [str(label) for label, used in target.used.items() if not used]:
            if len(alone) == len(target.used) and not target.doubt:
                raise SameScanError("the finished annotations are of this very scan: annotate another one")
            warnings.append(f"no other scan has label {', '.join(alone)}: left empty")
        elif not target.prediction.any():
            warnings.append("nothing was found: the prediction is all background")
        target.warnings = [*warnings, *target.warnings]
        return target


class Predictors:
    """``inference.json`` with the finished annotations as its contexts.

    A predictor, with what it has read and encoded of its contexts, is kept until an annotation is added, removed or
    saved again, or other weights are asked for; the next one takes over what is still true. What is kept is bounded
    by ``cache_mb`` for each of two predictors.

    Args:
        annotations: where contexts come from.
        model_folder: where weights come from.
        options: of ``inference.json``.
    """

    def __init__(self, annotations: Annotations, model_folder: ModelFolder, options: Mapping[str, Any]) -> None:
        self.annotations = annotations
        self.model_folder = model_folder
        self.options = dict(options)
        self._lock = threading.Lock()  # a predictor serves one target at a time
        self._workflow: tuple[Any, ConfigWorkflow] | None = None
        self._kept: OrderedDict[Any, ConfidentInferer] = OrderedDict()

    @contextmanager
    def for_target(self, image: str | Path, weights: str = CURRENT) -> Iterator[Prepared]:
        """The predictor for a scan, for the time of the context; others wait meanwhile.

        Its contexts are all finished annotations but the scan's own.

        Args:
            image: path of the scan.
            weights: name of the weights in the model folder.

        Raises:
            TooFewAnnotationsError: no other scan is annotated.
            NotFoundError: no weights of that name.
            WeightsError: the weights cannot be used.
        """
        with self._lock:
            path = self.model_folder.named(weights)
            annotated = self.annotations.besides(image)
            if not any(case["values"] for case in annotated.cases):
                raise TooFewAnnotationsError(_too_few(annotated))
            members = tuple((name_of_file(case["image"]), name_of_file(case["label"])) for case in annotated.cases)
            key = (name_of_file(path), members)
            if key not in self._kept:
                self._kept[key] = self._make(path, annotated)
            predictor = self._kept[key]
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            yield Prepared(predictor, annotated, path)

    def _make(self, weights: Path, annotated: Annotated) -> ConfidentInferer:
        """``inference.json``'s predictor around these annotations; pairs that are known already are not read again."""
        parser = self._configuration(weights).parser
        contexts = {
            "context_images": [case["image"] for case in annotated.cases],
            "context_labels": [case["label"] for case in annotated.cases],
        }
        give(parser, contexts)
        made = parser.get_parsed_content("inferer")
        for earlier in reversed(self._kept.values()):
            made.predictor.take_over(earlier.predictor)
        return made

    def _configuration(self, weights: Path) -> ConfigWorkflow:
        """``inference.json`` with a network that has these weights; of one file at a time."""
        file = name_of_file(weights)
        if self._workflow is None or self._workflow[0] != file:
            self._workflow = None
            self._kept.clear()
            given = {
                "checkpoint": str(weights),
                "output_dir": str(self.model_folder.folder),  # for the records of what was found in files
            }
            try:
                workflow = start_workflow("inference.json", self.options | given)
                with plain_errors():
                    network = workflow.parser.get_parsed_content("network")
                load_weights(network, weights)
            except (RuntimeError, ValueError, OSError) as error:
                raise WeightsError(str(error)) from error
            give(workflow.parser, {"network": network})
            self._workflow = file, workflow
        return self._workflow[1]


def _too_few(annotated: Annotated) -> str:
    reason = "no finished annotation to go by"
    if annotated.cases:
        reason = "no label other than background in the finished annotations"
    lines = [f"{reason}: annotate a scan by hand and save it (Submit Label), and propose again", *annotated.left_out]
    return "; ".join(lines)
