"""The page of all options, docs/options.md, from what the program itself goes by.

Workflows have theirs in their configuration and in :data:`scripts.runtime.options.OPTIONS`, tools in the signature
and docstring of their function, the BIDS App in :data:`scripts.apps.bids.__main__.APP_OPTIONS`, collection files in
:class:`scripts.data.rows.Row`::

    python -m scripts.apps.command.option_tables
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from pydoc import locate
from typing import NamedTuple

from fire import docstrings

from scripts.apps.bids.__main__ import APP_OPTIONS
from scripts.apps.command.verbs import VERBS
from scripts.data.rows import Row
from scripts.runtime.options import OPTIONS, default_text

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "options.md"
STAGES = ("train stage1", "train stage2")

_HEAD = """# Options

For research use only.

`make docs` writes this page from the configurations and the tools' own descriptions; `--help` prints the same. \
`None` stands for what is not set, a dash for what has to be given. All take `--help true` and `--debug true` \
(full tracebacks).

An option is given as `--name value`, behind a verb of [`neuroverse3d`](command.md) as well. Booleans are `true` or \
`false`; lists are quoted: `--channels "[16,32,64,128]"`. A misspelt option ends the run, and the nearest valid one is \
named. Every other id of a configuration can be overridden by its path: `--loss#beta 0.5`. `overwrite` replaces what \
this program wrote and nobody changed, nothing else.
"""
_TOOLS = {  # heading: what is typed behind python -m, and the function that it runs
    name: (verb.module, f"{verb.module}.{verb.module.rpartition('.')[2]}")
    for name, verb in VERBS.items()
    if verb.module.count(".") == 1 and verb.module.startswith("scripts.") and name != "checkpoint"
}
_TOOLS |= {
    f"checkpoint {name}": (f"scripts.checkpoint {name}", f"scripts.checkpoint.commands.{name}")
    for name in ("convert", "export", "compact", "download")
}
_TOOLS |= {"deploy": ("scripts.apps.deploy.stage", "scripts.apps.deploy.stage.stage")}


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    seen: dict[_Entry, str] = {}
    for name, verb in VERBS.items():
        if not verb.is_workflow or name == STAGES[1]:
            continue
        heading = "train" if name in STAGES else name
        configs = [Path(VERBS[stage].first[-1]) for stage in (STAGES if name in STAGES else (name,))]
        rows = list(_workflow(*configs))
        source = "`, `".join(f"configs/{config.name}" for config in configs)
        parts.append(_section(heading, source, [row for row in rows if row not in seen]))
        for known in dict.fromkeys(seen[row] for row in rows if row in seen):
            names = ", ".join(row.option for row in rows if seen.get(row) == known)
            parts.append(f"As with [{known}](#{known}): {names}.\n")
        seen |= {row: heading for row in rows if row not in seen}
    parts.append(_section("bids", "neuroverse3d bids", _app()))
    parts.append("Besides: options of [segment](#segment) that do not choose scans, examples or outputs.\n")
    for name, (typed, function) in _TOOLS.items():
        parts.append(_section(name, f"python -m {typed}", _tool(locate(function))))
    parts.append(_section("rows of a collection", "--collection_file", _keys()))
    return "\n".join(parts)


class _Entry(NamedTuple):
    option: str
    default: str
    meaning: str


def _section(name: str, source: str, rows: Iterable[_Entry]) -> str:
    lines = "\n".join(f"| {' | '.join(row)} |" for row in (_Entry._fields, ("---",) * 3, *rows))
    return f"## {name}\n\n`{source}`\n\n{lines}\n"


def _workflow(*configs: Path) -> Iterator[_Entry]:
    """Rows of a configuration, or of that of several stages."""
    first, *later = (json.loads(config.read_text(encoding="utf-8")) for config in configs)
    for name in first:
        if name in OPTIONS and name not in ("help", "debug"):
            default = default_text(name, first[name])
            for number, content in enumerate(later, 2):
                if (other := default_text(name, content[name])) != default:
                    default += f"; stage {number}: {other}"
            yield _Entry(f"`{name}`", default, OPTIONS[name].meaning)


def _app() -> Iterator[_Entry]:
    for name, facts in APP_OPTIONS.items():
        default = "false" if "action" in facts else str(facts.get("default"))
        yield _Entry(f"`{name}`", default, facts["help"])


def _tool(function: Callable[..., None]) -> Iterator[_Entry]:
    said = {argument.name: argument.description for argument in docstrings.parse(function.__doc__).args}
    for name, parameter in inspect.signature(function).parameters.items():
        value = parameter.default
        default = "–" if value is parameter.empty else str(value).lower() if isinstance(value, bool) else str(value)
        yield _Entry(f"`{name}`", default, said[name].rstrip(".").replace("``", "`"))


def _keys() -> Iterator[_Entry]:
    said = docstrings.parse(Row.__doc__.replace("Attributes:", "Args:")).args
    for key, argument in zip(fields(Row), said, strict=True):
        default = "–" if key.default is MISSING else json.dumps(key.default)
        yield _Entry(f"`{key.name}`", default, argument.description.rstrip(".").replace("``", "`"))


def write_options() -> None:
    """Write ``docs/options.md``."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(write_options)
