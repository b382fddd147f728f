"""Whose fault an error is, and how to say it in a line."""

from __future__ import annotations

import errno
from collections.abc import Iterator

FOLDER_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What is wrong with the output folder rather than with a case."""

_REASON_LENGTH = 300


def reason_of(error: BaseException) -> str:
    """One line on what went wrong, without the wrappers that MONAI puts around an error in a transform."""
    cause = error
    while isinstance(cause, RuntimeError) and cause.__cause__ and str(cause).startswith("applying transform"):
        cause = cause.__cause__
    lines = str(cause).strip().splitlines() or [""]
    known = isinstance(cause, (ValueError, OSError))
    text = lines[0] if known else f"{type(cause).__name__}: {lines[0]}".removesuffix(": ")
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 1] + "…"


def folder_fault(error: BaseException) -> OSError | None:
    """What led to an error if it was the output folder; None if it was not."""
    found = (cause for cause in _causes(error) if isinstance(cause, OSError) and cause.errno in FOLDER_ERRORS)
    return next(found, None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what led to it, down to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
