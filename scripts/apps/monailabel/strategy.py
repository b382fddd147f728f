"""Which scan to annotate next: the one that the model is least sure about."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.random import Random

from scripts.apps.monailabel.predictors import Predictors
from scripts.apps.monailabel.statuses import SameScanError, TooFewAnnotationsError
from scripts.apps.monailabel.uploads import setting
from scripts.data.volumes import VolumeError

logger = logging.getLogger(__name__)

CANDIDATES = 16
"""Scans that are predicted for one choice, unless the request says otherwise."""


class LeastConfident(Strategy):
    """Proposes the scan whose prediction holds least firmly (``agreement`` of ``ConfidentInferer``, mean over labels).

    Scans that were never proposed come first, then those proposed longest ago, so that one that was passed over does
    not come again at once. Of many, an evenly spread part is predicted. Without any annotation the choice is random.

    Args:
        predictors: what predicts.
    """

    def __init__(self, predictors: Predictors) -> None:
        super().__init__("The scan that the model is least sure about")
        self.predictors = predictors
        self._random = RandomReadable()

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose.

        Args:
            request: ``strategy`` (the name this has), and perhaps ``candidates``, how many scans to look at.
            datastore: of the scans.

        Returns:
            ``id`` of a scan without finished annotation, and its ``agreement``; None if there is none that can be read.
        """
        waiting = sorted(datastore.get_unlabeled_images())
        proposed = {image: _last_proposed(datastore, image, request["strategy"]) for image in waiting}
        count = setting("candidates", "val_groups", request.get("candidates") or CANDIDATES)
        try:
            for time in sorted(set(proposed.values())):
                pool = [image for image in waiting if proposed[image] == time]
                picks = np.unique(np.linspace(0, len(pool) - 1, count).round().astype(int))
                if found := self._agreements([pool[i] for i in picks], datastore):
                    chosen = min(found, key=found.get)
                    return {"id": chosen, "agreement": round(found[chosen], 4), "looked_at": len(found)}
        except TooFewAnnotationsError:
            return self._random(request, datastore)
        return None

    def _agreements(self, images: Sequence[str], datastore: Datastore) -> dict[str, float]:
        """By id, of the images that can be predicted.

        Raises:
            TooFewAnnotationsError: there is nothing to predict from.
        """
        found = {}
        for image in images:
            try:
                path = datastore.get_image_uri(image)
                with self.predictors.for_target(path) as prepared:
                    agreement = prepared.predict(path).confidence["agreement"]
                    found[image] = float(np.mean(list(agreement.values())))
            except ValueError as error:
                if isinstance(error, TooFewAnnotationsError) and not isinstance(error, SameScanError):
                    raise
                logger.warning("%s is not proposed: %s", image, error)
        return found


class RandomReadable(Random):
    """MONAI Label's random choice, of the scans that can be read."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose; None if there is no scan that can be read."""
        while found := super().__call__(request, datastore):
            try:
                datastore.get_image_uri(found["id"])
                return found
            except VolumeError as error:  # which the datastore does not offer again
                logger.warning("%s is not proposed: %s", found["id"], error)
        return None


def _last_proposed(datastore: Datastore, image: str, strategy: str) -> int:
    """When this strategy proposed a scan, in seconds since 1970; 0 if it never did."""
    found: Any = datastore.get_image_info(image)
    for name in ("strategy", strategy, "ts"):  # a client may have put anything there
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else 0
