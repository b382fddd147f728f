"""Writing predictions where the scan is, for every viewer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import MapTransform

from scripts.data.grids import same_place
from scripts.data.volumes import NIFTI_SPACE, NIFTI_SPACE_FIELDS, affine_in_mm
from scripts.runtime.output_folder import write_output

_SCANNER_SPACE = 1


def native_nifti(prediction: MetaTensor) -> nib.Nifti1Image:
    """A prediction as a NIfTI image that lies on its scan in every viewer.

    Some viewers go by the sform and some by the qform; a scan may have both, and different. For a NIfTI scan its
    sform, qform, their codes and the units are taken over as they are. For any other the affine becomes the sform,
    and the qform as well unless it is sheared, which a qform cannot be. The data type is kept, without slope; int64,
    which other readers of NIfTI do not know, becomes uint32.

    Args:
        prediction: ``(1, H, W, D)`` in the scan's own space, with the scan's meta data.
    """
    voxels, affine, meta = prediction[0].cpu().numpy(), np.asarray(prediction.affine, dtype=float), prediction.meta
    if voxels.dtype == np.int64:
        voxels = voxels.astype(np.uint32)
    if NIFTI_SPACE in meta:
        header = nib.Nifti1Header()
        header.set_data_shape(voxels.shape)
        values = np.asarray(meta[NIFTI_SPACE], dtype=np.float64).ravel()
        fields = zip(NIFTI_SPACE_FIELDS.items(), np.cumsum([0, *NIFTI_SPACE_FIELDS.values()]), strict=False)
        for (field, length), first in fields:
            header[field] = values[first : first + length] if length > 1 else values[first]
        known = affine_in_mm(header.get_best_affine(), int(header["xyzt_units"]))
        if same_place(known, affine, voxels.shape):  # not so if moved since it was read
            header.set_data_dtype(voxels.dtype)
            return nib.Nifti1Image(voxels, header.get_best_affine(), header)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, _SCANNER_SPACE)
    image.set_qform(affine, _SCANNER_SPACE)
    if not same_place(image.get_qform(), affine, voxels.shape):
        image.set_qform(None, 0)
    return image


def save_native(prediction: MetaTensor, path: str | Path) -> None:
    """Write :func:`native_nifti` to ``path`` (``.nii.gz``), all of it or nothing.

    Raises:
        FileExistsError: there is a file that this program did not write.
        OSError: the folder cannot be written, or the disk is full.
    """
    image = native_nifti(prediction)
    write_output(path, lambda temporary: nib.save(image, temporary), ".nii.gz")


class SavePredictiond(MapTransform):
    """Writes predictions under the name in their meta data; the data pass through as they are.

    MONAI's ``SaveImaged`` writes one affine for both of NIfTI's, and meets every failure with advice to install
    writers; here an error arrives as it was raised, so that a full disk is told from a faulty case.

    Args:
        keys: predictions ``(1, H, W, D)``, MetaTensors.
        output_dir: the folder they go to.
    """

    def __init__(self, keys: Hashable, output_dir: str) -> None:
        super().__init__(keys)
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write each key; errors as :func:`save_native`."""
        for key in self.keys:
            save_native(data[key], self.output_dir / Path(data[key].meta["filename_or_obj"]).name)
        return dict(data)
