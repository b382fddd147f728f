"""Errors as HTTP statuses: MONAI Label reports every one of them as 500, without a reason."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import HTTPException
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException

from scripts.checkpoint import CheckpointError
from scripts.runtime.memory import is_out_of_memory


class NotFoundError(ValueError):
    """What a request names is not there."""


class AlreadyThereError(ValueError):
    """What a request would add is there, and is not replaced."""


class TooFewAnnotationsError(ValueError):
    """There are not enough finished annotations for what is asked."""


class SameScanError(TooFewAnnotationsError):
    """The finished annotations are of the very scan that is asked for."""


class WeightsError(RuntimeError):
    """The weights cannot be used; what a request asks for has nothing to do with it."""


_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (ImageNotFoundException, 404),
    (LabelNotFoundException, 404),
    (AlreadyThereError, 409),
    (TooFewAnnotationsError, 409),
    (WeightsError, 503),
    (CheckpointError, 503),
    (MONAILabelException, 400),
    (ValueError, 422),
    (IsADirectoryError, 422),
    (NotADirectoryError, 422),
    (OSError, 503),
)
"""The first that fits counts."""

KINDS = tuple(kind for kind, _ in _STATUSES)
"""Errors that have a status."""


@contextmanager
def clear_statuses() -> Iterator[None]:
    """Turn known errors into an HTTP status and one line of reason.

    404 nothing of that name, 409 too few annotations, or a name that is taken, 422 a scan, annotation or parameter that
    cannot be used, 503 weights, memory or disk. Anything else is a fault of the program and stays a 500 with a
    traceback in the log.

    Raises:
        HTTPException: for a known error.
    """
    try:
        yield
    except HTTPException:
        raise
    except Exception as error:
        status = next((status for kind, status in _STATUSES if isinstance(error, kind)), None)
        status = 503 if status is None and is_out_of_memory(error) else status
        status = 422 if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG else status
        if status is None:
            raise
        raise HTTPException(status, getattr(error, "msg", None) or str(error)) from error
