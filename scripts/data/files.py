"""Files as users have them: finding images, whatever their names and links, and reading JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.data.volumes import strip_ending

_NAMES = {dict: "an object {...}", list: "a list [...]", str: "a text", bool: "true or false", type(None): "null"}


class DatasetError(ValueError):
    """A dataset, or a file that describes one, cannot be used; the message says which and why."""


def image_files(folder: str | Path) -> list[Path]:
    """Image files of a folder (not of its sub-folders), sorted; none if there is no such folder.

    Links to nothing are among them, so that they are missed by whoever wants to read them: files of a DataLad dataset
    are such links before they are fetched.
    """
    folder = Path(folder)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if strip_ending(path) and (path.is_file() or is_dangling(path))]


def is_dangling(path: str | Path) -> bool:
    """Whether a path is a link to nothing."""
    return Path(path).is_symlink() and not Path(path).exists()


def file_faults(path: str | Path) -> list[str]:
    """What is wrong with a file before it is read, and what to do; one text each."""
    faults = []
    if is_dangling(path):
        faults.append(
            f"{printable(Path(path).name)} is a link to nothing: fetch the file (datalad get) or mend the link"
        )
    if printable(str(path)) != str(path):
        faults.append("the file's name is not UTF-8: rename it")
    return faults


def printable(name: str) -> str:
    r"""A file name that can be printed and written: bytes that are not UTF-8 as ``\udcff``, all else as it is."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def read_json(path: str | Path, kind: type | tuple[type, ...], form: str, fault: str = "cannot be read as JSON") -> Any:
    """Read a JSON file that a user gives.

    A byte order mark is passed over, and UTF-16 and UTF-32 are read as well (RFC 4627, section 3). What JSON leaves to
    its readers is refused: a key that an object has twice, NaN and infinity.

    Args:
        path: the file.
        kind: type, or types, of its content.
        form: what the file should hold, which ends every error's message.
        fault: what an error says of the file in front of its reason.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: not JSON, or not of this kind; the message names the file and, where it is known, the line.
    """
    data = Path(path).read_bytes()

    def error_of(reason: str) -> DatasetError:
        return DatasetError(f"{printable(str(path))} {fault} ({reason}): {form}")

    def refuse(constant: str) -> None:
        raise error_of(f"{constant} is no number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise error_of(f"an object has the key {json.dumps(twice)} twice")
        return found

    try:
        text = data.decode(json.detect_encoding(data))
        content = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse)
    except DatasetError:
        raise
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise error_of(f"line {line}: no UTF-8 text") from error
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}: {error.msg}" if text.strip() else "the file is empty"
        raise error_of(reason) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, objects within objects without end
        raise error_of(str(error)) from error
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(content) not in kinds:
        wanted = " or ".join(_NAMES[k] for k in kinds)
        raise error_of(f"it holds {_NAMES.get(type(content), 'a number')} where {wanted} belongs")
    return content
