"""``doctor``: what it prints, and that weights which segment nothing are found out."""

from __future__ import annotations

import re

import pytest

from scripts.apps.command.doctor import doctor
from scripts.checkpoint import atomic_save
from scripts.networks import Neuroverse3D
from scripts.runtime.manifest import ROOT
from scripts.runtime.output_folder import file_sha256


def test_versions_device_and_weights_are_printed_and_the_self_check_passes(capsys):
    doctor(device="cpu")
    said = capsys.readouterr().out
    for name in ("Neuroverse3D", "Python", "device", "bfloat16", "free memory", "weights", "self-check"):
        assert re.search(rf"^{name}: +\S", said, re.MULTILINE), name
    assert file_sha256(ROOT / "models" / "model.pt") in said and said.endswith("all is well\n")


def test_weights_that_segment_nothing_fail(tmp_path):
    atomic_save(Neuroverse3D(channels=(4, 8), spatial_size=32).state_dict(), tmp_path / "raw.pt")
    with pytest.raises(ValueError, match="self-check failed"):
        doctor(checkpoint=str(tmp_path / "raw.pt"), device="cpu")
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pt"):
        doctor(checkpoint=str(tmp_path / "none.pt"))
