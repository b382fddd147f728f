"""Raw cases -> an nnU-Net version 2 dataset, whole or not at all.

Every file is read and checked before the dataset is written; then voxels, affine and data type are kept as they
are. https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md describes the layout.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.utils import optional_import
from tqdm import tqdm

from scripts.data.conversion.dicom import write_series
from scripts.data.conversion.pairing import DicomSeries, ImageFile, RawCase, RawDataset
from scripts.data.grids import on_axes_of
from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import Case, DatasetError
from scripts.data.volumes import VolumeError, check_packing, load_labels, load_volume
from scripts.runtime.atomic_files import write_json
from scripts.runtime.output_folder import check_folder, put_folder_in_place

_ENDING = ".nii.gz"


@dataclass(frozen=True)
class WrittenDataset:
    """What a conversion made.

    Attributes:
        folder: the dataset.
        training: number of training cases.
        test: number of test cases.
        labels: name -> label value, background left out; None without masks.
        cases_with: label value -> number of cases that have it.
    """

    folder: Path
    training: int
    test: int
    labels: dict[str, int] | None
    cases_with: dict[int, int]


def write_dataset(
    raw: RawDataset,
    folder: str | Path,
    label_names: Mapping[int, str] | None = None,
    skip_bad_cases: bool = False,
    overwrite: bool = False,
) -> WrittenDataset:
    """Check all cases, then write them as ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz``, ``dataset.json``.

    Args:
        raw: the cases. With label names of their own, other label values are faults.
        folder: ``DatasetXXX_Name``, in a folder that is made if missing.
        label_names: label value -> name, beside those of ``raw``; a value without a name is called ``label3``.
        skip_bad_cases: leave faulty cases out with a warning instead of raising.
        overwrite: replace the dataset.

    Raises:
        FileExistsError: the dataset, or another one of its number, is there already.
        DatasetError: there are faulty cases (every one is named), or none is left for training.
        ValueError: label names that cannot be told apart, or the dataset would replace its own source.
    """
    folder = Path(folder).absolute()
    _check_free(folder, overwrite)
    _check_not_source(raw, folder)
    pairs = [{"case": c.case, "dataset": folder.name, "problems": list(c.problems), "raw": c} for c in raw.cases]
    cases = [pair["raw"] for pair in sound_cases(pairs, skip_bad_cases)]
    missing = [p for p in (folder.parent, *folder.parent.parents) if not p.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # a hidden sibling: same file system, so that the dataset can be renamed into its place in one step
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prepare-") as staging:
            made, read = Path(staging) / folder.name, Path(staging) / "read"
            names = {**(raw.label_names or {}), **(label_names or {})}
            known = sorted({0, *names}) if raw.label_names is not None else None
            inspected = _inspect(_readable(cases, folder.name, read), known)
            sound = sound_cases(inspected, skip_bad_cases)
            if all(case["raw"].test for case in sound):
                raise DatasetError(f"{raw.root}: no sound case is left for training")
            counts = _cases_with(sound)
            labels = _named(names, sorted(counts))
            _write_cases(sound, made, read)
            training = sum(not case["raw"].test for case in sound)
            description = {
                "name": folder.name.partition("_")[2],
                "channel_names": {str(i): name for i, name in enumerate(raw.channel_names)},
                "labels": {"background": 0} | labels,
                "numTraining": training,
                "file_ending": _ENDING,
            }
            write_json(description, made / "dataset.json")
            put_folder_in_place(made, folder, Path(staging) / "replaced")
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
    masks = any(case["raw"].mask for case in sound)
    return WrittenDataset(folder, training, len(sound) - training, labels if masks else None, counts)


def _check_free(folder: Path, overwrite: bool) -> None:
    number = folder.name.partition("_")[0]
    for found in sorted(folder.parent.glob(f"{number}_*")):
        if found.name != folder.name:  # nnU-Net finds a dataset by its number
            raise FileExistsError(f"{found} has the number of {folder.name}: give another --dataset_id or --output_dir")
    check_folder(folder, overwrite, "--dataset_id")


def _check_not_source(raw: RawDataset, folder: Path) -> None:
    for case in raw.cases:
        for path in (*(source.path for source in case.images), *([case.mask] if case.mask else [])):
            if folder in path.parents or folder.resolve() in (path.resolve(), *path.resolve().parents):
                raise ValueError(
                    f"{folder} holds raw files that it is to be made from ({path}): give another --output_dir"
                )


# --- checking


def _readable(cases: Sequence[RawCase], dataset: str, read: Path) -> list[Case]:
    """Cases for the integrity check: 3D files as they are, everything else converted into the folder ``read``.

    ``images`` has the file of every channel; ``problems`` is there if the conversion failed.
    """
    read.mkdir()
    converted = any(not _is_3d_file(source) for raw in cases for source in raw.images)
    readable = []
    for raw in tqdm(cases, "converting", unit="case", disable=not converted):
        case: Case = {"case": raw.case, "dataset": dataset, "raw": raw, "images": []}
        try:
            for source in raw.images:
                first = len(case["images"])
                names = [f"{raw.case}_{first + i:04d}{_ENDING}" for i in range(source.channels)]
                case["images"] += _as_3d_files(source, [read / name for name in names])
            case["image"] = case["images"][0]
            if raw.mask:
                case["label"] = raw.mask
        except VolumeError as error:
            case["problems"] = [str(error)]
        readable.append(case)
    return readable


def _is_3d_file(source: ImageFile | DicomSeries) -> bool:
    return isinstance(source, ImageFile) and source.channels == 1


def _as_3d_files(source: ImageFile | DicomSeries, paths: Sequence[Path]) -> list[Path]:
    if _is_3d_file(source):
        return [source.path]
    if isinstance(source, DicomSeries):
        write_series(source, paths[0])
    else:
        _split(source.path, paths)
    return list(paths)


def _inspect(cases: Sequence[Case], known_values: list[int] | None) -> list[Case]:
    """The integrity check of images and masks, and of further channels against the first."""
    readable = [case for case in cases if "problems" not in case]
    inspected = inspect_cases([case | {"known_values": known_values} for case in readable])
    for number in range(1, max((len(case["images"]) for case in readable), default=1)):
        pairs = [
            {"image": case["images"][number], "output": case["image"], "channel": number}
            | {"case": case["case"], "dataset": case["dataset"]}
            for case in readable
        ]
        for case, pair in zip(inspected, inspect_cases(pairs), strict=True):
            # "output" is channel 0000, of which what it has alone is known already
            found = [text for text in pair["problems"] if not text.startswith("output ")]
            if pair["reordered"]:  # in nnU-Net's layout all channels are on the same voxels
                found.append("image and output differ in affine: stored along other axes")
            both = "image and channel 0000"
            case["problems"] += [f"channel {number:04d}: {t.replace('image and output', both)}" for t in found]
    return [*inspected, *(case for case in cases if "problems" in case)]


# --- labels


def _cases_with(cases: Sequence[Case]) -> dict[int, int]:
    """Label value -> number of cases that have it."""
    return dict(sorted(Counter(value for case in cases for value in case["values"]).items()))


def _named(names: Mapping[int, str], values: Sequence[int]) -> dict[str, int]:
    """Name -> value for every value that occurs."""
    named: dict[str, int] = {}
    for value in values:
        name = names.get(value, f"label{value}")
        if name.lower() == "background" or name in named:
            raise ValueError(f"label {value} cannot be called {name!r}: every label needs a name of its own")
        named[name] = value
    return named


# --- writing


def _write_cases(cases: Sequence[Case], folder: Path, read: Path) -> None:
    for case in tqdm(cases, "writing", unit="case"):
        images = folder / ("imagesTs" if case["raw"].test else "imagesTr")
        images.mkdir(parents=True, exist_ok=True)
        if "label" in case:  # before its images are moved from where they were read into
            (folder / "labelsTr").mkdir(exist_ok=True)
            path = folder / "labelsTr" / f"{case['case']}{_ENDING}"
            _write_label(case["label"], path, case["image"] if case["reordered"] else None)
        for number, source in enumerate(case["images"]):
            path = images / f"{case['case']}_{number:04d}{_ENDING}"
            if source.parent == read:
                source.rename(path)
            else:
                _write_image(source, path)


def _write_image(source: Path, path: Path) -> None:
    """The same voxels, affine and data type as 3D ``.nii.gz``; NIfTI headers are kept."""
    name = source.name.lower()
    if not name.endswith((".nii", _ENDING)):
        nib.save(_as_nifti(source), path)
    elif len(nib.load(source).shape) != 3:
        _split(source, [path])
    elif name.endswith(_ENDING):
        shutil.copyfile(source, path)
    else:
        with open(source, "rb") as plain, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(plain, packed)


def _write_label(source: Path, path: Path, image: Path | None = None) -> None:
    """The same label values as an integer type, the file itself where it has one; on an image's axes, if one is given.

    Converters of DICOM differ in the direction in which they number rows; the voxels are the same.
    """
    if image is None and source.name.lower().endswith((".nii", _ENDING)):
        stored = nib.load(source)
        scaled = (stored.dataobj.slope, stored.dataobj.inter) != (1, 0)
        if np.issubdtype(stored.get_data_dtype(), np.integer) and not scaled:
            _write_image(source, path)
            return
    volume = load_labels(source)
    if image is not None:
        volume = on_axes_of(volume, load_volume(image))
    values = volume[0].numpy()
    nib.save(_nifti(values.astype(np.min_scalar_type(int(values.max()))), volume.affine.numpy()), path)


def _split(source: Path, paths: Sequence[Path]) -> None:
    """Write the 3D volumes along a NIfTI file's fourth axis, with its header, stored numbers and their scaling."""
    check_packing(source)
    try:
        image = nib.load(source)
        stored = image.dataobj.get_unscaled()
    except Exception as error:  # nibabel, gzip and zlib each raise their own on damaged files
        raise VolumeError(source, f"cannot be read ({' '.join(str(error).split())})") from error
    stored = stored.reshape(*stored.shape[:3], -1)
    for number, path in enumerate(paths):
        volume = nib.Nifti1Image(stored[..., number], image.affine, image.header)
        volume.header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)  # as it is, for stored numbers
        nib.save(volume, path)


def _as_nifti(source: Path) -> nib.Nifti1Image:
    """A 3D file of any kind with its data type."""
    volume = load_volume(source)
    if source.name.lower().endswith(".nrrd"):
        voxels = optional_import("nrrd")[0].read(str(source))[0]
    else:
        voxels = np.asanyarray(nib.load(source).dataobj)
    if voxels.dtype in (np.int64, np.uint64):  # NIfTI readers of others know no such integers
        if voxels.min() < np.iinfo(np.int32).min or voxels.max() > np.iinfo(np.int32).max:
            raise VolumeError(source, "holds integers of more than 32 bits")
        voxels = voxels.astype(np.int32)
    return _nifti(voxels.reshape(volume.shape[1:]), volume.affine.numpy())


def _nifti(voxels: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image
