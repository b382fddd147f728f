"""What clients send: names, settings, and files that are to be scans."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nrrd

from scripts.apps.monailabel.statuses import clear_statuses
from scripts.data.integrity import examine
from scripts.data.volumes import load_volume
from scripts.runtime.options import normalise

SCANS = (".nii.gz", ".nii", ".nrrd")
"""Endings of what may be stored."""

_TAG = re.compile(r"\w[\w -]{0,63}")
_LONGEST = 200  # bytes; with an ending and a temporary file's letters a file name has at most 255
_RECEIVED = re.compile(r"tmp[a-z0-9_]{8}(\..+)?")
"""How ``tempfile`` calls the files in which MONAI Label puts what it receives: eight letters that no client knows."""


def check_tag(tag: object) -> None:
    """A tag becomes the name of a folder.

    Raises:
        ValueError: it is not a plain word.
    """
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise ValueError(f"{tag!r} is no tag: a plain word is needed")


def leads_elsewhere(name: str) -> bool:
    """Whether a name may mean a file outside of the folder that it is looked up in, or none at all."""
    return name.startswith("/") or "\\" in name or ".." in name.split("/") or any(ord(sign) < 32 for sign in name)


def setting(name: str, option: str, value: Any) -> Any:
    """A client's setting, brought to the type of one of the bundle's options.

    Raises:
        ValueError: it does not fit.
    """
    try:
        found = normalise(option, value)
    except ValueError as error:
        raise ValueError(str(error).replace(f"--{option}", name, 1)) from None
    if found is None:
        raise ValueError(f"{name} needs a value")
    return found


def check_new_name(name: object) -> None:
    """A new scan's id becomes a file name; signs such as ``$``, ``@`` and ``#`` are letters like others.

    Raises:
        ValueError: it is not a plain name.
    """
    sound = isinstance(name, str) and name.isprintable() and not {*"/\\"} & {*name} and ".." not in name
    if not sound or not name or name[0] in ".- " or name[-1] in ". " or len(os.fsencode(name)) > _LONGEST:
        raise ValueError(f"{name!r} is no name for a scan: a plain one is needed, without folders and ..")


def check_file(file: str | os.PathLike) -> None:
    """A file that is sent has one of :data:`SCANS` as its ending, and its voxels in it.

    Raises:
        ValueError: another ending, or an NRRD header that names other files as its data.
    """
    if not str(file).endswith(SCANS):
        raise ValueError(f"a file must end in {', '.join(SCANS)}")
    if str(file).endswith(".nrrd"):
        try:
            header = nrrd.read_header(str(file))
        except Exception as error:  # pynrrd raises whatever it stumbles over
            raise ValueError("an NRRD file whose header cannot be read") from error
        if {"datafile", "data file"} & header.keys():
            raise ValueError("an NRRD file must hold its voxels itself")


def check_scan(file: str | os.PathLike) -> None:
    """A file is a scan that can be predicted.

    Raises:
        ValueError: another ending, or it cannot be read, or not used; the message says why.
    """
    check_file(file)
    if problems := examine(load_volume(file), None, None)["problems"]:
        raise ValueError(f"no scan: {'; '.join(problems)}")


def is_received(file: str) -> bool:
    """Whether a path is that of a file that MONAI Label has just received, rather than one that a client made up."""
    path = Path(file)
    in_place = path.parent == Path(tempfile.gettempdir()) and _RECEIVED.fullmatch(path.name) is not None
    return in_place and path.is_file() and not path.is_symlink()


@contextmanager
def incoming(file: str | os.PathLike) -> Iterator[None]:
    """Errors as HTTP statuses; a file that was received is removed if it is refused, for MONAI Label would keep it."""
    try:
        with clear_statuses():
            yield
    except BaseException:
        if is_received(str(file)):
            Path(file).unlink(missing_ok=True)
        raise
