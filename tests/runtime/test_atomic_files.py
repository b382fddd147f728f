"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from scripts.runtime.atomic_files import write_atomically, write_json, write_text


def files_in(folder):
    return sorted(p.name for p in folder.iterdir())


def half_then_fail(error):
    def write(temporary):
        Path(temporary).write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_atomically(path, half_then_fail(error))
    assert path.read_text() == "old" and files_in(tmp_path) == ["report.json"]


def test_a_failure_leaves_no_new_file(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "new.txt", half_then_fail(OSError("disk full")))
    assert files_in(tmp_path) == []


def test_a_writer_that_writes_nothing_is_an_error_only_if_it_removes_the_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone.txt", os.unlink)
    assert files_in(tmp_path) == []


def test_the_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"

    def write(temporary):
        assert Path(temporary).parent == tmp_path and not path.exists()
        assert Path(temporary).name.startswith("."), "hidden: no one takes it for a result"
        Path(temporary).write_text("whole")

    write_atomically(path, write)
    assert path.read_text() == "whole" and files_in(tmp_path) == ["a.txt"]


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "Bericht für Zoë.txt"
    for text in ("first", "zweite Fassung: äöü 数"):
        write_text(text, path)
        assert path.read_text(encoding="utf-8") == text
    assert files_in(path.parent) == [path.name]


def test_json_reads_back(tmp_path):
    content = {"b": [1, 2.5, None], "ä": {"deep": True}}
    write_json(content, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == content


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_say_is_refused_before_anything_is_written(tmp_path, value):
    path = tmp_path / "deep" / "a.json"
    with pytest.raises((ValueError, TypeError)):
        write_json({"dice": value}, path)
    assert not path.parent.exists()
    write_json({"dice": 1}, path)
    with pytest.raises((ValueError, TypeError)):
        write_json({"dice": value}, path)
    assert json.loads(path.read_text()) == {"dice": 1} and files_in(path.parent) == ["a.json"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text("x", tmp_path / "a.txt")
        assert os.umask(umask) == umask, "the mask itself is left alone"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_text("x", tmp_path / "a.txt")
