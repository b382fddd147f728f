"""The page of all options, docs/options.md, from what the program itself goes by.

Workflows have theirs in their configuration and in :data:`scripts.runtime.options.OPTIONS`, tools in the signature
and docstring of their function::

    python -m scripts.apps.command.option_tables
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc import locate

from fire import docstrings

from scripts.apps.command.verbs import VERBS
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
this program wrote and nobody changed, nothing else. The [BIDS App](bids.md#options) has options of its own.
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
    for name, verb in VERBS.items():
        if name == STAGES[0]:
            parts.append(_section("train", "configs/train_stage1.json`, `configs/train_stage2.json", _stages()))
        elif verb.is_workflow and name not in STAGES:
            config = Path(verb.first[-1])
            parts.append(_section(name, f"configs/{config.name}", _workflow(config)))
    for name, (typed, function) in _TOOLS.items():
        parts.append(_section(name, f"python -m {typed}", _tool(locate(function))))
    return "\n".join(parts)


def _section(name: str, source: str, rows: Iterator[tuple[str, ...]]) -> str:
    found = list(rows)
    columns = ("option", "default", "meaning") if len(found[0]) == 3 else ("option", "stage 1", "stage 2", "meaning")
    lines = [columns, ("---",) * len(columns), *found]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {name}\n\n`{source}`\n\n{table}\n"


def _read(config: Path) -> dict[str, object]:
    content = json.loads(config.read_text(encoding="utf-8"))
    return {name: content[name] for name in content if name in OPTIONS and name not in ("help", "debug")}


def _workflow(config: Path) -> Iterator[tuple[str, ...]]:
    for name, value in _read(config).items():
        yield f"`{name}`", default_text(name, value), OPTIONS[name].meaning


def _stages() -> Iterator[tuple[str, ...]]:
    first, second = (_read(Path(VERBS[name].first[-1])) for name in STAGES)
    for name in first:
        yield f"`{name}`", default_text(name, first[name]), default_text(name, second[name]), OPTIONS[name].meaning


def _tool(function: Callable[..., None]) -> Iterator[tuple[str, ...]]:
    said = {argument.name: argument.description for argument in docstrings.parse(function.__doc__).args}
    for name, parameter in inspect.signature(function).parameters.items():
        value = parameter.default
        default = "–" if value is parameter.empty else str(value).lower() if isinstance(value, bool) else str(value)
        yield f"`{name}`", default, said[name].rstrip(".").replace("``", "`")


def write_options() -> None:
    """Write ``docs/options.md``."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    from scripts.runtime.commandline import main

    main(write_options)
