"""What is packaged for the application: weights, the context set and settings, and the predictor that they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.apps.deploy.segments import Segment, describe_segments
from scripts.checkpoint import load_weights
from scripts.data.files import read_json
from scripts.data.nnunet import NnunetDataset
from scripts.inference.confidence import ConfidentInferer
from scripts.inference.contexts import ContextSet
from scripts.runtime.commandline import refuse_unknown
from scripts.runtime.options import flag, normalise
from scripts.runtime.output_folder import file_sha256
from scripts.runtime.workflow import plain_errors, start_workflow

WEIGHTS = "model.pt"
CONTEXTS = "contexts"
OPTIONS = "options.json"
SEGMENTS = "segments.json"
SERIES = "series.json"
PACKAGED = "packaged.json"
TUNING = "tuning.json"

WRITE_FLAGGED = "write_flagged"
"""The application's own option: false writes no segmentation of a series that is unlike every context."""

MAY_BE_SET = (
    "labels",
    "context_size",
    "context_selection",
    "channel",
    "align",
    "evidence",
    "refine",
    "spacing",
    "mini_context_size",
    "cache_mb",
    "amp",
    "seed",
    "device",
)
"""Options of ``inference.json`` that the application takes."""

ANY_MR_SERIES = {"selections": [{"name": "MR", "conditions": {"Modality": "^MR$"}}]}
"""Which series are segmented unless ``series.json`` says otherwise, as the SDK's series selector reads it."""


def make_predictor(weights: Path, context_dir: Path, options: Mapping[str, Any]) -> ConfidentInferer:
    """The predictor of ``configs/inference.json``, with weights and contexts; no file is written.

    Args:
        weights: checkpoint.
        context_dir: nnU-Net dataset folder with the context pairs.
        options: of :data:`MAY_BE_SET`.

    Raises:
        ValueError: an unknown option, a senseless value, or contexts or weights that are not usable.
        FileNotFoundError: no weights or no contexts.
    """
    refuse_unknown(list(options), dict.fromkeys(MAY_BE_SET))
    given = {name: normalise(name, value) for name, value in options.items()}
    given |= {
        "checkpoint": str(weights),
        "context_dir": str(context_dir),
        "record": None,
        "recorded_amp": None,
        "context#similar_record": None,
        "predictor#alignment_record": None,
    }
    workflow = start_workflow("inference.json", given)
    with plain_errors():
        inferer = workflow.parser.get_parsed_content("inferer")
    load_weights(inferer.predictor.network, weights)
    _ = inferer.label_values  # reads the contexts
    return inferer


def context_set_sha256(context: ContextSet) -> str:
    """Changes with the pairs, the grid, or how a target's contexts are chosen."""
    return hashlib.sha256(context.fingerprint.encode()).hexdigest()


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``model.pt``, ``contexts/`` (an nnU-Net dataset) and, as far as needed, settings.

    Settings are ``options.json`` (of ``inference.json``), ``segments.json`` (codes of the labels), ``series.json``
    (which series is taken), ``packaged.json`` (hashes that weights and contexts must have) and ``tuning.json`` (the
    report, where the weights were tuned on these contexts).

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def find(cls, path: str | Path) -> ModelFolder:
        """The folder itself, or its only sub-folder with weights, which is where a package has it.

        Raises:
            FileNotFoundError: there is none, or more than one.
        """
        path = Path(path)
        inside = sorted(p.parent for p in path.glob(f"*/{WEIGHTS}"))
        found = [path] if (path / WEIGHTS).is_file() else inside
        if len(found) != 1:
            there = f", but {', '.join(p.name for p in found)} have" if found else ""
            raise FileNotFoundError(f"{path} has no {WEIGHTS}{there}: give --model a folder with weights and contexts")
        if not (found[0] / CONTEXTS).is_dir():
            raise FileNotFoundError(f"{found[0]} has no {CONTEXTS}: put an nnU-Net dataset folder with the pairs there")
        return cls(found[0])

    @property
    def weights(self) -> Path:
        """The checkpoint."""
        return self.path / WEIGHTS

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``inference.json`` that are not at their defaults, and perhaps :data:`WRITE_FLAGGED`."""
        return self._read(OPTIONS, {})

    @property
    def write_flagged(self) -> bool:
        """Whether a segmentation is written of a series that is unlike every context.

        Raises:
            ValueError: the option is neither true nor false.
        """
        try:
            return flag(self.options.get(WRITE_FLAGGED, True))
        except ValueError as error:
            raise ValueError(f"{self.path / OPTIONS}: {WRITE_FLAGGED}: {error}") from None

    @property
    def series_rules(self) -> str:
        """JSON text for the SDK's series selector."""
        return json.dumps(self._read(SERIES, ANY_MR_SERIES))

    def predictor(self) -> ConfidentInferer:
        """The predictor that the folder makes.

        Raises:
            ValueError: as :func:`make_predictor`; weights or contexts are not those that were packaged.
            FileNotFoundError: as :func:`make_predictor`.
        """
        options = {name: value for name, value in self.options.items() if name != WRITE_FLAGGED}
        inferer = make_predictor(self.weights, self.path / CONTEXTS, options)
        found = self.hashes(inferer)
        changed = [name for name, packaged in self._read(PACKAGED, found).items() if found.get(name) != packaged]
        if changed:
            raise ValueError(f"{self.path}: not as it was packaged ({', '.join(changed)}): package it anew")
        inferer.predictor.tuned = self._read(TUNING, {}) or None
        return inferer

    def hashes(self, inferer: ConfidentInferer) -> dict[str, str]:
        """SHA-256 of the weights and of the context set."""
        return {
            "weights_sha256": file_sha256(self.weights),
            "context_set_sha256": context_set_sha256(inferer.context),
        }

    def segments(self, inferer: ConfidentInferer) -> list[Segment]:
        """The segments that predictions have, in the order of :attr:`ConfidentInferer.label_values`.

        Raises:
            ValueError: as :func:`describe_segments`.
        """
        classes = NnunetDataset.read(self.path / CONTEXTS).classes
        names = {values[0]: name for name, values in classes.items() if len(values) == 1}
        file = self.path / SEGMENTS
        return describe_segments(inferer.label_values, names, file if file.is_file() else None)

    def _read(self, name: str, default: dict[str, Any]) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return default
        return read_json(file, dict, "it must hold one JSON object")
