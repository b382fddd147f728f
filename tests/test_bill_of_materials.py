"""The list of installed packages."""

import csv
import json
from email.message import Message
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from scripts.bill_of_materials import bill_of_materials, licence_of


def test_it_names_what_is_installed_and_is_the_same_twice(tmp_path):
    bill_of_materials(str(tmp_path / "a"))
    bill_of_materials(str(tmp_path / "b"))
    found = json.loads((tmp_path / "a" / "sbom.cdx.json").read_text())
    assert found["bomFormat"] == "CycloneDX" and found["metadata"]["component"]["name"] == "Neuroverse3D"
    packages = {c["name"]: c for c in found["components"] if c["purl"].startswith("pkg:pypi/")}
    assert packages["monai"]["version"] == version("monai")
    assert packages["torch"]["purl"] == "pkg:pypi/torch@" + version("torch").replace("+", "%2B")
    references = [component["bom-ref"] for component in found["components"]]
    assert len(references) == len(set(references))
    for name in ("sbom.cdx.json", "licenses.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with (tmp_path / "a" / "licenses.csv").open() as file:
        licences = {row["name"]: row["licence"] for row in csv.DictReader(file)}
    assert "Apache" in licences["monai"] and "MIT" in licences["nibabel"]


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ([("License-Expression", "BSD-3-Clause"), ("License", "other")], "BSD-3-Clause"),
        ([("License", "MIT")], "MIT"),
        ([("License", "A long text\nof many lines"), ("Classifier", "License :: OSI Approved :: MIT License")],
         "MIT License"),
        ([("License", "A long text\nof many lines")], "A long text"),
        ([], ""),
    ],
)  # fmt: skip
def test_a_licence_is_one_line(fields, licence):
    metadata = Message()
    for key, value in fields:
        metadata[key] = value
    assert licence_of(SimpleNamespace(metadata=metadata)) == licence
