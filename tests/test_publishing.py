"""A version as others get it: version, changelog, metadata and lock files in step, and a copy that MONAI loads."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import load

from scripts.checkpoint import atomic_save
from scripts.networks import Neuroverse3D

LOCKS = ("requirements.lock", "requirements-torch-cuda.lock", "requirements-torch-cpu.lock")


@pytest.fixture(scope="module")
def metadata():
    return json.loads(Path("configs/metadata.json").read_text())


def locked(name):
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", Path(name).read_text(), re.MULTILINE))


def test_every_version_is_in_both_changelogs_the_newest_first(metadata):
    sections = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", Path("CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections == list(metadata["changelog"])
    assert metadata["version"] == sections[0]
    assert sections == sorted(sections, key=lambda version: [int(n) for n in version.split(".")], reverse=True)


def test_the_documented_build_names_the_version(metadata):
    assert f"VERSION={metadata['version']} " in Path("docs/container.md").read_text()


def test_the_citation_names_the_version(metadata):
    assert f"\nversion: {metadata['version']}\n" in Path("CITATION.cff").read_text()


def test_the_locks_have_what_the_requirements_ask_for():
    asked = {}
    for name in ("requirements.txt", "requirements-image.txt"):
        asked |= dict(re.findall(r"^([A-Za-z0-9-]+)==(\S+)", Path(name).read_text(), re.MULTILINE))
    rest, cuda, cpu = map(locked, LOCKS)
    version = asked.pop("torch")
    assert cuda["torch"] == version and cpu == {"torch": f"{version}+cpu"}
    assert {name.lower(): v for name, v in asked.items()}.items() <= rest.items()
    assert not set(rest) & set(cuda) and not any(name.startswith("nvidia") for name in rest)


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_a_hash_and_no_index_is_named(name):
    text = Path(name).read_text()
    blocks = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(locked(name))
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    assert "http" not in text and "index" not in text


def test_the_image_is_built_from_what_the_repository_has():
    content = Path("Dockerfile").read_text()
    kept = [line[1:] for line in Path(".dockerignore").read_text().splitlines() if line.startswith("!")]
    for pattern in kept:
        assert list(Path().glob(pattern)), pattern
    for needed in ("scripts", "configs", "models", "schema", "docs", "LICENSE", "requirements.lock"):
        assert needed in kept
    assert "USER 10001:10001" in content and "--require-hashes" in content
    schema = json.loads(Path("configs/metadata.json").read_text())["schema"].rpartition("/")[2]
    from scripts.apps.command.verbs import VERBS

    assert VERBS["verify_metadata"].fixed["filepath"].endswith(f"/schema/{schema}")


def test_monai_loads_a_copy_of_the_bundle(tmp_path, monkeypatch):
    copy = tmp_path / "Neuroverse3D"
    for part in ("configs", "scripts"):
        shutil.copytree(part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    network = Neuroverse3D(channels=(4, 8), spatial_size=16)
    atomic_save(network.state_dict(), copy / "models" / "model.pt")
    monkeypatch.chdir(copy)
    loaded = load("Neuroverse3D", bundle_dir=str(tmp_path), workflow_type="inference", device="cpu")
    assert loaded.channels == (4, 8)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    monkeypatch.chdir(tmp_path)
    options = {"bundle_dir": str(tmp_path), "workflow_type": "inference", "device": "cpu"}
    assert load("Neuroverse3D", args_file={"bundle_root": str(copy)}, **options).channels == (4, 8)
