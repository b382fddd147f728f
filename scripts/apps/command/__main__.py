"""The console command ``neuroverse3d``; from the bundle's root also ``python -m scripts.apps.command``."""

from __future__ import annotations

import sys

from scripts.apps.command.verbs import help_text, start
from scripts.runtime.termination import exit_on_sigterm

_PROGRAM = "neuroverse3d"


def main() -> None:
    """Run the verb that was typed; a wrong one ends with one line and status 1."""
    arguments = sys.argv[1:]
    exit_on_sigterm()
    if not arguments or arguments[0] in ("--help", "-h"):
        print(help_text(_PROGRAM))
        return
    start(arguments, _PROGRAM)


if __name__ == "__main__":
    main()
