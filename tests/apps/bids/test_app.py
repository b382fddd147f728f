"""The BIDS App on three datasets: what it writes, what the maintained validator says, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from scripts.apps.bids.__main__ import run
from scripts.apps.bids.validation import errors_of, validator
from scripts.checkpoint import atomic_save
from scripts.data.nnunet import DatasetError
from scripts.networks import Neuroverse3D
from tests.bids_trees import NAMES, TREES, plain

EXAMPLES = {"plain": "plain/derivatives/manual", "sessions": "examples", "texts": "texts"}
needs_validator = pytest.mark.skipif(validator() is None, reason="pip install -r requirements-dev.txt: no validator")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """``app(BIDS_DIR, OUT, LEVEL, ...)`` with small weights on the CPU."""
    weights = tmp_path_factory.mktemp("weights") / "small.pt"
    atomic_save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), weights)

    def call(root, out, *typed, checkpoint=weights):
        level = typed if typed[:1] == ("group",) else ("participant", *typed)
        extra = () if level[0] == "group" else ("--checkpoint", str(checkpoint), "--align", "off", "--device", "cpu")
        run([str(root), str(out), *level, *extra])

    return call


def files(root):
    """Files of a dataset, less what it keeps for itself."""
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith("."))


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@needs_validator
@pytest.mark.parametrize("tree", TREES)
def test_valid_data_in_valid_derivative_out(app, tmp_path, tree):
    root, out = TREES[tree](tmp_path), tmp_path / "out"
    assert errors_of(root) == []
    app(root, out, "--examples", str(tmp_path / EXAMPLES[tree]), "--probseg")
    app(root, out, "group")
    assert errors_of(out) == []
    scans = sorted(path for path in root.glob("sub-*/**/*_T1w.nii*"))
    masks = [name for name in files(out) if name.endswith("_dseg.nii.gz")]
    assert len(masks) == len(scans) > 2
    for scan in scans:
        stem = scan.name.partition("_T1w")[0]
        anat = out / scan.parent.relative_to(root)
        mask, image = nib.load(anat / f"{stem}_space-orig_desc-icl_dseg.nii.gz"), nib.load(scan)
        assert mask.shape == image.shape and np.array_equal(mask.affine, image.affine)
        assert table(anat / f"{stem}_space-orig_desc-icl_dseg.tsv") == [
            {"index": str(value), "name": name} for value, name in NAMES.items()
        ]
        said = json.loads((anat / f"{stem}_space-orig_desc-icl_dseg.json").read_text())
        assert said["Sources"] == [f"bids:raw:{scan.relative_to(root)}"]
        assert len(said["Contexts"]) in (2, 3) and all(name.startswith("bids:") for name in said["Contexts"])
        voxels = int((np.asarray(mask.dataobj) == 1).sum())
        assert said["Labels"]["1"]["VolumeMM3"] == voxels and 0 <= said["Labels"]["1"]["ExpectedDice"] <= 1
        assert (anat / f"{stem}_space-orig_label-LeftCaudate_desc-icl_probseg.nii.gz").is_file()
        page = (out / f"{stem.split('_')[0]}.html").read_text()
        assert f"{stem.split('_')[0]}/figures/{stem}_T1w.png" in page
    rows = table(out / "group_volumes.tsv")
    assert [row["segmentation"] for row in rows] == masks
    assert {row["participant_id"] for row in rows} == {scan.name.split("_")[0] for scan in scans}
    assert all(float(row["Left-Caudate"]) >= 0 for row in rows)


def test_participants_sessions_and_a_filter_choose(app, tmp_path):
    root, out = TREES["sessions"](tmp_path), tmp_path / "out"
    (tmp_path / "filter.json").write_text(json.dumps({"t1w": {"run": "2"}}))
    chosen = ["--participant_label", "02", "sub-01", "--session-label", "1", "--skip_self_test"]
    app(
        root,
        out,
        "--examples",
        str(tmp_path / "examples"),
        *chosen,
        "--bids_filter_file",
        str(tmp_path / "filter.json"),
    )
    assert [name for name in files(out) if name.endswith("_dseg.nii.gz")] == [
        f"sub-{s}/ses-1/anat/sub-{s}_ses-1_run-2_space-orig_desc-icl_dseg.nii.gz" for s in ("01", "02")
    ]
    said = json.loads((out / "sub-01/ses-1/anat/sub-01_ses-1_run-2_space-orig_desc-icl_dseg.json").read_text())
    assert said["Labels"]["1"]["ExpectedDice"] is None


def test_shards_together_are_the_whole_and_a_second_run_does_nothing_again(app, tmp_path):
    root, out, work = plain(tmp_path), tmp_path / "out", tmp_path / "work"
    typed = ["--examples", str(root / EXAMPLES["plain"].partition("/")[2]), "--work_dir", str(work), "--skip_self_test"]
    app(root, out, *typed, "--shard", "1/2")
    assert [name for name in files(out) if name.endswith(".html")] == ["sub-01.html", "sub-03.html"]
    app(root, out, *typed, "--shard", "2/2")
    masks = [path for path in out.rglob("*_dseg.nii.gz") if ".neuroverse3d" not in path.parts]
    assert len(masks) == 4 and not (out / ".neuroverse3d" / "work").exists()
    made = {path: os.stat(path).st_mtime_ns for path in work.rglob("*.nii.gz")}
    corrected = nib.Nifti1Image(np.ones((20, 20, 20), np.uint8), np.eye(4))
    nib.save(corrected, masks[0])
    app(root, out, *typed)
    assert {path: os.stat(path).st_mtime_ns for path in work.rglob("*.nii.gz")} == made
    assert np.asarray(nib.load(masks[0]).dataobj).all()  # somebody's work is kept


def test_other_weights_and_other_scans_are_not_written_over_unasked(app, tmp_path):
    root, out = plain(tmp_path), tmp_path / "out"
    typed = ["--examples", str(root / "derivatives" / "manual"), "--participant_label", "03", "--skip_self_test"]
    app(root, out, *typed)
    shutil.copy(root / "sub-02/anat/sub-02_FLAIR.nii.gz", root / "sub-03/anat/sub-03_FLAIR.nii.gz")
    with pytest.raises(FileExistsError, match=r"made of bids:raw:sub-03/anat/sub-03_T1w.nii.gz: give another OUT"):
        app(root, out, "--examples", str(root), *typed[2:], "--suffix", "FLAIR")
    others = tmp_path / "others.pt"
    atomic_save(Neuroverse3D(channels=(4, 8), spatial_size=16).state_dict(), others)
    with pytest.raises(FileExistsError, match="by other examples, weights or settings: give another OUT"):
        app(root, out, *typed, "--work_dir", str(tmp_path / "work"), checkpoint=others)
    app(root, out, *typed, "--work_dir", str(tmp_path / "work"), "--overwrite", checkpoint=others)


def test_a_scan_that_cannot_be_read_keeps_none_of_the_others(app, tmp_path):
    root, out = plain(tmp_path), tmp_path / "out"
    (root / "sub-04" / "anat" / "sub-04_T1w.nii.gz").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="1 targets were left out: sub-04_T1w"):
        app(root, out, "--examples", str(root), "--skip_bids_validation", "--skip_self_test")
    assert len([name for name in files(out) if name.endswith("_dseg.nii.gz")]) == 3
    assert "sub-04_T1w" in (out / "sub-04.html").read_text()
    app(root, out, "group")
    assert len(table(out / "group_volumes.tsv")) == 3


@needs_validator
def test_a_dataset_with_errors_is_refused_unless_that_is_waived(app, tmp_path):
    root = plain(tmp_path)
    shutil.copy(root / "sub-01/anat/sub-01_T1w.nii.gz", root / "sub-01/anat/sub-01_mine.nii.gz")
    with pytest.raises(DatasetError, match=r"no valid BIDS dataset: .*sub-01_mine.*--skip_bids_validation"):
        app(root, tmp_path / "out", "--examples", str(root))
    assert not (tmp_path / "out").exists()
    app(root, tmp_path / "out", "--examples", str(root), "--skip-bids-validation", "--skip_self_test")


@pytest.mark.parametrize(
    "typed",
    [
        [],
        ["--examples", "x", "--colour", "red"],
        ["--examples", "x", "--context_size"],
        ["--examples", "x", "--context_size", "many"],
        ["--examples", "x", "--output_dir", "y"],
    ],
)
def test_a_command_that_is_not_understood_has_status_2(tmp_path, typed):
    root = plain(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run([str(root), str(tmp_path / "out"), "participant", *typed])
    assert caught.value.code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "typed", "message"),
    [
        ("plain", ["participant"], "is the dataset itself"),
        ("out", ["participant", "--participant_label", "7"], "has no subject 7; it has 01, 02, 03, 04"),
        ("out", ["group"], "no segmentations of any subject: run participant first"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, out, typed, message):
    root = plain(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        run([str(root), str(tmp_path / out), *typed, "--examples", str(root), "--skip_bids_validation"])
    with pytest.raises(FileNotFoundError, match="is no BIDS dataset"):
        run([str(tmp_path / "none"), str(tmp_path / out), *typed])
    assert not (tmp_path / "out").exists()
