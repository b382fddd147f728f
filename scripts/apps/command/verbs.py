"""The verbs of ``neuroverse3d`` and of the container image, in one table.

A verb is another way to write a command that the pages document (``python -m monai.bundle run ...``,
``python -m scripts.prepare_data ...``): :func:`command` translates it. ``--help`` is made of the same table.

The table names options as configurations and tools do; in a terminal the words of :data:`SHORT` mean the same.
"""

from __future__ import annotations

import difflib
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[3]
DATA, CONTEXT, OUT = "/data", "/context", "/out"
"""Folders that the image expects to be mounted."""

SHORT = {
    "output": "output_dir",
    "examples": "context_dir",
    "reference": "reference_dir",
}
"""Short words for options that a verb cannot do without."""

_HELP = ("--help", "-h")
_OPTION = re.compile(r"--?([A-Za-z_][^=]*)(?:=(.*))?", re.DOTALL)
_LOOK = ("suffix", "mask_pattern")
"""Options of verbs that look at what a path holds, and of no workflow."""


class Verb(NamedTuple):
    """A verb: the module behind it, its first arguments, and the options that it cannot do without."""

    meaning: str
    module: str
    first: tuple[str, ...] = ()
    needs: Mapping[str, str] = {}
    """Option -> folder of the image that stands for it there; elsewhere it must be typed."""
    word: str | None = None
    """The option that words without a name are the value of."""
    instead: Mapping[str, tuple[str, ...]] = {}
    """Options that make a needed one superfluous."""
    fixed: Mapping[str, str] = {}
    """Options that it gets unless they are typed."""
    in_image: Mapping[str, str] = {}
    """The same, in the image only."""
    remedies: Mapping[str, str] = {}
    """What is said where the file of a fixed option is missing."""
    looks: bool = False
    """Scans and examples are told by looking at what their paths hold."""
    also: tuple[str, ...] = ()
    """Names of earlier versions."""
    usage: str = "[OPTIONS]"

    @property
    def is_workflow(self) -> bool:
        """Whether it runs a configuration."""
        return self.first[:1] == ("run",) and len(self.first) > 1


_BUNDLE = {"bundle_root": str(ROOT), "logging_file": f"{ROOT}/configs/logging.conf"}
"""Workflows find their files whatever the working folder is."""


def _workflow(config: str, meaning: str, **facts: object) -> Verb:
    first = ("run", "--config_file", f"{ROOT}/configs/{config}.json")
    return Verb(meaning, "monai.bundle", first, fixed=_BUNDLE, **facts)


VERBS: dict[str, Verb] = {
    "segment": _workflow(
        "inference", "segment scans from a few examples, into a folder", word="dataset_dir", looks=True,
        needs={"dataset_dir": DATA, "context_dir": CONTEXT, "output_dir": OUT}, also=("inference",),
        instead={"dataset_dir": ("target_images",), "context_dir": ("context_images", "context_file")},
        usage="SCANS --examples EXAMPLES --output OUT [OPTIONS]",
    ),
    "tune": _workflow(
        "tune", "tune the weights on the examples for a minute, into a folder", word="context_dir", looks=True,
        needs={"context_dir": CONTEXT, "output_dir": OUT},
        instead={"context_dir": ("context_images", "context_file")},
        usage="EXAMPLES --output OUT [--minutes 1] [OPTIONS]",
    ),
    "train stage1": _workflow(
        "train_stage1", "train the first stage, into OUT/stage1", word="dataset_dir",
        needs={"dataset_dir": DATA, "output_dir": OUT}, also=("train_stage1",),
        instead={"dataset_dir": ("collection_file",)}, usage="DATA --output OUT [OPTIONS]",
    ),
    "train stage2": _workflow(
        "train_stage2", "train the second stage, into OUT/stage2", word="dataset_dir",
        needs={"dataset_dir": DATA, "output_dir": OUT}, also=("train_stage2",),
        instead={"dataset_dir": ("collection_file",)}, usage="DATA --output OUT [OPTIONS]",
    ),
    "evaluate": _workflow(
        "evaluate", "score predictions against reference labels", word="prediction_dir",
        needs={"prediction_dir": OUT, "reference_dir": f"{DATA}/labelsTr", "output_dir": f"{OUT}/scores"},
        usage="PREDICTIONS --reference LABELS --output OUT [OPTIONS]",
    ),
    "bids": Verb(
        "BIDS App: a BIDS dataset in, a BIDS derivative out", "scripts.apps.bids",
        usage="BIDS_DIR OUT participant|group --examples EXAMPLES [OPTIONS]",
    ),
    "prepare": Verb(
        "nnU-Net folders from other files, the Decathlon, BIDS or DICOM", "scripts.prepare_data", word="input_dir",
        needs={"input_dir": DATA, "output_dir": OUT}, also=("prepare_data",),
        usage="RAW --output OUT --dataset_name NAME [OPTIONS]",
    ),
    "synthesize": Verb("synthetic cohorts to train on", "scripts.synthesize", needs={"output_dir": OUT},
                       usage="--output OUT [OPTIONS]"),
    "report": Verb("one report from those of several shards", "scripts.merge_reports", needs={"output_dir": OUT},
                   also=("merge_reports",), usage="--output OUT [OPTIONS]"),
    "label": Verb("MONAI Label: start the server in its environment, or say how to make one",
                  "scripts.apps.command.label", word="studies", needs={"studies": DATA},
                  usage="STUDIES [--environment VENV --output APP] [OPTIONS]"),
    "doctor": Verb("versions, device, memory, weights, and whether they work", "scripts.apps.command.doctor"),
    "demo": Verb("made-up subjects segmented and scored with the bundle's weights", "scripts.demo",
                 needs={"output_dir": f"{OUT}/demo"}, usage="--output OUT [OPTIONS]"),
    "preview": Verb(
        "contact sheets of training groups", "scripts.preview", word="dataset_dir",
        needs={"dataset_dir": DATA, "output_dir": f"{OUT}/preview"},
        instead={"dataset_dir": ("collection_file",)}, usage="DATA --output OUT [OPTIONS]",
    ),
    "corrupt": Verb("damaged copies of scans", "scripts.corrupt", word="dataset_dir",
                    needs={"dataset_dir": DATA, "output_dir": f"{OUT}/corrupted"}, usage="DATA --output OUT [OPTIONS]"),
    "reproduce": Verb("repeat a run from its manifest and compare", "scripts.reproduce", word="run_dir",
                      needs={"output_dir": f"{OUT}/reproduced"}, usage="RUN --output OUT [OPTIONS]"),
    "checkpoint": Verb("convert, export, compact or download weights", "scripts.checkpoint",
                       usage="convert|export|compact|download [OPTIONS]"),
    "verify_metadata": Verb(
        "check the bundle's metadata against MONAI's schema, if that is there", "monai.bundle", ("verify_metadata",),
        fixed={"meta_file": f"{ROOT}/configs/metadata.json", "filepath": f"{ROOT}/schema/meta_schema_20240725.json"},
        remedies={"filepath": "built without MONAI's schema (docs/container.md says how to add it)"},
    ),
    "tensorboard": Verb("training curves on port 6006", "tensorboard.main", needs={"logdir": OUT},
                        word="logdir", in_image={"host": "0.0.0.0"}, usage="RUN [OPTIONS]"),
    "torchrun": Verb("several processes: torchrun ... -m monai.bundle run ...", "torch.distributed.run"),
    "run": Verb("any configuration: run --config_file FILE ...", "monai.bundle", ("run",)),
}  # fmt: skip


def command(
    arguments: Sequence[str], mounted: Callable[[str, str], str] | None = None, say: Callable[[str], None] = print
) -> tuple[str, list[str]]:
    """The Python module that a verb runs, and its arguments.

    Args:
        arguments: the verb and what follows.
        mounted: in the image: called with an option that is needed and not typed, and the folder that stands for it;
            returns its value, or raises what is said of it. None: what is needed must be typed.
        say: takes the line that says what was found in the paths.

    Raises:
        ValueError: an unknown verb, or something that it needs is not typed.
        FileNotFoundError, DatasetError: a path that does not hold what it should.
    """
    name, typed = _find_verb(list(arguments))
    verb = VERBS[name]
    if set(_HELP) & set(typed):
        return verb.module, [*verb.first, *_help_of(verb, typed)]
    given: dict[str, list[str]] = {}
    passed: list[str] = []
    names = set()
    for part in _parts(typed):
        option = part.option
        if option is None:
            option = verb.word
        elif SHORT.get(option) in verb.needs:
            option = SHORT[option]
        names.add(option)
        if option is not None and (option in verb.needs or option == verb.word or (verb.looks and option in _LOOK)):
            if option in given:
                raise ValueError(f"{name}: {_told(verb, option)} is given twice")
            given[option] = part.values
        else:
            passed += part.tokens
    for option, folder in verb.needs.items():
        if option in given or not names.isdisjoint(verb.instead.get(option, ())):
            continue
        if mounted is None:
            raise ValueError(f"{name} needs {_told(verb, option)}: neuroverse3d {name} {verb.usage}")
        given[option] = [mounted(option, folder)]
    filled: list[str] = []
    for option, value in (dict(verb.fixed) | (dict(verb.in_image) if mounted is not None else {})).items():
        if option not in names:
            if option in verb.remedies and not Path(value).is_file():
                raise FileNotFoundError(f"there is no {value}: {verb.remedies[option]}")
            filled += [f"--{option}", value]
    if verb.looks:
        filled += _looked_at(given, say)
    filled += [token for option, values in given.items() for token in (f"--{option}", *values)]
    return verb.module, [*verb.first, *filled, *passed]


def help_text(program: str = "neuroverse3d") -> str:
    """What ``--help`` prints.

    Args:
        program: what stands in front of the verb.
    """
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.meaning}" for name, verb in VERBS.items())
    return (
        f"{program} VERB [OPTIONS]\n\n{verbs}\n\n"
        f"{program} VERB --help lists a verb's options. SCANS: files, a folder, nnU-Net's imagesTs, a BIDS dataset.\n"
        "EXAMPLES: an nnU-Net dataset, a BIDS derivative with *_dseg, two folders (images labels), or files\n"
        "CASE.nii.gz with CASE_seg.nii.gz. Research use only; not a medical device. Nothing is sent anywhere."
    )


def _find_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """A verb's name in the table, and the rest; verbs may be of two words."""
    for count in (2, 1):
        name = " ".join(arguments[:count])
        for known, verb in VERBS.items():
            if len(arguments) >= count and name in (known, *verb.also):
                return known, arguments[count:]
    name = arguments[0]
    if stages := [known for known in VERBS if known.startswith(f"{name} ")]:
        raise ValueError(f"{name}: which one? {' or '.join(stages)}")
    names = [*VERBS, *(other for verb in VERBS.values() for other in verb.also)]
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(f"unknown command {name}{f': did you mean {near[0]}?' if near else ''} (--help lists them)")


def _help_of(verb: Verb, typed: Sequence[str]) -> list[str]:
    """A workflow's options all have values, ``--help`` too."""
    if verb.is_workflow and typed[-1] in _HELP:
        return [*typed[:-1], "--help", "true"]
    return list(typed)


class _Part(NamedTuple):
    """An option with the words behind it, or the words in front of all options (None)."""

    option: str | None
    values: list[str]
    tokens: list[str]


def _parts(typed: Sequence[str]) -> list[_Part]:
    parts: list[_Part] = []
    for token in typed:
        match = _OPTION.fullmatch(token) if token.startswith("-") else None
        if match:
            parts.append(_Part(match[1].replace("-", "_"), [] if match[2] is None else [match[2]], [token]))
            continue
        if not parts:
            parts.append(_Part(None, [], []))
        parts[-1].values.append(token)
        parts[-1].tokens.append(token)
    return parts


def _told(verb: Verb, option: str) -> str:
    if option == verb.word:
        return verb.usage.split()[0]
    return f"--{next((short for short, long in SHORT.items() if long == option), option)}"


def _looked_at(given: dict[str, list[str]], say: Callable[[str], None]) -> list[str]:
    """Take scans and examples out of what is given, and tell the workflow what they are.

    Raises:
        FileNotFoundError, DatasetError: as of :mod:`scripts.data.layouts`.
    """
    from scripts.data.layouts import look_for_examples, look_for_scans  # brings PyTorch, which --help can do without

    settings = {name: _one(name, given.pop(name)) for name in _LOOK if name in given}
    looks = {"dataset_dir": look_for_scans, "context_dir": look_for_examples}
    filled, lines = [], []
    for option, look in looks.items():
        if option not in given:
            continue
        paths = given.pop(option)
        known = settings if option == "context_dir" else {k: v for k, v in settings.items() if k == "suffix"}
        found = look(paths, **known)
        lines.append(f"{'scans' if option == 'dataset_dir' else 'examples'}: {found.what}")
        for name, value in found.options.items():
            filled += [f"--{name}", _literal(value)]
    if lines:
        say("; ".join(lines))
    return filled


def _one(option: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"--{option} takes one value, got {' '.join(values) or 'none'}")
    return values[0]


def _literal(value: str | Sequence[str]) -> str:
    """A value as it is typed for MONAI, whose command line reads literals of Python."""
    return value if isinstance(value, str) and not set(value) & set(",'\"[]{}()\\") else repr(value)


def usage_lines(arguments: Sequence[str], program: str) -> Iterator[str]:
    """What is said above a verb's own help: its meaning, and what it takes."""
    name, typed = _find_verb(list(arguments))
    if set(_HELP) & set(typed):
        yield f"{program} {name} {VERBS[name].usage}"
        yield f"  {VERBS[name].meaning}"


def start(
    arguments: Sequence[str], program: str, translate: Callable[[Sequence[str]], tuple[str, list[str]]] = command
) -> None:
    """Run the verb that was typed; what is wrong with it ends the program with one line and status 1.

    Args:
        arguments: the verb and what follows.
        program: what stands in front of the verb.
        translate: gives the module that runs, and its arguments.
    """
    try:
        for line in usage_lines(arguments, program):
            print(line)
        module, rest = translate(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    run(module, rest)


def run(module: str, arguments: Sequence[str]) -> None:
    """Run a module as the program."""
    if any(argument.startswith(f"{ROOT}/configs/") for argument in arguments):
        # MONAI warns of configurations that one does not trust; these are the bundle's own
        warnings.filterwarnings("ignore", "parsing config_file", UserWarning)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
