"""``label``: the command that starts the server, and what is said where it cannot be."""

from __future__ import annotations

import sys

import pytest

from scripts.apps.command.label import environment_lines, main, server_command


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "env" / "lib" / "python3.11" / "site-packages" / "monailabel").mkdir(parents=True)
    return str(tmp_path / "env")


def test_the_server_is_started_in_its_environment_with_the_bundle_s_app(environment, tmp_path):
    for _ in range(2):  # the folder of an earlier start is taken again
        command = server_command(environment, str(tmp_path / "app"), "scans", "127.0.0.1", "8000", ["--conf", "a", "1"])
    assert command[0] == f"{environment}/bin/python" and command[-3:] == ["--conf", "a", "1"]
    assert (tmp_path / "app" / "main.py").resolve().parts[-3:] == ("apps", "monailabel", "main.py")


def test_what_is_no_environment_and_what_is_in_the_way_is_refused(environment, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no environment; it is made by"):
        server_command(str(tmp_path / "none"), "app", "scans", "127.0.0.1", "8000", [])
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.py").write_text("mine")
    with pytest.raises(FileExistsError, match="give another --output"):
        server_command(environment, str(tmp_path / "app"), "scans", "127.0.0.1", "8000", [])
    assert (tmp_path / "app" / "main.py").read_text() == "mine"


def test_without_an_environment_two_lines_say_how_to_make_one(monkeypatch, capsys, environment):
    monkeypatch.setattr(sys, "argv", ["label", "--studies", "scans"])
    main()
    said = capsys.readouterr().out
    assert all(line in said for line in environment_lines("label-env"))
    monkeypatch.setattr(sys, "argv", ["label", "--studies", "scans", "--environment", environment])
    with pytest.raises(SystemExit, match="label needs --output"):
        main()
