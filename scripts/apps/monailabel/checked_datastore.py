"""A folder of studies that gives and takes nothing but scans and annotations that can be used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException
from monailabel.utils.others.generic import file_ext

from scripts.apps.monailabel.annotations import FINAL, given_names
from scripts.apps.monailabel.statuses import AlreadyThereError, NotFoundError, clear_statuses
from scripts.apps.monailabel.uploads import (
    SCANS,
    check_file,
    check_new_name,
    check_scan,
    check_tag,
    incoming,
    leads_elsewhere,
)
from scripts.data.integrity import examine
from scripts.data.volumes import load_exact, load_volume


class CheckedDatastore(LocalDatastore):
    """MONAI Label's local datastore, which looks at what it is given before it stores it.

    A scan or annotation is a file in the folder of studies; links that lead out of it are passed over.

    Args:
        studies: the folder.
        extensions: patterns of file names; those of other files than scans are left out.
        options: as in the base class.
    """

    passed_over: tuple[str, ...] = ()
    """A line for each thing that was found and is not used, with the reason."""

    def __init__(self, studies: str, extensions: list[str], **options: Any) -> None:
        super().__init__(studies, extensions=[e for e in extensions if e.endswith(SCANS)], **options)

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """As the base class; a scan that is there already is not replaced.

        Raises:
            HTTPException: 409 there is one of this name, 422 no plain name, or no scan.
        """
        with incoming(image_filename):
            name, ending = self._to_id(os.path.basename(image_filename))
            image_id = image_id or name
            check_new_name(image_id)
            _check_info(image_info)
            there = [other for other in SCANS if os.path.lexists(self._image_file(image_id, other))]
            if there or image_id in self.list_images():
                raise AlreadyThereError(f"there is a scan {image_id!r} already: remove it first, or give another name")
            check_scan(image_filename)
            if ending not in SCANS:
                raise ValueError(f"a file must end in {', '.join(SCANS)}")
            return super().add_image(image_id, image_filename, image_info)

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As the base class.

        Raises:
            HTTPException: 404 no such image, 422 no tag, or an annotation that is not of this image's voxels, is no
                label map, or (finished ones) gives a label number another name than the annotations before it.
        """
        with incoming(label_filename):
            check_tag(label_tag)
            _check_info(label_info)
            image = self.get_image_uri(image_id)
            if not image:
                raise ImageNotFoundException(f"no image {image_id!r} among the studies")
            check_file(label_filename)
            folder = self._datastore.label_path(label_tag)
            if not all(self._is_inside(os.path.join(folder, image_id + ending)) for ending in SCANS):
                raise ValueError(f"{label_tag!r} is no tag: its folder is not among the studies")
            found = examine(load_volume(image), load_exact(label_filename), "label")
            if found["problems"]:
                raise ValueError(f"not saved, for it is no annotation of {image_id}: {'; '.join(found['problems'])}")
            if label_tag == FINAL:
                self._check_names(image_id, given_names(label_info or {}), list(found["values"]))
            return self._keep_label(image_id, label_filename, label_tag, label_info or {})

    @clear_statuses()
    def remove_label(self, label_id: str, label_tag: str) -> None:
        """As the base class.

        Raises:
            HTTPException: 404 no such label.
        """
        if not self.get_label_uri(label_id, label_tag):
            raise LabelNotFoundException(f"no label {label_tag!r} of {label_id!r}")
        super().remove_label(label_id, label_tag)

    @clear_statuses()
    def remove_image(self, image_id: str) -> None:
        """As the base class.

        Raises:
            HTTPException: 404 no such image.
        """
        if not self.get_image_uri(image_id):
            raise ImageNotFoundException(f"no image {image_id!r} among the studies")
        super().remove_image(image_id)

    @clear_statuses()
    def update_image_info(self, image_id: str, info: dict[str, Any]) -> None:
        """As the base class.

        Raises:
            HTTPException: 404 no such image, 422 no JSON object.
        """
        _check_info(info)
        super().update_image_info(image_id, info)

    @clear_statuses()
    def update_label_info(self, label_id: str, label_tag: str, info: dict[str, Any]) -> None:
        """As the base class.

        Raises:
            HTTPException: 404 no such label, 422 no JSON object.
        """
        _check_info(info)
        super().update_label_info(label_id, label_tag, info)

    def get_image_uri(self, image_id: str) -> str:
        """Path of a scan; empty if there is none of this id, or not in the folder."""
        return self._if_inside(super().get_image_uri(image_id))

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """Path of an annotation; empty if there is none, or not in the folder."""
        return self._if_inside(super().get_label_uri(label_id, label_tag))

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Finished annotations and their scans, as the base class."""
        return [entry for entry in super().datalist(full_path) if all(map(self._is_inside, entry.values()))]

    @clear_statuses()
    def get_dataset_archive(self, limit_cases: int | None) -> str:
        """As the base class.

        Raises:
            HTTPException: 404 no finished annotation.
        """
        if not self.datalist():
            raise NotFoundError("no finished annotation")
        return super().get_dataset_archive(limit_cases)

    def _keep_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """Store what was found to be sound."""
        return super().save_label(image_id, label_filename, label_tag, label_info)

    def _check_names(self, image_id: str, names: dict[int, str], values: list[int]) -> None:
        for other in self.get_labeled_images():
            known = given_names(self.get_label_info(other, FINAL)) if other != image_id else {}
            clashing = sorted(v for v in values if v in names and known.get(v, names[v]) != names[v])
            if clashing:
                value = clashing[0]
                raise ValueError(
                    f"not saved: label {value} is called {names[value]!r} here and {known[value]!r} in {other}. Keep "
                    "the segments and their order as they were proposed, empty ones too, and add new ones at the end"
                )

    def _image_file(self, image_id: str, ending: str) -> str:
        return os.path.join(self._datastore.image_path(), image_id + ending)

    def _to_id(self, file: str) -> tuple[str, str]:
        """Id and ending; the base class cuts the ending's letters out of the middle as well."""
        endings = (extension.replace("*", "") for extension in self._extensions)
        ending = max((e for e in endings if file.endswith(e)), key=len, default=file_ext(file))
        return file.removesuffix(ending), ending

    def _list_files(self, path: str, patterns: list[str]) -> dict[str, str]:
        found = super()._list_files(path, patterns)
        named = {name: file for name, file in found.items() if not leads_elsewhere(name) and _is_text(name)}
        return {name: file for name, file in named.items() if self._if_inside(os.path.join(path, file))}

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Read the list of scans and labels, without names that are not of files in the folder."""
        super()._init_from_datastore_file(throw_exception)
        for image_id, entry in list(self._datastore.objects.items()):
            for tag, label in list(entry.labels.items()):
                if not self._if_inside(os.path.join(self._datastore.label_path(tag), image_id + label.ext)):
                    del entry.labels[tag]
            if not self._if_inside(self._image_file(image_id, entry.image.ext)):
                del self._datastore.objects[image_id]

    def _if_inside(self, path: str) -> str:
        return path if path and os.path.isfile(path) and self._is_inside(path) else ""

    def _is_inside(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self._datastore_path))


def _is_text(name: str) -> bool:
    """Whether a file name is UTF-8: the list of scans is JSON."""
    return name.encode(errors="replace").decode() == name


def _check_info(info: Any) -> None:
    if info is not None and not isinstance(info, dict):
        raise ValueError("what is said of a scan or label must be a JSON object")
    if not isinstance((info or {}).get("strategy", {}), dict):  # MONAI Label notes there what it proposed
        raise ValueError("strategy must be a JSON object")
