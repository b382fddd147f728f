"""Workflows of the bundle with values that MONAI's parser never reads.

In a configuration ``$...`` is code, ``@...`` a reference, ``%...`` a macro and ``#`` a separator, in nested lists and
dicts as well. Names of files, cases and labels, and what a client sends, may be such text. They are *given* to a
workflow: each stands for an id of the configuration, as the object that it is.

Command line, for :mod:`scripts.reproduce`::

    python -m scripts.runtime.workflow --config_file CONFIG.json --given_file GIVEN.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

from scripts.runtime.commandline import main, root_cause
from scripts.runtime.manifest import ROOT

_PACKAGE = (__spec__.name if __name__ == "__main__" else __name__).removesuffix("scripts.runtime.workflow")
"""What stands in front of ``scripts`` where this is ``neuroverse3d.scripts``: configurations say it without."""
_OWN = re.compile(r"(?<![\w.])scripts\.")
_INERT = "$None"  # the parser asks its resolver for what expressions stand for, but not for constants


class GivenValues(ReferenceResolver):
    """MONAI's resolver, for which some ids are resolved from the beginning.

    Attributes:
        given: id -> value; ids are separated by ``::``.
    """

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        super().__init__()

    def reset(self) -> None:
        """Forget everything but what is given."""
        super().reset()
        self.resolved_content = dict(self.given)

    def is_resolved(self) -> bool:
        """Whether the configuration was looked through; the base class goes by what is resolved."""
        return bool(self.items)


def give(parser: ConfigParser, values: Mapping[str, Any]) -> None:
    """Let values stand for ids of a configuration as they are.

    Args:
        parser: of the configuration.
        values: by id; nested ids are separated by ``#``.

    Raises:
        ValueError: the configuration has no such id.
    """
    if not isinstance(parser.ref_resolver, GivenValues):
        parser.ref_resolver = GivenValues()
    for name, value in values.items():
        if name not in parser:
            raise ValueError(f"the configuration has no {name}")
        parser[name] = _INERT
        parser.ref_resolver.given[ReferenceResolver.normalize_id(name)] = value
    parser.ref_resolver.reset()


class _Workflow(ConfigWorkflow):
    """MONAI's workflow, which leaves Python's search path as it was: a program may have a ``scripts`` of its own."""

    def run(self) -> Any:
        """Run the workflow."""
        places = list(sys.path)
        try:
            return super().run()
        finally:
            sys.path[:] = places


def start_workflow(
    config_file: str | Path, given: Mapping[str, Any], logging_file: str | Path | None = None
) -> ConfigWorkflow:
    """A workflow that is initialised, and that runs whatever the working directory is.

    Args:
        config_file: of the bundle, such as ``inference.json``, or a path.
        given: values by id, see :func:`give`. They have the type that their option has, as
            :func:`scripts.runtime.options.normalise` returns it.
        logging_file: sets logging up; None leaves it as it is.

    Raises:
        ValueError: an unknown id, or what the workflow's ``initialize`` refuses.
        OSError: as that.
    """
    path = ROOT / "configs" / config_file
    workflow = _Workflow(
        str(path),
        workflow_type="train" if "train" in ConfigParser.load_config_file(str(path)) else "infer",
        logging_file=str(logging_file) if logging_file else False,
    )
    if _PACKAGE:
        workflow.parser.set(_in_package(workflow.parser.config))
    give(workflow.parser, {"bundle_root": str(ROOT)} | dict(given))
    with plain_errors():
        workflow.initialize()
    return workflow


def _in_package(config: Any) -> Any:
    """A configuration whose targets and expressions name the modules of the installed package."""
    if isinstance(config, Mapping):
        return {name: _in_package(value) for name, value in config.items()}
    if isinstance(config, list):
        return [_in_package(value) for value in config]
    return _OWN.sub(f"{_PACKAGE}scripts.", config) if isinstance(config, str) else config


@contextmanager
def plain_errors() -> Iterator[None]:
    """Errors of a configuration's components and expressions as they were raised, without MONAI's wrappers."""
    try:
        yield
    except RuntimeError as error:
        cause = root_cause(error)
        if cause is error:
            raise
        raise cause from error


def run_given(config_file: str, given_file: str, logging_file: str | None = None) -> None:
    """Run a workflow to its end.

    Args:
        config_file: its configuration; configurations can run code.
        given_file: JSON object of values by id, taken as they are.
        logging_file: sets logging up.
    """
    given = json.loads(Path(given_file).read_text(encoding="utf-8"))
    workflow = start_workflow(config_file, given, logging_file)
    with plain_errors():
        workflow.run()
        workflow.finalize()


if __name__ == "__main__":
    main(run_given)
