"""The demo, shortened, by its own command line, with the weights of the bundle."""

import re
import subprocess
import sys

import pytest

from scripts.demo import demo


def test_demo_goes_all_the_way(tmp_path):
    """By processes of its own, as are the three documented commands that it runs; what they give is the tutorial's."""
    folder = tmp_path / "a demo"
    command = [sys.executable, "-m", "scripts.demo", "--output_dir", str(folder), "--subjects", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(re.search(r"mean Dice (\S+) on 2 subjects", result.stdout)[1]) > 0.1
    assert result.stdout.count("$ python -m") == 3 and "train" not in result.stdout
    assert len(list((folder / "predictions").glob("*.png"))) == 2
    assert (folder / "predictions" / "report.html").is_file()
    with pytest.raises(FileExistsError, match="holds an earlier demo"):
        demo(str(folder))


def test_demo_touches_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not a demo's"):
        demo(str(tmp_path), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_one_subject_has_no_others_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="subjects must be a whole number of at least 2"):
        demo(str(tmp_path / "demo"), subjects=1)
