"""Probability maps: the scores behind a mask."""

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.inference.probabilities import STEPS, SaveProbabilitiesd, probability_folder
from scripts.inferer import ICLInferer
from tests.test_inference import LabelAverage, contexts


def oblique():
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.3) @ np.diag([-1.5, 1.0, 2.0]), (5, -7, 3))
    return MetaTensor(torch.rand(1, 14, 18, 9), affine=torch.as_tensor(affine))


def test_maps_are_the_scores_behind_the_mask_in_the_target_s_space(tmp_path):
    inferer = ICLInferer(LabelAverage(), device="cpu", spacing=1.0, align="off")
    images, labels = contexts(2)
    labels = [MetaTensor(label + (label.roll(6, 1) > 0) * 4 * (label == 0), affine=label.affine) for label in labels]
    inferer.set_context(images, labels)
    assert inferer.label_values == [1, 4]
    source = oblique()
    target = inferer.target(source, "günther")
    inferer.prepare_views(target)
    target.scores = [torch.stack([2 * torch.rand(target.image.shape[1:]) - 0.5 for _ in range(2)])]
    assert SaveProbabilitiesd("target", inferer, str(tmp_path))({"target": target})["target"] is target
    files = [nib.load(probability_folder(tmp_path, "günther") / f"label_{value}.nii.gz") for value in (1, 4)]
    maps = np.stack([file.get_fdata(dtype=np.float32) for file in files])
    for file in files:
        assert file.shape == source.shape[1:] and file.get_data_dtype() == np.float32
        assert np.allclose(file.affine, source.affine, atol=1e-4)
    assert maps.min() == 0 and maps.max() == 1 and np.array_equal(maps * STEPS, np.round(maps * STEPS))
    mask = inferer.to_native(target).prediction[0].numpy()
    best = maps.max(0)
    clear = (np.abs(best - 0.5) > 1 / STEPS) & (np.abs(maps[0] - maps[1]) > 1 / STEPS)
    clear &= (best > 0.5) | (maps.min(0) < 0.04)  # below it, touching labels have a rule of their own
    again = np.where(best > 0.5, np.array([1, 4])[maps.argmax(0)], 0)
    assert clear.mean() > 0.5 and set(np.unique(again[clear])) == {0, 1, 4}
    assert np.array_equal(again[clear], mask[clear])


def test_generation_has_none(tmp_path):
    inferer = ICLInferer(LabelAverage(), device="cpu", task="generation")
    with pytest.raises(ValueError, match="--probabilities true is for segmentation"):
        SaveProbabilitiesd("pred", inferer, str(tmp_path))
