"""A folder of studies that takes no annotation that could not serve as a context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.exception import ImageNotFoundException

from scripts.apps.monailabel.annotations import FINAL, given_names
from scripts.apps.monailabel.statuses import clear_statuses
from scripts.data.integrity import examine
from scripts.data.volumes import load_exact, load_volume


class CheckedDatastore(LocalDatastore):
    """MONAI Label's local datastore, which looks at a finished annotation before it replaces an earlier one."""

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any]) -> str:
        """As the base class.

        Raises:
            HTTPException: 404 no such image, 422 an annotation that is not of this image's voxels, is no label map,
                or gives a label number another name than the annotations before it.
        """
        with clear_statuses():
            if not self.get_image_uri(image_id):
                raise ImageNotFoundException(f"no image {image_id!r} among the studies")
            if Path(label_tag).name != label_tag:
                raise ValueError(f"{label_tag!r} is no tag: a plain word is needed")
            if label_tag == FINAL:
                self._check(image_id, label_filename, given_names(label_info or {}))
        return super().save_label(image_id, label_filename, label_tag, label_info)

    def _check(self, image_id: str, label_filename: str, names: dict[int, str]) -> None:
        image, label = load_volume(self.get_image_uri(image_id)), load_exact(label_filename)
        found = examine(image, label, "label")
        if found["problems"]:
            raise ValueError(f"not saved, for it is no annotation of {image_id}: {'; '.join(found['problems'])}")
        for other in self.get_labeled_images():
            known = given_names(self.get_label_info(other, FINAL)) if other != image_id else {}
            clashing = sorted(v for v in found["values"] if v in names and known.get(v, names[v]) != names[v])
            if clashing:
                value = clashing[0]
                raise ValueError(
                    f"not saved: label {value} is called {names[value]!r} here and {known[value]!r} in {other}. Keep "
                    "the segments and their order as they were proposed, empty ones too, and add new ones at the end"
                )
