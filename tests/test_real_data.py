"""Real MRI, where it is at hand: the hippocampus cases go through checks, preprocessing and back."""

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.data.integrity import inspect_cases, sound_cases
from scripts.data.nnunet import find_datasets
from scripts.data.preprocessing import Preprocessing, fit_spacing
from scripts.data.volumes import load_volume
from scripts.inferer import ICLInferer


@pytest.fixture(scope="module")
def cases(shared_dir):
    (dataset,) = find_datasets(shared_dir / "data" / "Dataset004_Hippocampus")
    assert dataset.classes == {"Anterior": (1,), "Posterior": (2,)}
    return sound_cases(inspect_cases(dataset.cases()))


def test_all_cases_are_sound(cases):
    assert len(cases) == 200 and all(set(case["values"]) == {1, 2} for case in cases)


def test_labels_survive_the_way_to_the_grid_and_back(cases):
    grid = (48, 64, 48)
    preprocessing = Preprocessing(grid, fit_spacing(cases, grid))
    for case in cases[::40]:
        image, label = load_volume(case["image"]), load_volume(case["label"])
        target = preprocessing.target(image)
        same_voxels = Preprocessing(target.shape[1:], preprocessing.spacing_mm)
        padded = same_voxels.pair(image, label)[1]
        scores = torch.cat([(padded == value).float() for value in (1, 2)])
        back = preprocessing.to_native(scores, target)
        assert back.shape[1:] == image.shape[1:] and np.allclose(back.affine, image.affine)
        for value in (1, 2):
            mask, truth = back[value - 1] > 0.5, label[0] == value
            assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9


def test_a_network_that_copies_one_context_answers_in_place(cases):
    class FirstLabel(torch.nn.Module):
        grid = torch.tensor([32, 48, 32])

        def forward(self, target_in, context_in, context_out, mini_context_size):
            return context_out[:, 0]

    chosen = cases[:3]
    predictor = ICLInferer(FirstLabel(), device="cpu", align="off")
    predictor.set_context([c["image"] for c in chosen], [c["label"] for c in chosen])
    answer = predictor.predict(cases[5]["image"])
    source = nib.load(cases[5]["image"])
    assert answer.shape[1:] == source.shape and np.allclose(answer.affine, source.affine)
    truth = np.asarray(nib.load(cases[5]["label"]).dataobj)
    for value in (1, 2):  # copying a neighbour's label is a poor answer, but one in the right place
        both = (answer[0].numpy() == value).sum() + (truth == value).sum()
        assert 2 * ((answer[0].numpy() == value) & (truth == value)).sum() / both > 0.3
