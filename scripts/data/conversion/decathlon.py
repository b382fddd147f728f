"""Task folders of the Medical Segmentation Decathlon -> cases.

Antonelli et al. 2022, Nature Communications 13:4128, http://medicaldecathlon.com. Several modalities lie along the
fourth axis of one file; ``dataset.json`` names them and the labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
from nibabel.filebasedimages import ImageFileError

from scripts.data.conversion.pairing import ImageFile, RawCase, RawDataset, existing_folder, make_cases, mark_clashes
from scripts.data.files import DatasetError, image_files, read_json
from scripts.data.volumes import strip_ending


def read_decathlon(root: str | Path, masks: bool = True) -> RawDataset:
    """The cases of a task folder; those of ``imagesTs`` have no masks.

    Args:
        root: folder with ``imagesTr``, ``labelsTr``, ``dataset.json`` and maybe ``imagesTs``.
        masks: False leaves the labels out.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        DatasetError: ``dataset.json`` is missing or not readable.
    """
    root = existing_folder(root)
    modalities, labels = _describe(root / "dataset.json")
    training = _images(root / "imagesTr", len(modalities))
    if not training:
        raise FileNotFoundError(f"{root / 'imagesTr'} holds no images: --source decathlon takes a task folder")
    label_files = {key: [image.path for image in files] for key, files in _images(root / "labelsTr", 1).items()}
    cases = make_cases(root, [training], label_files if masks else None, ["imagesTr"], "labelsTr")
    test = make_cases(root, [_images(root / "imagesTs", len(modalities))], None, ["imagesTs"], None)
    cases += [replace(case, test=True) for case in test]
    checked = [_check_channels(case, modalities) for case in cases]
    return RawDataset(root, mark_clashes(checked, root), modalities, labels if masks else None)


def _describe(path: Path) -> tuple[tuple[str, ...], dict[int, str]]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing: --source decathlon takes a task folder")
    content = read_json(path, dict, "it has no readable 'modality' and 'labels' of the Decathlon")
    try:
        if "channel_names" in content:
            raise DatasetError(f"{path} describes an nnU-Net dataset already: give its folder as --dataset_dir")
        modality = {int(number): str(name) for number, name in content["modality"].items()}
        labels = {int(value): str(name) for value, name in content["labels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} has no readable 'modality' and 'labels' of the Decathlon: {error!r}") from error
    if sorted(modality) != list(range(len(modality))) or not modality:
        raise DatasetError(f"{path}: 'modality' must number its entries 0, 1, …, got {sorted(modality)}")
    return tuple(modality[number] for number in sorted(modality)), labels


def _images(folder: Path, channels: int) -> dict[tuple[str], list[ImageFile]]:
    """(name,) -> files; hidden ones, such as the ``._*`` of the published archives, are no images."""
    found: dict[tuple[str], list[ImageFile]] = {}
    for path in image_files(folder):
        found.setdefault((strip_ending(path),), []).append(ImageFile(path, channels))
    return found


def _check_channels(case: RawCase, modalities: tuple[str, ...]) -> RawCase:
    for image in case.images:
        try:
            shape = nib.load(image.path).shape
        except (ImageFileError, OSError, EOFError, ValueError) as error:
            problem = f"image {image.path.name} cannot be read ({' '.join(str(error).split())})"
        else:
            count = shape[3] if len(shape) == 4 else 1 if len(shape) == 3 else 0
            if count == len(modalities):
                continue
            problem = f"{image.path.name} of shape {shape} is not {len(modalities)} channels ({', '.join(modalities)})"
        case = replace(case, problems=(*case.problems, problem))
    return case
