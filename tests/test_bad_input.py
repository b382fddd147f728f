"""Bad input of every kind: what a run says and does."""

import errno
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.synthesis.cohort_writer import write_cohorts
from scripts.inference import native_nifti
from scripts.inferer import ICLInferer
from scripts.networks import Neuroverse3D
from scripts.runtime.commandline import root_cause
from tests.workflows import run_workflow

SIZE = 16
FAULTY = {  # a faulty file -> what is said of it; ... stands for anything
    "truncated file": "cannot be read (Compressed file ended before the end-of-stream marker was reached)",
    "truncated file, not compressed": "cannot be read (Expected 8192 bytes, got 1648 bytes from ...)",
    "empty file": "cannot be read (Empty file: ...)",
    "file that is no image": "cannot be read (File ... is not a gzip file)",
    "4D series": "must be one 3D volume, got shape (16, 16, 16, 5): save each volume or channel ...",
    "three channels in one file": "must be one 3D volume, got shape (16, 16, 16, 3): ...",
    "2D image": "must be one 3D volume, got shape (16, 16): ...",
    "image of one voxel": "must be one 3D volume, got (1, 1, 1) voxels, a point or a line: is it the right file?",
    "colours": "holds colours (RGB): convert it to one grey value per voxel",
    "NaN voxels": "holds NaN or infinite voxels: replace them, or take the scan anew from its source",
    "infinite voxels": "holds NaN or infinite voxels: ...",
    "constant image": "is constant (every voxel is 7): is it the right file?",
    "zero spacing": "has voxels of 0 mm: mend the spacing in its header",
    "spacing in metres": "has voxels of 1e+03 x 1e+03 x 1e+03 mm, not within 0.01 to 50 mm: mend the spacing ...",
    "singular affine": "has a singular affine (...): set its sform or qform anew",
}
REFUSED = {  # what is found before the first target -> the error
    "no contexts": "no contexts: give --context_dir, ... or --context_images and --context_labels, or --context_file",
    "empty context folder": "imagesTr holds no images",
    "context image without label": "label file is missing",
    "label with fractions": "label holds values that are no label numbers: [0.5]",
    "label on other voxels": "image and label differ in shape: (16, 16, 16) and (8, 8, 8)",
    "all label maps all background": "the contexts have no label other than background: ...",
    'unknown label, --labels "[1,9]"': "labels [9] are in none of the 2 contexts, which have [1, 2]",
    "a channel the contexts lack, --channel 3": "imagesTr has no files of channel 0003 (channels there: [0])",
    "a channel the targets lack": "no image files in ... (channel 0003 of an nnU-Net folder, else any image)",
    "no targets": "no file or folder ...: --dataset_dir takes the images to segment",
    "weights missing": "no checkpoint at ...: give --checkpoint / --source an existing file",
    "weights cut short": "... is not a readable checkpoint: it is truncated or of another format",
    "weights of another kind of network": "... is not a Neuroverse3D checkpoint: '...' is missing",
    "weights of other widths than --channels": "--channels (8, 16) contradicts ..., which has (4, 8); leave ...",
    "a GPU that is not there": "PyTorch sees ... GPUs, so there is no cuda:64: give cpu or ...",
    "a device that does not exist, --device gpu": "no device is called gpu: give cuda, cuda:1 or cpu",
    "output folder that cannot be written": "cannot write into ... (...): give another --output_dir or free some space",
}
DONE = {  # what is not -> what log or error says, exit status, masks
    "one context": ("only 1 contexts where --context_size is 8", 0, 1),
    "one context, --self_test true": ("no self-test: it needs two contexts or more with a label in common", 0, 1),
    "one label map all background": ("no label other than background in ...: not used", 0, 1),
    "output folder that becomes full": (
        "... takes no more files (No space left on device): free some space and ...; 1 targets are done",
        1,
        1,
    ),
    "spaces and other alphabets in every path": ("", 0, 1),
    "10,000 target files, --shard 1/5000": ("2 targets of shard 1/5000", 0, 2),
}
RUNS = {name: (message, 1, 0) for name, message in REFUSED.items()} | DONE
IN_THE_REPORT = {"one context", "one label map all background"}


def pattern(message):
    """A message as a pattern; ... stands for anything."""
    return re.escape(message).replace(r"\.\.\.", ".*")


# --- faulty files


def header_of(scan, **fields):
    """The bytes of a NIfTI file with some header fields set, which nibabel would not write."""
    image = nib.load(scan)
    header = image.header.copy()
    for name, value in fields.items():
        header[name] = value
    return header.structarr.tobytes() + bytes(4) + np.asarray(image.dataobj).tobytes(order="F")


def written(change):
    """A maker that changes voxels and affine."""

    def make(scan, path):
        image = nib.load(scan)
        voxels, affine = change(image.get_fdata(dtype=np.float32), image.affine)
        nib.save(nib.Nifti1Image(voxels, affine), path)

    return make


def with_voxel(value):
    def change(voxels, affine):
        voxels[3, 4, 5] = value
        return voxels, affine

    return written(change)


RGB = [(colour, "u1") for colour in "RGB"]
MAKERS = {  # name of the row: (ending of the file, what makes it from the path of a sound scan)
    "truncated file": (".nii.gz", lambda scan, path: path.write_bytes(scan.read_bytes()[:2000])),
    "truncated file, not compressed": (
        ".nii",
        lambda scan, path: path.write_bytes(gzip.decompress(scan.read_bytes())[:2000]),
    ),
    "empty file": (".nii.gz", lambda scan, path: path.touch()),
    "file that is no image": (".nii.gz", lambda scan, path: path.write_text("minutes of the last meeting")),
    "4D series": (".nii.gz", written(lambda voxels, affine: (np.stack([voxels] * 5, -1), affine))),
    "three channels in one file": (".nii.gz", written(lambda voxels, affine: (np.stack([voxels] * 3, -1), affine))),
    "2D image": (".nii.gz", written(lambda voxels, affine: (voxels[:, :, 8], affine))),
    "image of one voxel": (".nii.gz", written(lambda voxels, affine: (voxels[:1, :1, :1], affine))),
    "colours": (".nii.gz", written(lambda voxels, affine: (np.zeros(voxels.shape, RGB), affine))),
    "NaN voxels": (".nii.gz", with_voxel(np.nan)),
    "infinite voxels": (".nii.gz", with_voxel(np.inf)),
    "constant image": (".nii.gz", written(lambda voxels, affine: (0 * voxels + 7, affine))),
    "zero spacing": (
        ".nii",
        lambda scan, path: path.write_bytes(header_of(scan, sform_code=0, qform_code=0, pixdim=[1, *[0] * 7])),
    ),
    "spacing in metres": (".nii.gz", written(lambda voxels, affine: (voxels, np.diag([1000, 1000, 1000, 1])))),
    "singular affine": (".nii", lambda scan, path: path.write_bytes(header_of(scan, srow_y=[1, 0, 0, 0]))),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sound cases."""
    folder = tmp_path_factory.mktemp("data")
    write_cohorts(folder, cohorts=1, subjects=3, spatial_size=SIZE, num_labels=2, progress=False)
    return folder / "Dataset900_Synthetic000"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=SIZE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def faulty(data, tmp_path_factory):
    """A faulty file for every row, and a sound one."""
    folder = tmp_path_factory.mktemp("targets")
    scan = images(data)[0]
    for name, (ending, make) in MAKERS.items():
        make(scan, folder / (name + ending))
    write_shifted(scan, folder / "sound.nii.gz")
    return folder


def images(root):
    return sorted((root / "imagesTr").iterdir())


def labels(root):
    return sorted((root / "labelsTr").iterdir())


def write_shifted(scan, path):
    """Another scan."""
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 1, 0), image.affine), path)


def test_every_row_is_tried():
    assert FAULTY.keys() == MAKERS.keys() and RUNS.keys() == SETUPS.keys()


def test_faulty_targets_are_left_out_and_the_others_done(data, weights, faulty, tmp_path):
    options = {"dataset_dir": faulty, "context_dir": data, "checkpoint": weights, "output_dir": tmp_path / "out"}
    options["align"] = "off"
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {len(FAULTY)} targets were left out: ")
    assert report["failed"].keys() == FAULTY.keys() and list(report["cases"]) == ["sound"]
    wrong = {
        name: why for name, (why,) in report["failed"].items() if not re.search(pattern(FAULTY[name]), why)
    }  # fmt: skip
    assert not wrong
    assert {path.name for path in (tmp_path / "out").glob("*.[np]*")} >= {"sound.nii.gz", "sound.png"}
    assert not [path for name in FAULTY for path in (tmp_path / "out").glob(f"{name}*")]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in FAULTY)


def test_faulty_contexts_are_all_named_or_left_out(data, weights, faulty, tmp_path):
    root = tmp_path / "Dataset001_Faulty"
    shutil.copytree(data, root)
    for name, (ending, _) in MAKERS.items():
        shutil.copy(faulty / (name + ending), root / "imagesTr" / f"{name}_0000{ending}")
        shutil.copy(labels(data)[0], root / "labelsTr" / f"{name}.nii.gz")
    options = {"dataset_dir": str(faulty / "sound.nii.gz"), "context_dir": str(root), "checkpoint": str(weights)}
    options |= {"output_dir": str(tmp_path / "out"), "device": "cpu", "overlays": False}
    with pytest.raises(ValueError, match=f"^{len(FAULTY)} of {len(FAULTY) + 3} cases are faulty") as caught:
        run_workflow("inference", **options)
    for name, message in FAULTY.items():
        assert re.search(f"{root.name}/{name}: .*{pattern(message)}", str(caught.value)), name
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    run_workflow("inference", **options, skip_bad_cases=True)
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["contexts"]) == 3


@pytest.mark.parametrize("name", MAKERS)
def test_faulty_files_in_python(data, weights, faulty, name):
    predictor = ICLInferer(weights, device="cpu", align="off")
    path = faulty / (name + MAKERS[name][0])
    with pytest.raises(ValueError, match=pattern(FAULTY[name])):
        predictor.set_context([*images(data)[:1], path], labels(data)[:2])
    predictor.set_context(images(data), labels(data))
    with pytest.raises(ValueError, match=pattern(FAULTY[name])):
        predictor.predict(path)
    assert predictor.predict(faulty / "sound.nii.gz").shape == (1, SIZE, SIZE, SIZE)


# --- everything else: what is set up in a folder of its own -> options of the run


def copied(data, folder):
    return Path(shutil.copytree(data, folder / "Dataset001_Copy"))


def one_context(data, folder, **options):
    root = copied(data, folder)
    for path in (*images(root)[1:], *labels(root)[1:]):
        path.unlink()
    return {"context_dir": root, "context_size": 8} | options


def with_label(change, which=slice(1)):
    """Label maps of the contexts changed."""

    def setup(data, folder, monkeypatch):
        root = copied(data, folder)
        for path in labels(root)[which]:
            image = nib.load(path)
            voxels = change(image.get_fdata(dtype=np.float32))
            path.unlink()
            if voxels is not None:
                nib.save(nib.Nifti1Image(voxels, image.affine), path)
        return {"context_dir": root}

    return setup


def empty_context_folder(data, folder, monkeypatch):
    (folder / "Dataset001_Empty" / "imagesTr").mkdir(parents=True)
    return {"context_dir": folder / "Dataset001_Empty"}


def channel_of_targets(data, folder, monkeypatch):
    scans = folder / "imagesTs"
    scans.mkdir()
    shutil.copy(images(data)[0], scans / "scan_0000.nii.gz")
    root = copied(data, folder)
    for path in images(root):
        path.rename(str(path).replace("_0000", "_0003"))
    return {"dataset_dir": scans, "context_dir": root, "channel": 3}


def cut_weights(data, folder, monkeypatch):
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=SIZE).state_dict(), folder / "model.pt")
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:3000])
    return {"checkpoint": folder / "model.pt"}


def other_weights(data, folder, monkeypatch):
    torch.save(torch.nn.Conv3d(1, 2, 3).state_dict(), folder / "model.pt")
    return {"checkpoint": folder / "model.pt"}


def unwritable(data, folder, monkeypatch):
    (folder / "a file").touch()  # permissions do not hold for root
    return {"output_dir": folder / "a file"}


def becoming_full(data, folder, monkeypatch):
    scans = folder / "scans"
    scans.mkdir()
    write_shifted(images(data)[0], scans / "first.nii.gz")
    write_shifted(images(data)[1], scans / "second.nii.gz")
    plain = native_nifti.save_native

    def write(answer, filename):
        if "second" in str(filename):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(answer, filename)

    monkeypatch.setattr(native_nifti, "save_native", write)
    return {"dataset_dir": scans}


def other_alphabets(data, folder, monkeypatch):
    place = folder / "Ärzte 脳 мозг" / "a b"
    place.mkdir(parents=True)
    root = Path(shutil.copytree(data, place / "Dataset001_Köpfe"))
    write_shifted(images(data)[0], place / "größer, 2.nii.gz")
    torch.save(Neuroverse3D(channels=(4, 8), spatial_size=SIZE).state_dict(), place / "gewichte ö.pt")
    options = {"dataset_dir": place / "größer, 2.nii.gz", "context_dir": root, "overlays": True}
    return options | {"checkpoint": place / "gewichte ö.pt", "output_dir": place / "ergebnis é"}


def ten_thousand(data, folder, monkeypatch):
    scans = folder / "scans"
    scans.mkdir()
    write_shifted(images(data)[0], scans / "scan_00000.nii.gz")
    for number in range(1, 10_000):
        os.link(scans / "scan_00000.nii.gz", scans / f"scan_{number:05d}.nii.gz")
    return {"dataset_dir": scans, "shard": "1/5000"}


def only(**options):
    return lambda data, folder, monkeypatch: options


SETUPS = {
    "no contexts": only(context_dir=None),
    "empty context folder": empty_context_folder,
    "one context": lambda data, folder, monkeypatch: one_context(data, folder),
    "one context, --self_test true": lambda data, folder, monkeypatch: one_context(
        data, folder, self_test=True, ensemble=2
    ),
    "context image without label": with_label(lambda label: None),
    "label with fractions": with_label(lambda label: 0.5 * (label > 0)),
    "label on other voxels": with_label(lambda label: label[:8, :8, :8]),
    "one label map all background": with_label(lambda label: 0 * label),
    "all label maps all background": with_label(lambda label: 0 * label, slice(None)),
    'unknown label, --labels "[1,9]"': only(labels="[1,9]"),
    "a channel the contexts lack, --channel 3": only(channel=3),
    "a channel the targets lack": channel_of_targets,
    "no targets": only(dataset_dir="/nowhere"),
    "weights missing": only(checkpoint="/nowhere/model.pt"),
    "weights cut short": cut_weights,
    "weights of another kind of network": other_weights,
    "weights of other widths than --channels": only(channels=[8, 16]),
    "a GPU that is not there": only(device="cuda:64"),
    "a device that does not exist, --device gpu": only(device="gpu"),
    "output folder that cannot be written": unwritable,
    "output folder that becomes full": becoming_full,
    "spaces and other alphabets in every path": other_alphabets,
    "10,000 target files, --shard 1/5000": ten_thousand,
}


@pytest.mark.parametrize("name", SETUPS)
def test_what_a_run_says_and_does(name, data, weights, faulty, tmp_path, monkeypatch, capfd):
    message, status, masks = RUNS[name]
    fixed = {"dataset_dir": faulty / "sound.nii.gz", "context_dir": data, "checkpoint": weights, "context_size": 2}
    options = fixed | {"output_dir": tmp_path / "out", "device": "cpu", "overlays": False}
    options |= SETUPS[name](data, tmp_path, monkeypatch)
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    if status:
        with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
            run_workflow("inference", **options)
        assert re.search(pattern(message), str(root_cause(caught.value)))
    else:
        run_workflow("inference", **options)
        assert re.search(pattern(message), "".join(capfd.readouterr()))
    out = Path(options["output_dir"])
    answers = {path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz")}
    reports = [out / "report.json", *out.glob("shards/report-*.json")] if out.is_dir() else []
    found = [json.loads(path.read_text(encoding="utf-8")) for path in reports if path.is_file()]
    if not masks:
        assert not answers and not found
        return
    (report,) = found
    assert answers == report["cases"].keys() and not report["failed"] and report["finished"] == (not status)
    assert len(answers) == masks
    if name in IN_THE_REPORT:
        assert any(re.search(pattern(message), warning) for warning in report["warnings"])
