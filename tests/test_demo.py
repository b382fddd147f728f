"""The demo, shortened, by its own command line, with the weights of the bundle."""

import itertools
import re
import subprocess
import sys

import nibabel as nib
import numpy as np


def demo(*arguments):
    command = [sys.executable, "-m", "scripts.demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_demo_goes_all_the_way(tmp_path):
    folder = tmp_path / "a demo"
    result = demo("--output_dir", folder, "--subjects", 4)
    assert result.returncode == 0, result.stderr[-2000:]
    masks = [np.asarray(nib.load(path).dataobj) > 0 for path in sorted(folder.glob("data/*/labelsTr/*.nii.gz"))]
    blind = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(masks, 2)]
    assert float(re.search(r"mean Dice (\S+) on 4 subjects", result.stdout)[1]) > max(blind)
    assert result.stdout.count("$ python -m") == 3 and "train" not in result.stdout
    assert (
        len(list((folder / "predictions").glob("*.png"))) == len(list((folder / "predictions").glob("*.nii.gz"))) == 4
    )
    assert (folder / "predictions" / "report.html").is_file()
    again = demo("--output_dir", folder)
    assert again.returncode == 1 and "holds an earlier demo" in again.stderr


def test_demo_touches_nothing_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    result = demo("--output_dir", tmp_path, "--overwrite", "true")
    assert result.returncode == 1 and "not a demo" in result.stderr and (tmp_path / "thesis.tex").exists()


def test_one_subject_has_no_others_to_learn_from(tmp_path):
    result = demo("--output_dir", tmp_path / "demo", "--subjects", 1)
    assert result.returncode == 1 and "subjects must be a whole number of at least 2" in result.stderr
