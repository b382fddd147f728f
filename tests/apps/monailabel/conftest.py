"""Studies, weights and servers for the MONAI Label app's tests."""

import runpy
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.data.synthesis.cohort import synthesize_cohort
from scripts.networks import Neuroverse3D

HERE = Path(__file__).parent
MAIN = HERE.parents[2] / "scripts" / "apps" / "monailabel" / "main.py"

if find_spec("monailabel"):
    SHIM = runpy.run_path(str(HERE / "shim" / "sitecustomize.py"))  # kept, for torchvision's operators live in it


def save_random_weights(path, seed=0):
    """A network with random weights whose output is above the threshold in about half of the volume."""
    torch.manual_seed(seed)
    network = Neuroverse3D(channels=(4, 8), spatial_size=16).eval()
    images, labels, _ = synthesize_cohort(0, subjects=4, spatial_size=16, num_labels=1)
    with torch.no_grad():
        network.target_decoder.output.weight.mul_(50)
        output = network(images[:1], images[None, 1:], labels[None, 1:].float())
        network.target_decoder.output.bias.add_(0.5 - output.median())
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return save_random_weights(tmp_path_factory.mktemp("weights") / "model.pt")


@pytest.fixture(scope="session")
def make_studies(make_dataset):
    """``make_studies(folder, cases, **options)``: scans ``case_00`` ... in ``studies``, labels beside it."""

    def make(folder, cases=6, **options):
        source = make_dataset(folder, cases=cases, **options)
        studies, labels = Path(folder) / "studies", Path(folder) / "drawn"
        studies.mkdir()
        for path in sorted((source / "imagesTr").iterdir()):
            shutil.copy(path, studies / path.name.replace("_0000", ""))
        shutil.copytree(source / "labelsTr", labels)
        cases = sorted(path.name.removesuffix(".nii.gz") for path in studies.iterdir())
        return SimpleNamespace(
            folder=studies,
            cases=cases,
            image=lambda case: studies / f"{case}.nii.gz",
            label=lambda case: labels / f"{case}.nii.gz",
        )

    return make


@pytest.fixture(scope="session")
def make_app_dir():
    """``make_app_dir(folder)``: the app as docs/monailabel.md sets it up, a folder with a link."""

    def make(folder):
        app = Path(folder) / "app"
        app.mkdir()
        (app / "main.py").symlink_to(MAIN)
        return app

    return make
