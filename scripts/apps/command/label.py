"""Starts MONAI Label with the bundle's app, in the environment of its own that it needs, or says how to make that.

Command line::

    neuroverse3d label STUDIES                                            # the lines that make an environment
    neuroverse3d label STUDIES --environment VENV --output APP [--conf context_size 4]
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

_APP = Path(__file__).resolve().parents[1] / "monailabel"
_OURS = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONHOME")
"""Variables that would bring this environment's packages into the other one."""


def environment_lines(folder: str) -> list[str]:
    """The two commands that make an environment for MONAI Label, which needs NumPy below 2."""
    pip, place = shlex.quote(f"{folder}/bin/pip"), shlex.quote(folder)
    app = shlex.quote(str(_APP))
    return [
        f"python3 -m venv {place} && {pip} install -c {app}/constraints.txt -r {app}/requirements.txt",
        f"{pip} install --no-deps -r {app}/requirements-no-deps.txt",
    ]


def server_command(environment: str, app: str, studies: str, host: str, port: str, others: list[str]) -> list[str]:
    """The command that starts the server; makes the app's folder, with a link to the app.

    Args:
        environment: the environment's folder.
        app: folder of this server, for weights that it makes and for logs.
        studies: folder of scans, or a DICOMweb address.
        host: address to listen on.
        port: its port.
        others: further arguments for MONAI Label, such as ``--conf context_size 4``.

    Raises:
        FileNotFoundError: no environment there, or one without MONAI Label.
        FileExistsError: something else is where the link to the app belongs.
    """
    python = Path(environment, "bin", "python")
    if not any(Path(environment).glob("lib/python*/site-packages/monailabel")):
        lacking = "has no MONAI Label" if python.exists() else "is no environment"
        raise FileNotFoundError(f"{environment} {lacking}; it is made by\n" + "\n".join(environment_lines(environment)))
    link = Path(app, "main.py")
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() or link.exists():
        if link.resolve() != _APP / "main.py":
            raise FileExistsError(f"{link} is not the bundle's app: give another --output")
    else:
        link.symlink_to(_APP / "main.py")
    settings = ["--app", app, "--studies", studies, "--host", host, "--port", port]
    return [os.path.abspath(python), "-m", "monailabel.main", "start_server", *settings, *others]


def main() -> None:
    """Start the server in place of this process, or print how to make its environment."""
    parser = argparse.ArgumentParser(prog="neuroverse3d label", description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", required=True, help="folder of scans, or a DICOMweb address (the first word)")
    parser.add_argument("--environment", help="folder of the environment with MONAI Label")
    parser.add_argument("--output", help="folder of this server: weights that it makes, logs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", default="8000", help="default: 8000")
    known, others = parser.parse_known_args()
    if known.environment is None:
        print("MONAI Label needs NumPy below 2, and so an environment of its own, which these two lines make:")
        print("\n".join(environment_lines("label-env")))
        print(f"then: neuroverse3d label {shlex.quote(known.studies)} --environment label-env --output APP")
        return
    if known.output is None:
        sys.exit("error: label needs --output: a folder for weights that the server makes, and logs")
    try:
        command = server_command(known.environment, known.output, known.studies, known.host, known.port, others)
    except OSError as error:
        sys.exit(f"error: {error}")
    variables = {name: value for name, value in os.environ.items() if name not in _OURS}
    os.execve(command[0], command, variables)


if __name__ == "__main__":
    main()
