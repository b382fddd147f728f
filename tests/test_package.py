"""``import neuroverse3d`` beside another project's ``scripts``; the wheel itself is tried by ``make wheel-test``."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_PROGRAM = """
import pickle, sys
{first}
from neuroverse3d import ICLInferer
from neuroverse3d.scripts.losses import SmoothL3L1Loss
import scripts.inferer
assert scripts.inferer.MINE == 1 and scripts.__file__.endswith("mine/scripts/__init__.py")
assert ICLInferer.__module__ == "neuroverse3d.scripts.inferer"
assert type(pickle.loads(pickle.dumps(SmoothL3L1Loss()))) is SmoothL3L1Loss
assert sorted(m for m in sys.modules if m.startswith("scripts")) == ["scripts", "scripts.inferer"]
"""


def test_neither_scripts_is_in_the_other_s_way(tmp_path):
    mine = tmp_path / "mine"
    (mine / "scripts").mkdir(parents=True)
    (mine / "scripts" / "__init__.py").touch()
    (mine / "scripts" / "inferer.py").write_text("MINE = 1\n")
    program = _PROGRAM.format(first="import scripts.inferer")
    (mine / "study.py").write_text(f"import sys; sys.path.append({str(REPOSITORY)!r})\n{program}")
    done = subprocess.run([sys.executable, "study.py"], cwd=mine, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_is_made_of_the_bundle_s_own_folders():
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in build["sources"].items():
        assert (REPOSITORY / source).exists() and place == f"neuroverse3d/{source}"
    assert set(build["sources"]) | {"neuroverse3d"} == set(build["only-include"])
