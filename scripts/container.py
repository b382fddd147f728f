"""The container image's entry point: the verbs of ``neuroverse3d``, and the folders that are expected to be mounted.

Command line, with ``docker run ... IMAGE`` in place of ``python -m scripts.container``::

    python -m scripts.container train stage1 --epochs 5
    python -m scripts.container run --config_file configs/inference.json --dataset_dir /data
    python -m scripts.container python -m monai.bundle run --config_file configs/inference.json

What is typed goes on unchanged; what a verb needs and is not typed is taken from ``/data``, ``/context`` and ``/out``.
"""

from __future__ import annotations

import os
import sys
import tempfile

from scripts.apps.command import verbs
from scripts.runtime.termination import exit_on_sigterm

DATA, CONTEXT, OUT = verbs.DATA, verbs.CONTEXT, verbs.OUT
_PROGRAM = "docker run --gpus all -v DATA:/data:ro -v CONTEXT:/context:ro -v OUT:/out IMAGE"


def command(arguments: list[str]) -> tuple[str, list[str]]:
    """The Python module that a command of the image runs, and its arguments.

    Args:
        arguments: what follows the image's name: a verb and its arguments, or ``python -m MODULE ...``.

    Raises:
        ValueError: an unknown verb.
        FileNotFoundError: nothing is mounted where the verb reads.
        PermissionError: where it writes, it cannot.
    """
    if arguments[0] == "python" and len(arguments) > 2 and arguments[1] == "-m":
        return arguments[2], arguments[3:]
    return verbs.command(arguments, _mounted)


def _mounted(option: str, folder: str) -> str:
    """A folder that stands for an option; what is missing in the command is said where it is not there."""
    mount = next(m for m in (DATA, CONTEXT, OUT) if folder == m or folder.startswith(f"{m}/"))
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
    return folder


def help_text() -> str:
    """What ``--help`` prints."""
    return f"{verbs.help_text(_PROGRAM)}\n\nBesides: python -m MODULE ..., or any other use of Python."


def main() -> None:
    """Run the command that was typed; a wrong one ends with one line and status 1."""
    arguments = sys.argv[1:]
    exit_on_sigterm()
    if not arguments or arguments[0] in ("--help", "-h"):
        print(help_text())
        return
    if arguments[0] == "python" and arguments[1:2] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *arguments[1:]])
    if arguments[0] == "python" and len(arguments) > 2:
        verbs.run(*command(arguments))
    else:
        verbs.start(arguments, "IMAGE", command)


if __name__ == "__main__":
    main()
