"""The demo, shortened, by its own command line."""

import subprocess
import sys


def demo(*arguments):
    command = [sys.executable, "-m", "scripts.demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_demo_goes_all_the_way(tmp_path):
    folder = tmp_path / "a demo"
    result = demo("--output_dir", folder, "--epochs", 1, "--groups_per_epoch", 1)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "mean Dice" in result.stdout and result.stdout.count("$ python -m") == 4
    assert len(list((folder / "answers").glob("*.png"))) == len(list((folder / "answers").glob("*.nii.gz"))) == 6
    again = demo("--output_dir", folder)
    assert again.returncode == 1 and "holds an earlier demo" in again.stderr


def test_demo_touches_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = demo("--output_dir", tmp_path, "--overwrite", "true")
    assert result.returncode == 1 and "not a demo" in result.stderr and (tmp_path / "thesis.tex").exists()
