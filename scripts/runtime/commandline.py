"""What a user types and sees in a terminal: one-line errors, `--help`, misspelt overrides.

:func:`start` is the first expression of every workflow's ``initialize``. Workflows made inside another
program (MONAI Label, tests) get their values normalised, but are not held against that program's own
command line.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from scripts.runtime.options import OPTIONS, default_text, flag, normalise
from scripts.runtime.termination import exit_on_sigterm

_RUN_ARGUMENTS = set(inspect.signature(__import__("monai.bundle.scripts", fromlist=["run"]).run).parameters) - {
    "override"
}  # fmt: skip
_TRACKED_LOSS = ("MLFlowHandler", "train_loss")
_SEPARATORS = re.compile(r"#|::")


def main(component: Callable | Mapping[str, Callable]) -> None:
    """Run a function, or a choice of them, as a command line through fire.

    Flags are checked first (fire would run the function and only then complain); errors end the program with
    one line and status 1, ``--debug`` shows the traceback.
    """
    import fire

    debug, arguments = _without_debug(sys.argv[1:])
    install_one_line_errors(debug)
    exit_on_sigterm()
    program = Path(sys.argv[0])
    function, name = component, program.parent.name if program.stem == "__main__" else program.stem
    verb = []
    if isinstance(component, Mapping):
        verb = [a for a in arguments[:1] if not a.startswith("-")]
        if verb and verb[0] not in component:
            raise ValueError(f"unknown command {verb[0]}{_nearest(verb[0], list(component), '')}")
        function = component[verb[0]] if verb else None
    if function is None or {"--help", "-h"} & set(arguments):
        fire.Fire(component, command=[*verb, "--", "--help"], name=name)
        return
    known = inspect.signature(function).parameters
    for flag_name, _ in _options_typed(arguments):
        if flag_name not in known and not (flag_name.startswith("no") and flag_name[2:] in known):
            raise ValueError(f"unknown option --{flag_name}{_nearest(flag_name, list(known))} (--help lists them)")
    fire.Fire(component, command=arguments, name=name)


def start() -> None:
    """Normalise the option values of the running workflow; on the command line also check and explain them.

    Raises:
        ValueError: an option's value makes no sense, or (command line only) an override is misspelt.
        SystemExit: status 0 after ``--help true``.
    """
    parser = _running_parser()
    if _is_bundle_command_line():
        install_one_line_errors(flag(parser.get("debug", False)))
        exit_on_sigterm()
        raw = ConfigParser.load_config_files(_config_files(sys.argv))
        refuse_unknown(_override_keys(sys.argv), raw | _tracking_ids(sys.argv))
        if flag(parser.get("help", False)):
            print_help(raw)
            raise SystemExit(0)
    _rename_tracked_loss(parser)
    for name in OPTIONS.keys() & parser.config.keys():
        value = parser.config[name]
        if not (isinstance(value, str) and value.startswith(("$", "@", "%"))):
            parser[name] = normalise(name, value)


def config_as_run() -> dict[str, Any]:
    """The running workflow's merged configuration, overrides included."""
    return {k: v for k, v in _running_parser().config.items() if k != "_meta_"}


def options_as_run() -> dict[str, Any]:
    """The running workflow's options with their values, expressions worked out, and what else was given to it."""
    parser = _running_parser()
    given = {name: value for name, value in getattr(parser.ref_resolver, "given", {}).items() if "::" in name}
    return {name: parser.get_parsed_content(name) for name in OPTIONS if name in parser.config} | given


def install_one_line_errors(debug: bool) -> None:
    """Meet an error with one line and exit status 1; with ``debug`` keep the traceback."""
    if debug:
        return
    warnings.simplefilter("ignore")
    logging.getLogger("ignite").setLevel(logging.CRITICAL)

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\ninterrupted", file=sys.stderr)
            return
        root = root_cause(error)
        text = str(root)
        known = isinstance(root, (ValueError, OSError, ArithmeticError))
        name = "" if known else f"{type(root).__name__}: "
        if "Original Traceback" in text:  # PyTorch puts a loading process's whole traceback into the message
            name, text = "", text.strip().splitlines()[-1]
        hint = _shared_memory_hint(text) or ("" if known else " (--debug true shows where)")
        print(f"error: {name}{text}{hint}", file=sys.stderr)

    sys.excepthook = report


def _shared_memory_hint(message: str) -> str:
    """What to do where loading processes ran out of shared memory, of which a container has 64 MB by default."""
    if not re.search(r"shared memory|Bus error|/torch_|/dev/shm", message):
        return ""
    size = f"/dev/shm has {shutil.disk_usage('/dev/shm').total / 1e6:.0f} MB: " if Path("/dev/shm").is_dir() else ""
    return f" ({size}start the container with --ipc=host or --shm-size=8g, or give --num_workers 0)"


def root_cause(error: BaseException) -> BaseException:
    """Strip MONAI's wrappers around errors raised inside config expressions and components."""
    while isinstance(error, RuntimeError) and error.__cause__ and str(error).startswith("Failed to "):
        error = error.__cause__
    return error


def refuse_unknown(keys: Iterator[str] | list[str], config: Mapping[str, Any]) -> None:
    """Raise if an override names nothing in the configuration.

    Args:
        keys: override ids as typed, nested ones separated by ``#`` or ``::``.
        config: the configuration files' merged content.

    Raises:
        ValueError: naming the unknown id and the nearest known one.
    """
    for key in keys:
        first, *rest = _SEPARATORS.split(key)
        node: Any = config
        if first not in config:
            known = [k for k in config if k not in ("imports", "initialize", "run", "finalize")]
            raise ValueError(f"unknown option --{key}{_nearest(first, known)} (--help true lists them)")
        for part, following in zip([first, *rest], rest, strict=False):
            node = node[int(part)] if isinstance(node, list) and part.isdigit() else node[part]
            if not isinstance(node, (dict, list)):
                raise ValueError(f"unknown option --{key}: {part} has no part {following}")
            # arguments of a component may be added; anything else must exist
            present = (
                following.isdigit() and int(following) < len(node) if isinstance(node, list) else following in node
            )
            if not present:
                if isinstance(node, dict) and "_target_" in node and following == rest[-1]:
                    break
                raise ValueError(f"unknown option --{key}{_nearest(following, list(map(str, node)))}")


def print_help(config: Mapping[str, Any]) -> None:
    """List a configuration's options with meaning and default."""
    print(config.get("description", ""), "\n")
    for name in config:
        if name in OPTIONS and name not in ("help", "debug"):
            option = OPTIONS[name]
            print(f"  --{name} {option.kind.upper()}   default: {default_text(name, config[name])}")
            print(f"        {option.meaning}")
    print("\n  --help true    this list\n  --debug true   full tracebacks")
    print("Any other id of the file can be overridden as --id#part VALUE.")


def _nearest(name: str, known: list[str], dashes: str = "--") -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f": did you mean {dashes}{match[0]}?" if match else ""


def _running_parser() -> ConfigParser:
    """The parser that is evaluating the expression we are called from."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    raise RuntimeError("this must be called from an expression of a bundle configuration")


def _is_bundle_command_line() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name in ("monai.bundle", "monai.bundle.__main__")


def _options_typed(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of every ``--name value`` or ``--name=value`` as fire understands them."""
    for index, token in enumerate(argv):
        match = re.match(r"--?([A-Za-z_][^=]*)(?:=(.*))?$", token, flags=re.DOTALL)
        if match:
            following = argv[index + 1] if index + 1 < len(argv) else ""
            yield match[1].replace("-", "_"), match[2] if match[2] is not None else following


def _without_debug(arguments: list[str]) -> tuple[bool, list[str]]:
    """Take ``--debug``, ``--debug true`` or ``--debug=true`` out, so that its value is not read as another's."""
    rest, debug, index = [], False, 0
    while index < len(arguments):
        name, equals, value = arguments[index].partition("=")
        index += 1
        if name != "--debug":
            rest.append(arguments[index - 1])
            continue
        if not equals and index < len(arguments) and arguments[index].lower() in ("true", "false"):
            value, index = arguments[index], index + 1
        debug = flag(value or True)
    return debug, rest


def _arguments_file(argv: list[str]) -> dict[str, Any]:
    """Content of MONAI's ``--args_file``: defaults of arguments and overrides."""
    for name, value in _options_typed(argv):
        if name == "args_file":
            return ConfigParser.load_config_files(value)
    return {}


def _config_files(argv: list[str]) -> Any:
    from fire.parser import DefaultParseValue

    typed = [DefaultParseValue(value) for name, value in _options_typed(argv) if name == "config_file"]
    return typed[0] if typed else _arguments_file(argv)["config_file"]


def _tracking_ids(argv: list[str]) -> dict[str, Any]:
    """What MONAI's ``--tracking`` adds to the configuration, such as ``experiment_name``.

    Raises:
        ImportError: it is to be MLflow, which is not installed.
    """
    typed = dict(_options_typed(argv)).get("tracking") or _arguments_file(argv).get("tracking")
    if not typed:
        return {}
    if typed == "mlflow" and find_spec("mlflow") is None:
        raise ImportError("--tracking mlflow needs the package mlflow: pip install mlflow")
    known = DEFAULT_EXP_MGMT_SETTINGS
    settings = known[typed] if typed in known else ConfigParser.load_config_files(typed)
    return {name: value for name, value in settings["configs"].items() if name not in settings["handlers_id"]}


def _rename_tracked_loss(parser: ConfigParser) -> None:
    """Keep apart the loss of an iteration and that of an epoch, which MONAI's MLflow handler would give one name."""
    handlers = parser.get("train#handlers") or []
    for number, handler in enumerate(handlers):
        if isinstance(handler, Mapping) and (handler["_target_"], handler.get("tag_name")) == _TRACKED_LOSS:
            parser[f"train#handlers#{number}#tag_name"] = "train_iteration_loss"


def _override_keys(argv: list[str]) -> list[str]:
    keys = [*(name for name, _ in _options_typed(argv)), *_arguments_file(argv)]
    return [key for key in keys if key not in _RUN_ARGUMENTS and key != "help"]
