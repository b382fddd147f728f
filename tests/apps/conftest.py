"""A PACS for the applications' tests, and files to put into it."""

import os
import shutil

import pytest

from tests.apps.orthanc import Orthanc, plugin


@pytest.fixture(scope="session")
def pacs_tools():
    """The tools are there, or the tests are skipped; where CI=true they fail."""
    needed = ("Orthanc", "storescu", "dciodvfy", "dcm2niix", "segimage2itkimage")
    missing = [tool for tool in needed if shutil.which(tool) is None] + ([] if plugin() else ["Orthanc's DICOMweb"])
    if missing:
        reason = f"{', '.join(missing)} not installed: see .ci/pacs-test"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture
def orthanc(pacs_tools, tmp_path_factory):
    """An empty PACS."""
    started = Orthanc(tmp_path_factory.mktemp("orthanc"))
    yield started
    started.stop()
