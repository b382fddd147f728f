"""The container image's entry point: its verbs, and the folders that they expect to be mounted.

Command line, with ``docker run ... IMAGE`` in place of ``python -m scripts.container``::

    python -m scripts.container train_stage1 --epochs 5
    python -m scripts.container run --config_file configs/inference.json --dataset_dir /data
    python -m scripts.container python -m monai.bundle run --config_file configs/inference.json

A verb's own arguments go on unchanged; what they leave out is taken from ``/data``, ``/context`` and ``/out``.
"""

from __future__ import annotations

import difflib
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.runtime.termination import exit_on_sigterm

ROOT = Path(__file__).resolve().parents[1]
DATA, CONTEXT, OUT = "/data", "/context", "/out"
_HELP = ("--help", "-h")


class Verb(NamedTuple):
    """A verb: the module behind it, its first arguments, and the options that it gets unless they are typed."""

    meaning: str
    module: str
    first: tuple[str, ...] = ()
    defaults: Mapping[str, str] = {}
    instead: Mapping[str, tuple[str, ...]] = {}
    """Options that make a default one superfluous."""

    @property
    def is_workflow(self) -> bool:
        """Whether it runs a configuration."""
        return self.first[:1] == ("run",) and len(self.first) > 1


def _workflow(config: str, meaning: str, instead: Mapping[str, tuple[str, ...]] | None = None, **defaults: str) -> Verb:
    return Verb(meaning, "monai.bundle", ("run", "--config_file", f"{ROOT}/configs/{config}.json"), defaults,
                instead or {})  # fmt: skip


VERBS: dict[str, Verb] = {
    "train_stage1": _workflow(
        "train_stage1", "train the first stage into /out/stage1",
        dataset_dir=DATA, output_dir=OUT, instead={"dataset_dir": ("collection_file",)},
    ),
    "train_stage2": _workflow(
        "train_stage2", "train the second stage into /out/stage2",
        dataset_dir=DATA, output_dir=OUT, instead={"dataset_dir": ("collection_file",)},
    ),
    "inference": _workflow(
        "inference", "predictions for the scans in /data from the examples in /context, into /out",
        dataset_dir=DATA, context_dir=CONTEXT, output_dir=OUT,
        instead={"context_dir": ("context_images", "context_file")},
    ),
    "tune": _workflow(
        "tune", "weights tuned on the examples in /context, into /out",
        context_dir=CONTEXT, output_dir=OUT, instead={"context_dir": ("context_images", "context_file")},
    ),
    "evaluate": _workflow(
        "evaluate", "scores of the predictions in /out against /data/labelsTr, into /out/scores",
        prediction_dir=OUT, reference_dir=f"{DATA}/labelsTr", output_dir=f"{OUT}/scores",
    ),
    "prepare_data": Verb(
        "nnU-Net folders in /out from the files in /data", "scripts.prepare_data",
        defaults={"input_dir": DATA, "output_dir": OUT},
    ),
    "demo": Verb("made-up subjects segmented and scored with the bundle's weights, into /out/demo", "scripts.demo",
                 defaults={"output_dir": f"{OUT}/demo"}),
    "reproduce": Verb("repeat a run from its manifest and compare", "scripts.reproduce",
                      defaults={"output_dir": f"{OUT}/reproduced"}),
    "preview": Verb("contact sheets of training groups, into /out/preview", "scripts.preview",
                    defaults={"dataset_dir": DATA, "output_dir": f"{OUT}/preview"},
                    instead={"dataset_dir": ("collection_file",)}),
    "synthesize": Verb("synthetic cohorts, into /out", "scripts.synthesize", defaults={"output_dir": OUT}),
    "corrupt": Verb("damaged copies of the scans in /data, into /out/corrupted", "scripts.corrupt",
                    defaults={"dataset_dir": DATA, "output_dir": f"{OUT}/corrupted"}),
    "merge_reports": Verb("one report from those of several shards", "scripts.merge_reports",
                          defaults={"output_dir": OUT}),
    "checkpoint": Verb("convert, export, compact or download weights", "scripts.checkpoint"),
    "verify_metadata": Verb(
        "check the bundle's metadata against MONAI's schema in the image", "monai.bundle", ("verify_metadata",),
        {"meta_file": f"{ROOT}/configs/metadata.json", "filepath": f"{ROOT}/schema/meta_schema_20240725.json"},
    ),
    "tensorboard": Verb("training curves of /out on port 6006", "tensorboard.main",
                        defaults={"logdir": OUT, "host": "0.0.0.0"}),
    "torchrun": Verb("several processes: torchrun ... -m monai.bundle run ...", "torch.distributed.run"),
    "run": Verb("any configuration: run --config_file FILE ...", "monai.bundle", ("run",)),
}  # fmt: skip


def command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The Python module that a command of the image runs, and its arguments.

    Args:
        arguments: what follows the image's name: a verb and its arguments, or ``python -m MODULE ...``.

    Raises:
        ValueError: an unknown verb.
        FileNotFoundError: nothing is mounted where the verb reads.
        PermissionError: where it writes, it cannot.
    """
    name, *typed = arguments
    if name == "python" and len(typed) > 1 and typed[0] == "-m":
        return typed[1], typed[2:]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        raise ValueError(f"unknown command {name}{f': did you mean {near[0]}?' if near else ''} (--help lists them)")
    verb = VERBS[name]
    if set(_HELP) & set(typed):
        if verb.is_workflow and typed[-1] in _HELP:  # a workflow's options all have values
            typed = [*typed[:-1], "--help", "true"]
        return verb.module, [*verb.first, *typed]
    given = {match[1].replace("-", "_") for token in typed if (match := re.match(r"--?([A-Za-z_][^=]*)", token))}
    filled = []
    for option, folder in verb.defaults.items():
        if option not in given and given.isdisjoint(verb.instead.get(option, ())):
            _check(option, folder)
            filled += [f"--{option}", folder]
    return verb.module, [*verb.first, *filled, *typed]


def _check(option: str, folder: str) -> None:
    """Say what is missing in the command where a folder that is taken for granted is not there."""
    if option == "filepath" and not Path(folder).is_file():
        raise FileNotFoundError(
            f"this image has no {folder}: it was built without MONAI's schema (docs/container.md says how to add it)"
        )
    mount = next((m for m in (DATA, CONTEXT, OUT) if folder == m or folder.startswith(f"{m}/")), None)
    if mount in (DATA, CONTEXT) and not (os.path.isdir(mount) and os.listdir(mount)):
        raise FileNotFoundError(
            f"nothing is mounted at {mount}: add -v YOUR_FOLDER:{mount}:ro to the command, or give --{option}"
        )
    if mount == OUT and option == "output_dir":
        try:
            tempfile.TemporaryFile(dir=OUT).close()
        except OSError as error:
            raise PermissionError(
                f"cannot write into {OUT} as user {os.getuid()} ({error.strerror}): add -v YOUR_FOLDER:{OUT} and "
                "--user $(id -u):$(id -g) to the command, or give --output_dir"
            ) from error


def help_text() -> str:
    """What ``--help`` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.meaning}" for name, verb in VERBS.items())
    return (
        "docker run --gpus all -v DATA:/data:ro -v CONTEXT:/context:ro -v OUT:/out IMAGE COMMAND [OPTIONS]\n\n"
        f"Commands:\n{verbs}\n  {'python':<{width}}  python -m MODULE ..., or any other use of Python\n\n"
        "IMAGE COMMAND --help lists a command's options. Research use only; not a medical device."
    )


def main() -> None:
    """Run the command that was typed; a wrong one ends with one line and status 1."""
    arguments = sys.argv[1:]
    exit_on_sigterm()
    if not arguments or arguments[0] in _HELP:
        print(help_text())
        return
    if arguments[0] == "python" and arguments[1:2] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *arguments[1:]])
    try:
        module, rest = command(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
