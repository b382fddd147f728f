"""``import neuroverse3d`` beside another project's ``scripts``; the wheel itself is tried by ``make wheel-test``."""

from __future__ import annotations

import shutil
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


_WORKFLOW = """
import sys
sys.path.append(sys.argv[1])
from neuroverse3d import ICLInferer
from neuroverse3d.scripts.runtime.workflow import plain_errors, start_workflow
workflow = start_workflow("inference.json", {"device": "cpu", "dataset_dir": "data"})
assert isinstance(workflow.parser.get_parsed_content("predictor"), ICLInferer)
try:
    with plain_errors():
        workflow.run()
except FileNotFoundError as error:
    assert "no file or folder data" in str(error)
else:
    raise AssertionError("there are no data")
import scripts.mine  # a folder without __init__.py
assert not [m for m in sys.modules if m.startswith("scripts.") and m != "scripts.mine"]
"""


def test_a_workflow_started_in_another_program_is_made_of_the_package_s_modules(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "mine.py").touch()
    (tmp_path / "study.py").write_text(_WORKFLOW)
    package = tmp_path / "site"
    package.mkdir()
    for name in ("neuroverse3d", "neuroverse3d/scripts", "neuroverse3d/configs", "neuroverse3d/models"):
        source = REPOSITORY / name.removeprefix("neuroverse3d/")
        if name == "neuroverse3d":
            shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (package / name).symlink_to(source)
    command = [sys.executable, "study.py", str(package)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_is_made_of_the_bundle_s_own_folders():
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, place in build["sources"].items():
        assert (REPOSITORY / source).exists() and place == f"neuroverse3d/{source}"
    assert set(build["sources"]) | {"neuroverse3d"} == set(build["only-include"])
