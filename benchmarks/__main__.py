"""List of the benchmarks: ``python -m benchmarks``."""

from __future__ import annotations

import inspect
from importlib import import_module

SUBJECTS = (
    "network",
    "training",
    "loading",
    "product",
    "pretrained",
    "confidence",
    "registration",
    "tuning",
    "apps",
    "on_device",
)


def listing() -> str:
    """Every benchmark with what it measures, in a line each."""
    lines = ["python -m benchmarks.SUBJECT WORK [--help]"]
    for subject in SUBJECTS:
        module = import_module(f"benchmarks.{subject}")
        lines += ["", f"{subject}: {first_line(module)}"]
        lines += [f"  {name:14s} {first_line(function)}" for name, function in module.WORKS.items()]
    return "\n".join(lines)


def first_line(documented: object) -> str:
    """Of a docstring."""
    return inspect.getdoc(documented).splitlines()[0]


if __name__ == "__main__":
    print(listing())
