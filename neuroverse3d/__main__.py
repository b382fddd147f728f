"""The console command: puts the bundle's root in front of every other folder that may hold a ``scripts``."""

from __future__ import annotations

import os
import sys

from neuroverse3d import ROOT


def main() -> None:
    """Run the verb that was typed, in this process; processes that it starts find the same code."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONSAFEPATH"] = "1"  # else the working folder comes first
    from scripts.apps.command.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
