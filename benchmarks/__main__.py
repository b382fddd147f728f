"""List of the benchmarks: ``python -m benchmarks``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

SUBJECTS = ("network", "loading", "product", "pretrained", "confidence", "registration", "tuning", "apps", "on_device")


def works() -> Iterator[tuple[str, Any]]:
    """Name, as the record has it, and function of every benchmark."""
    for subject in SUBJECTS:
        for name, function in import_module(f"benchmarks.{subject}").WORKS.items():
            yield f"{subject} {name}", function


def listing() -> str:
    """Every benchmark with what it measures, in a line each."""
    lines = [f"{name:24s} {first_line(function)}" for name, function in works()]
    return "\n".join(["python -m benchmarks.SUBJECT WORK [--help]", "", *lines])


def first_line(documented: object) -> str:
    """Of a docstring."""
    return inspect.getdoc(documented).splitlines()[0]


if __name__ == "__main__":
    print(listing())
