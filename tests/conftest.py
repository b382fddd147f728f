"""Shared by all tests: repository on the path, two threads, fixed seeds, the folder with data and fixtures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from monai.utils import set_determinism

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded():
    set_determinism(0)
    yield
    set_determinism(None)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the parity fixtures and the data; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("NEUROVERSE3D_SHARED") or REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no fixtures and data at {folder}: set NEUROVERSE3D_SHARED to the folder that holds them")
    return folder
